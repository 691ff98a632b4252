"""Weights of a checkpoint in the layout of a backend's kernels, and the cheaper copies that draft."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from ..config.packing import PackingConfig, Quantization
from .draft_vocabulary import DraftVocabulary
from .layer_weights import NormWeights, norm_weights
from .spec import ModelSpec
from .weights import Take, Weights

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
) -> Repacked[LayerT, HeadT]:
    """Takes every weight once, so that a second copy of one layer exists at most."""
    norm = norm_weights(weights, "model.norm", spec)
    head = embedding if spec.tied else weights.of("lm_head.weight")
    vocabulary = DraftVocabulary(len(head), packing.draft_vocab, token_order) if packing.draft_vocab else None
    kept = head if vocabulary is None else vocabulary.rows_of(head)
    packed_head = pack_head(norm, head, packing.quantize, packing.exact)
    draft_head = packed_head if vocabulary is None else pack_head(norm, kept, packing.quantize, False)
    copies: dict[Quantization, tuple[list[LayerT], HeadT]] = {}
    if packing.draft_weights:
        kind = packing.draft_head or "int8"
        cheap_head = draft_head if kind == packing.quantize and not packing.exact else pack_head(norm, kept, kind, False)
        copies = {kind: ([], cheap_head) for kind in packing.draft_weights}
    del head, kept
    layers: list[LayerT] = []
    for index in range(spec.layers):
        originals = weights.remembered(f"model.layers.{index}.")
        layers.append(pack_layer(originals, index, packing.quantize, packing.exact))
        if index < (packing.draft_layers or spec.layers):
            for kind, (copied, _) in copies.items():
                copied.append(pack_layer(originals, index, kind, False))
    return Repacked(layers, packed_head, draft_head, copies, vocabulary)


def taken_from(model: nn.Module) -> Take:
    """The weights of a transformers model, which loses them and can no longer run."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    return lambda name: weights.pop(name, None)
