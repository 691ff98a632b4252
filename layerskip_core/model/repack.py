"""Weights of a checkpoint in the layout of a backend's kernels, and the cheaper copies that draft."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor, nn

from ..config.packing import PackingConfig, Quantization
from .draft_vocabulary import DraftVocabulary
from .exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks
from .layer_weights import NormWeights, norm_weights
from .spec import EMBEDDING, ModelSpec
from .weights import Take, Weights, checked


class Head(Protocol):
    """A norm and a matrix (N, D)."""

    def with_norm(self, norm: NormWeights) -> Self:
        """The same matrix after another norm."""


LayerT = TypeVar("LayerT")
HeadT = TypeVar("HeadT", bound=Head)
JoinT = TypeVar("JoinT")

PackLayer = Callable[[Weights, int, Quantization | None, bool], LayerT]  # weights, index, low bits, exact
# The final norm; the weights that have the head, of which a vocabulary's rows are taken; low bits; exact.
PackHead = Callable[[NormWeights, Weights, DraftVocabulary | None, Quantization | None, bool], HeadT]
# The weights of all blocks; a block that has a map (D, 2D); low bits.
PackJoin = Callable[[Weights, ExitBlock, Quantization | None], JoinT]


@dataclass(frozen=True)
class BlockEnds(Generic[HeadT, JoinT]):
    """What comes before a block's layer, and what follows it."""

    block: ExitBlock
    join: JoinT | None
    norm: NormWeights
    head: HeadT


@dataclass(frozen=True)
class Chain(Generic[LayerT, HeadT, JoinT]):
    """Layers and what follows them. The layers of exit blocks come after the model's own L; None is the place of none."""

    layers: list[LayerT | None]
    head: HeadT
    blocks: dict[int, BlockEnds[HeadT, JoinT]]  # by their places among the layers

    def with_head(self, head: HeadT) -> "Chain[LayerT, HeadT, JoinT]":
        """The same layers with another head."""
        blocks = {place: replace(ends, head=head.with_norm(ends.norm)) for place, ends in self.blocks.items()}
        return Chain(self.layers, head, blocks)


@dataclass(frozen=True)
class Repacked(Generic[LayerT, HeadT, JoinT]):
    """All weights but the embedding."""

    norm: NormWeights  # the final norm
    target: Chain[LayerT, HeadT, JoinT]
    drafts: Chain[LayerT, HeadT, JoinT]  # the same layers, with the head that drafts
    copies: dict[Quantization, Chain[LayerT, HeadT, JoinT]]  # for drafting: the first layers, their blocks, and a head
    copied: int  # how many of the layers they have
    vocabulary: DraftVocabulary | None  # of the heads that draft; None for all tokens


def repack(
    weights: Weights,
    embedding: Tensor,
    spec: ModelSpec,
    packing: PackingConfig,
    token_order: list[int] | None,
    pack_layer: PackLayer[LayerT],
    pack_head: PackHead[HeadT],
    pack_join: PackJoin[JoinT],
    int4: Take | None = None,
    exit_blocks: ExitBlocks = NO_BLOCKS,
) -> Repacked[LayerT, HeadT, JoinT]:
    """Takes every weight once. A second copy exists of one matrix at most, of one layer where there are copies for drafting.

    `int4`: calibrated weights as rows of bytes (see int4.py), of which int4 layers and heads are made. `exit_blocks`: see
    exit_blocks.py; their layers follow the model's own.
    """

    def source(weights: Weights, kind: Quantization | None) -> Weights:
        return weights.after(calibrated) if kind == "int4" and calibrated is not None else weights

    calibrated = None if int4 is None else checked(int4, spec.shapes)
    norm = norm_weights(weights, "model.norm", spec)
    vocabulary = DraftVocabulary(spec.vocab, packing.draft_vocab, token_order) if packing.draft_vocab else None
    heads = weights.remembered("").after({EMBEDDING: embedding}.get)

    def pack_draft_head(heads: Weights, kind: Quantization | None) -> HeadT:
        return pack_head(norm, source(heads, kind), vocabulary, kind, False)

    packed_head = pack_head(norm, source(heads, packing.quantize), None, packing.quantize, packing.exact)
    draft_head = packed_head if vocabulary is None else pack_draft_head(heads, packing.quantize)
    target: Chain[LayerT, HeadT, JoinT] = Chain([], packed_head, {})
    copies: dict[Quantization, Chain[LayerT, HeadT, JoinT]] = {}
    if packing.draft_weights:
        kind = packing.draft_head or "int8"
        cheap_head = draft_head if kind == packing.quantize and not packing.exact else pack_draft_head(heads, kind)
        copies = {kind: Chain([], cheap_head, {}) for kind in packing.draft_weights}
    del heads
    copied = packing.draft_layers or spec.layers
    for index in range(spec.layers):
        prefix = f"model.layers.{index}."
        originals = weights.remembered(prefix) if copies else weights.below(prefix)
        target.layers.append(pack_layer(source(originals, packing.quantize), index, packing.quantize, packing.exact))
        for kind, chain in copies.items():
            kept = index < copied
            chain.layers.append(pack_layer(source(originals, kind), index, kind, False) if kept else None)
    chains = [(target, packing.quantize, packing.exact), *((chain, kind, False) for kind, chain in copies.items())]
    of_blocks = exit_blocks.weights(spec, embedding)
    for place, block in enumerate(exit_blocks.blocks, spec.layers):
        originals = of_blocks.remembered(block.prefix)
        own_norm = norm_weights(originals, "norm", spec)
        for chain, low_bits, exact in chains:
            if chain is not target and block.exit_layer > copied:
                chain.layers.append(None)
                continue
            chain.layers.append(pack_layer(originals.below("layer."), place, low_bits, exact))
            join = pack_join(of_blocks, block, low_bits) if block.feature == "final" else None
            chain.blocks[place] = BlockEnds(block, join, own_norm, chain.head.with_norm(own_norm))
    return Repacked(norm, target, target.with_head(draft_head), copies, copied, vocabulary)


def taken_from(model: nn.Module) -> Take:
    """The weights of a transformers model, which loses them and can no longer run."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    return lambda name: weights.pop(name, None)
