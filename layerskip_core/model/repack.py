"""Weights in the layout of a backend's kernels, and the cheaper copies that draft."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from ..config.packing import PackingConfig, Quantization
from .backend import DraftSide, Layers
from .draft_vocabulary import DraftVocabulary
from .drafting import DraftKernel, LayeredDraftSide
from .exit_blocks import ExitBlock, ExitBlocks, PlacedBlock
from .spec import EMBEDDING, ModelSpec
from .weights import NormWeights, Take, Weights, checked, norm_weights


class Head(Protocol):
    """A norm and a matrix: (..., D) to logits (..., N)."""

    def __call__(self, hidden: Tensor) -> Tensor: ...

    def with_norm(self, norm: NormWeights) -> Self:
        """The same matrix after another norm."""


LayerT = TypeVar("LayerT")
HeadT = TypeVar("HeadT", bound=Head)
LayersT = TypeVar("LayersT", bound=Layers)
MadeLayerT = TypeVar("MadeLayerT", covariant=True)
MadeHeadT = TypeVar("MadeHeadT", bound=Head, covariant=True)


class Packer(Protocol[MadeLayerT, MadeHeadT]):
    """Makes the parts of a backend from weights, which are read when they are needed.

    `low_bits`: the precision of matrices, None for that of the weights. `exact`: rows keep the bits that they have alone.
    """

    def layer(self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool) -> MadeLayerT: ...

    def head(
        self, norm: NormWeights, weights: Weights, rows: DraftVocabulary | None, low_bits: Quantization | None, exact: bool
    ) -> MadeHeadT: ...

    def join(self, weights: Weights, block: ExitBlock, low_bits: Quantization | None) -> Callable[[Tensor], Tensor]: ...

    def norm(self, weights: NormWeights) -> Callable[[Tensor], Tensor]: ...


@dataclass(frozen=True)
class Chain(Generic[LayerT, HeadT]):
    """Layers and what follows them. The layers of exit blocks come after the model's own L; None where this copy lacks one."""

    layers: list[LayerT | None]
    head: HeadT
    blocks: dict[int, PlacedBlock]  # by exit


@dataclass(frozen=True)
class Repacked(Generic[LayerT, HeadT]):
    """All weights but the embedding."""

    normed: Callable[[Tensor], Tensor]  # the final norm
    target: Chain[LayerT, HeadT]
    drafts: Chain[LayerT, HeadT]  # the same layers, with the head that drafts
    copies: dict[Quantization, Chain[LayerT, HeadT]]  # for drafting: the first layers, their blocks, and a head
    layers: int  # of the model, without those of exit blocks
    copied: int  # how many of these the copies have
    vocabulary: DraftVocabulary | None  # of the heads that draft; None for all tokens

    def draft_sides(
        self,
        own: LayersT,
        layers_of: Callable[[list[LayerT | None]], LayersT],
        kernel_of: Callable[[LayersT, HeadT, bool], DraftKernel | None] = lambda *_: None,
    ) -> Mapping[Quantization | None, DraftSide]:
        """`own`: the target's layers. `kernel_of`: from layers, a head, and whether the layers are the target's."""

        def side(layers: LayersT, count: int, chain: Chain[LayerT, HeadT]) -> DraftSide:
            kernel = kernel_of(layers, chain.head, layers is own)
            return LayeredDraftSide(layers, count, chain.head, chain.blocks, self.vocabulary, layers is own, kernel)

        sides: dict[Quantization | None, DraftSide] = {None: side(own, self.layers, self.drafts)}
        for kind, chain in self.copies.items():
            sides[kind] = side(layers_of(chain.layers), self.copied, chain)
        return sides


def repack(
    weights: Weights,
    embedding: Tensor,
    spec: ModelSpec,
    packing: PackingConfig,
    token_order: list[int] | None,
    packer: Packer[LayerT, HeadT],
    int4: Take | None,
    exit_blocks: ExitBlocks,
) -> Repacked[LayerT, HeadT]:
    """Takes every weight once. A second copy exists of one matrix at most, of one layer where there are copies for drafting.

    `token_order`, `int4`, `exit_blocks`: see `TorchBackend`.
    """

    def source(weights: Weights, kind: Quantization | None) -> Weights:
        return weights.after(calibrated) if kind == "int4" and calibrated is not None else weights

    calibrated = None if int4 is None else checked(int4, spec.shapes)
    norm = norm_weights(weights, "model.norm", spec)
    vocabulary = DraftVocabulary(spec.vocab, packing.draft_vocab, token_order) if packing.draft_vocab else None
    heads = weights.remembered("").after({EMBEDDING: embedding}.get)

    def draft_head_in(kind: Quantization | None, heads: Weights) -> HeadT:
        return packer.head(norm, source(heads, kind), vocabulary, kind, False)

    head = packer.head(norm, source(heads, packing.quantize), None, packing.quantize, packing.exact)
    draft_head = head if vocabulary is None else draft_head_in(packing.quantize, heads)
    target: Chain[LayerT, HeadT] = Chain([], head, {})
    drafts = Chain(target.layers, draft_head, {})
    copies: dict[Quantization, Chain[LayerT, HeadT]] = {}
    if packing.draft_weights:
        kind = packing.draft_head or "int8"
        cheap_head = draft_head if kind == packing.quantize and not packing.exact else draft_head_in(kind, heads)
        copies = {kind: Chain([], cheap_head, {}) for kind in packing.draft_weights}
    del heads
    copied = packing.draft_layers or spec.layers
    for index in range(spec.layers):
        prefix = f"model.layers.{index}."
        originals = weights.remembered(prefix) if copies else weights.below(prefix)
        target.layers.append(packer.layer(source(originals, packing.quantize), index, packing.quantize, packing.exact))
        for kind, chain in copies.items():
            chain.layers.append(packer.layer(source(originals, kind), index, kind, False) if index < copied else None)
    of_blocks = exit_blocks.weights(spec, embedding)

    def add_block(
        block: ExitBlock, own: Weights, low_bits: Quantization | None, exact: bool, *chains: Chain[LayerT, HeadT]
    ) -> None:
        """The block's layer to the layers that the chains share, and the block with the head of each."""
        layers, norm = chains[0].layers, norm_weights(own, "norm", spec)
        place = len(layers)
        layers.append(packer.layer(own.below("layer."), place, low_bits, exact))
        join = packer.join(of_blocks, block, low_bits) if block.feature == "final" else None
        for chain in chains:
            head = chain.head.with_norm(norm)
            chain.blocks[block.exit_layer] = PlacedBlock(block, place, head, packer.norm(norm), join)

    for block in exit_blocks.blocks:
        own = of_blocks.remembered(block.prefix)
        add_block(block, own, packing.quantize, packing.exact, target, drafts)
        for kind, chain in copies.items():
            if block.exit_layer <= copied:
                add_block(block, own, kind, False, chain)
            else:
                chain.layers.append(None)
    return Repacked(packer.norm(norm), target, drafts, copies, spec.layers, copied, vocabulary)
