"""Weights of a checkpoint in the layout of a backend's kernels, and the cheaper copies that draft."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from ..config.packing import PackingConfig, Quantization
from .draft_vocabulary import DraftVocabulary
from .layer_weights import NormWeights, norm_weights
from .spec import EMBEDDING, ModelSpec
from .weights import Take, Weights, checked

LayerT = TypeVar("LayerT")
HeadT = TypeVar("HeadT")

PackLayer = Callable[[Weights, int, Quantization | None, bool], LayerT]  # weights, index, low bits, exact
PackHead = Callable[[NormWeights, Tensor, Quantization | None, bool], HeadT]  # final norm, head (N, D), low bits, exact


@dataclass(frozen=True)
class Repacked(Generic[LayerT, HeadT]):
    """All weights but the embedding."""

    layers: list[LayerT]
    head: HeadT
    draft_head: HeadT  # of drafts by the target's own layers
    copies: dict[Quantization, tuple[list[LayerT], HeadT]]  # for drafting: the first layers, and a head
    vocabulary: DraftVocabulary | None  # of the heads that draft; None for all tokens


def repack(
    weights: Weights,
    embedding: Tensor,
    spec: ModelSpec,
    packing: PackingConfig,
    token_order: list[int] | None,
    pack_layer: PackLayer[LayerT],
    pack_head: PackHead[HeadT],
    int4: Take | None = None,
) -> Repacked[LayerT, HeadT]:
    """Takes every weight once, so that a second copy of one layer exists at most.

    `int4`: calibrated weights as rows of bytes (see int4.py), of which int4 layers and heads are made.
    """

    def source(weights: Weights, kind: Quantization | None) -> Weights:
        return weights.after(calibrated) if kind == "int4" and calibrated is not None else weights

    calibrated = None if int4 is None else checked(int4, spec.shapes)
    norm = norm_weights(weights, "model.norm", spec)
    vocabulary = DraftVocabulary(spec.vocab, packing.draft_vocab, token_order) if packing.draft_vocab else None
    heads = weights.remembered("").after({EMBEDDING: embedding}.get)

    def pack_draft_head(heads: Weights, kind: Quantization | None) -> HeadT:
        head = source(heads, kind).of(spec.head_name)
        return pack_head(norm, head if vocabulary is None else vocabulary.rows_of(head), kind, False)

    packed_head = pack_head(norm, source(heads, packing.quantize).of(spec.head_name), packing.quantize, packing.exact)
    draft_head = packed_head if vocabulary is None else pack_draft_head(heads, packing.quantize)
    copies: dict[Quantization, tuple[list[LayerT], HeadT]] = {}
    if packing.draft_weights:
        kind = packing.draft_head or "int8"
        cheap_head = draft_head if kind == packing.quantize and not packing.exact else pack_draft_head(heads, kind)
        copies = {kind: ([], cheap_head) for kind in packing.draft_weights}
    del heads
    layers: list[LayerT] = []
    for index in range(spec.layers):
        originals = weights.remembered(f"model.layers.{index}.")
        layers.append(pack_layer(source(originals, packing.quantize), index, packing.quantize, packing.exact))
        if index < (packing.draft_layers or spec.layers):
            for kind, (copied, _) in copies.items():
                copied.append(pack_layer(source(originals, kind), index, kind, False))
    return Repacked(layers, packed_head, draft_head, copies, vocabulary)


def taken_from(model: nn.Module) -> Take:
    """The weights of a transformers model, which loses them and can no longer run."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    return lambda name: weights.pop(name, None)
