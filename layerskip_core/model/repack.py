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
    """All weights but the embedding. What drafts has None, or no layers, where it shares the target's."""

    layers: list[LayerT]
    head: HeadT
    draft_layers: list[LayerT]
    draft_head: HeadT | None
    vocabulary: DraftVocabulary | None  # of `draft_head`; None for all tokens


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
    vocabulary, draft_head = None, None
    packed_head = pack_head(norm, head, packing.quantize, packing.exact)
    if packing.draft_vocab:
        vocabulary = DraftVocabulary(len(head), packing.draft_vocab, token_order)
    if packing.drafts_apart:
        kept = head if vocabulary is None else vocabulary.rows_of(head)
        draft_head = pack_head(norm, kept, packing.draft_weights or packing.quantize, False)
        del kept
    del head
    layers: list[LayerT] = []
    draft_layers: list[LayerT] = []
    copies = 0 if packing.draft_weights is None else packing.draft_layers or spec.layers - 1
    for index in range(spec.layers):
        originals = weights.remembered(f"model.layers.{index}.")
        layers.append(pack_layer(originals, index, packing.quantize, packing.exact))
        if index < copies:
            draft_layers.append(pack_layer(originals, index, packing.draft_weights, False))
    return Repacked(layers, packed_head, draft_layers, draft_head, vocabulary)


def taken_from(model: nn.Module) -> Take:
    """The weights of a transformers model, which loses them and can no longer run."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    return lambda name: weights.pop(name, None)
