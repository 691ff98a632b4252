"""`Backend` on repacked weights, by torch's kernels: faster than transformers' layers, on every device."""

import os
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...config.checks import require_choice
from ...config.packing import PackingConfig, Quantization
from ..backend import DraftSide
from ..cache import KVCache
from ..draft_vocabulary import DraftVocabulary
from ..drafting import LayeredDraftSide
from ..exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, PlacedBlock, with_blocks
from ..int4 import named_int4
from ..layer_weights import NormWeights
from ..repack import Chain, repack, taken_from
from ..rope import Rope
from ..spec import EMBEDDING, ModelSpec
from ..splitting import propagate_in_parts, run_in_parts
from ..weights import Take, Weights, checked
from .head import PackedHead, PackedJoin, packed_head
from .layer import Norm, PackedLayer, missing_feature
from .linear import KernelLinear
from .span import PackedLayers

GRAPHS = "LAYERSKIP_CUDA_GRAPHS"  # environment variable: whether decoding on a GPU records its passes


def graphs_are_on() -> bool:
    """What the environment says. Raises ConfigError if that is neither on nor off."""
    asked = os.environ.get(GRAPHS) or "on"
    require_choice(asked, GRAPHS, ("on", "off"))
    return asked == "on"


def can_pack(config: object) -> bool:
    """Whether PackedBackend supports every part of this architecture."""
    return missing_feature(ModelSpec.of(config)) is None


class PackedBackend:
    """The operations and results of `GenericBackend`, for inference only. Not for two threads at once."""

    chooser = None

    def __init__(
        self,
        config: object,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
    ) -> None:
        """The weights of an architecture that `can_pack`, by their names in its checkpoints; each is taken once.

        `token_order`: token ids, the most frequent first, which `draft_vocab` counts; None for the tokenizer's order. `int4`:
        calibrated weights as rows of bytes, for int4 layers and heads; the others are rounded to nearest. `exit_blocks`: those
        of the model's exits.
        Raises CheckpointError for a configuration that is impossible and for a weight that is missing, of another shape or not
        finite, ConfigError where no kernel does what `packing` asks for.
        """
        packing = packing or PackingConfig()
        spec = self.spec = ModelSpec.of(config)
        chain_spec = self._chain_spec = with_blocks(spec, exit_blocks.blocks)
        weights = Weights(checked(take, spec.shapes), spec.shapes)

        def pack_layer(weights: Weights, index: int, quantization: Quantization | None, exact: bool) -> PackedLayer:
            return PackedLayer(weights, chain_spec, index, quantization, exact)

        def pack_head(
            norm: NormWeights, weights: Weights, rows: DraftVocabulary | None, quantization: Quantization | None, exact: bool
        ) -> PackedHead:
            head = weights.of(spec.head_name)
            weight = head if rows is None else rows.rows_of(head)
            return packed_head(norm, weight, spec, quantization, exact, renormed=bool(exit_blocks.blocks))

        def pack_join(weights: Weights, block: ExitBlock, quantization: Quantization | None) -> PackedJoin:
            return PackedJoin(weights.of(block.input_name), quantization)

        with torch.inference_mode():
            embedding = weights.of(EMBEDDING)
            packed = repack(
                *(weights, embedding, spec, packing, token_order, pack_layer, pack_head, pack_join, int4, exit_blocks)
            )
            layers_of = partial(PackedLayers, chain_spec, embedding, Rope(config, spec, embedding))
            self._layers, self._head = layers_of(packed.target.layers, packing.exact), packed.target.head
            self.exit_blocks = _placed(packed.target, spec)
            self.normed = Norm(packed.norm, spec.eps, folds=False)

            def draft_side(layers: PackedLayers, count: int, chain: _PackedChain, own: bool) -> LayeredDraftSide:
                return LayeredDraftSide(layers, count, chain.head, _placed(chain, spec), packed.vocabulary, own)

            own = draft_side(self._layers, spec.layers, packed.drafts, True)
            copies: dict[Quantization | None, DraftSide] = {
                kind: draft_side(layers_of(chain.layers, False), packed.copied, chain, False)
                for kind, chain in packed.copies.items()
            }
        self.draft_sides: Mapping[Quantization | None, DraftSide] = {None: own} | copies
        self.implementation = named_int4(_implementation(packing, self._head, self._layers), int4 is not None)
        self.num_layers, self.hidden_size, self.vocab_size = spec.layers, spec.hidden, spec.vocab
        self.max_positions, self.exact, self.batch_invariant = spec.context, packing.exact, packing.exact
        self.device, self.dtype = embedding.device, embedding.dtype
        self.recordable = self.device.type == "cuda" and not packing.exact and graphs_are_on()
        if self.recordable:
            self.implementation += ", CUDA graphs"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
    ) -> "PackedBackend":
        """Takes the weights of a transformers model, which can no longer run afterwards."""
        return cls(model.config, taken_from(model), packing, token_order, int4, exit_blocks)

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        return KVCache.of(self._chain_spec, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self._layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self._layers, hidden, start, stop, positions, cache)

    def propagate(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        propagate_in_parts(self._layers, hidden, start, stop, positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


_PackedChain = Chain[PackedLayer, PackedHead, PackedJoin]


def _placed(chain: _PackedChain, spec: ModelSpec) -> dict[int, PlacedBlock]:
    """The chain's blocks, by their exits."""
    return {
        ends.block.exit_layer: PlacedBlock(ends.block, place, ends.head, Norm(ends.norm, spec.eps, folds=False), ends.join)
        for place, ends in chain.blocks.items()
    }


def _implementation(packing: PackingConfig, head: PackedHead, layers: PackedLayers) -> str:
    prepacked = any(isinstance(part, KernelLinear) for part in (head.linear, *layers.linears))
    kernels = f"packed ({packing.quantize or 'oneDNN'})" if prepacked else "packed"
    return kernels + packing.drafting + (", exact" if packing.exact else "")
