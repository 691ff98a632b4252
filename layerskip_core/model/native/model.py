"""`Backend` by the C kernels, where they were built and the CPU has the instructions that they need."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...config.packing import PackingConfig, Quantization
from ..backend import DraftSide
from ..cache import KVCache
from ..draft_vocabulary import DraftVocabulary
from ..drafting import LayeredDraftSide
from ..exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, PlacedBlock, with_blocks
from ..int4 import GROUP_SIZE, named_int4
from ..layer_weights import NormWeights, Projection
from ..packed.layer import Norm
from ..packed.model import can_pack
from ..repack import Chain, repack, taken_from
from ..rope import RopeTables
from ..spec import EMBEDDING, ModelSpec
from ..splitting import propagate_in_parts, run_in_parts
from ..weights import Take, Weights, checked
from .buffers import BufferPool, shape_of
from .choice import OneCallChoice
from .compiled import ACTIVATIONS, MOST_ROPES, kernels
from .draft import OneCallDraft
from .head import NativeHead, NativeProduct
from .layer import NativeLayer
from .matrix import Matrices, MatrixForm, Packer
from .span import NativeLayers

_LARGEST_HEAD = 256


def can_run_native(config: object, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether kernels are here for every part of this architecture in this precision."""
    return suits_kernels(config, dtype, device, packing) and kernels() is not None


def suits_kernels(config: object, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether the kernels, if there are any, support this architecture, its widths and this precision."""
    if not can_pack(config) or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    spec = ModelSpec.of(config)
    if spec.activation not in ACTIVATIONS or len(spec.ropes) > MOST_ROPES:
        return False
    low_bit = packing is not None and bool(packing.quantize or packing.draft_weights)
    divisor = GROUP_SIZE if low_bit else 2
    if spec.head_dim > _LARGEST_HEAD or spec.head_dim % 2:  # a bf16 cache keeps pairs of dimensions
        return False
    return not any(width % divisor for width in (spec.hidden, spec.inner, spec.queries))


class NativeBackend:
    """The operations and results of `GenericBackend`, for inference only; hidden states are fp32 in every precision.

    The kernels are batch-invariant: without splitting calls, a token has the same bits alone as among others. Not for two
    threads at once.
    """

    exact = False  # calls need no splitting
    batch_invariant = True
    recordable = False

    def __init__(
        self,
        config: object,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
        matrices: Matrices | None = None,
    ) -> None:
        """Arguments and errors are those of `PackedBackend`, for an architecture that `can_run_native`.

        `matrices`: where the matrices and the embedding come from; None: they are packed from the weights that `take` gives.
        Otherwise it gives the norms, and what else `matrices` asks for.
        """
        packing = packing or PackingConfig()
        compiled = kernels()
        assert compiled is not None
        matrices = matrices or Packer(compiled)
        spec = self.spec = ModelSpec.of(config)
        chain_spec = self._chain_spec = with_blocks(spec, exit_blocks.blocks)
        weights = Weights(checked(take, spec.shapes), spec.shapes)
        with torch.inference_mode():
            embedding = matrices.embedding(spec.shapes[EMBEDDING], lambda: weights.of(EMBEDDING))
            shape = shape_of(spec, embedding.dtype)
            pool = BufferPool(shape, spec.norms_blocks)
            unrounded = "bf16" if embedding.dtype == torch.bfloat16 else "fp32"

            def pack_layer(weights: Weights, index: int, quantization: Quantization | None, _: bool) -> NativeLayer:
                return NativeLayer(matrices, weights, chain_spec, index, quantization or unrounded)

            def pack_head(
                norm: NormWeights, weights: Weights, rows: DraftVocabulary | None, quantization: Quantization | None, _: bool
            ) -> NativeHead:
                form = MatrixForm(quantization or unrounded, spec.hidden, spec.vocab)

                def read() -> list[Projection]:
                    return [Projection(weights.of(spec.head_name), None)]

                matrix = matrices.matrix("head", form, read) if rows is None else matrices.rows("head", form, read, rows)
                return NativeHead(NativeProduct(compiled, shape, pool, norm, matrix), spec)

            def pack_join(weights: Weights, block: ExitBlock, quantization: Quantization | None) -> NativeProduct:
                form = MatrixForm(quantization or unrounded, 2 * spec.hidden, spec.hidden)
                matrix = matrices.matrix(f"{block.prefix}input", form, lambda: [Projection(weights.of(block.input_name), None)])
                return NativeProduct(compiled, shape, pool, None, matrix)

            packed = repack(weights, embedding, spec, packing, token_order, pack_layer, pack_head, pack_join, int4, exit_blocks)
            layers_of = partial(NativeLayers, compiled, shape, pool, spec, embedding, RopeTables(config, spec))
            self._layers, self._head = layers_of(packed.target.layers), packed.target.head
            self.chooser = OneCallChoice(self._layers, self._head) if self._head.is_plain else None
            self.exit_blocks = _placed(packed.target, spec)
            self.normed = _norm(packed.norm, spec)
            self.draft_sides: Mapping[Quantization | None, DraftSide] = {
                None: _draft_side(self._layers, spec.layers, packed.drafts, spec, packed.vocabulary, True),
                **{
                    kind: _draft_side(layers_of(chain.layers), packed.copied, chain, spec, packed.vocabulary, False)
                    for kind, chain in packed.copies.items()
                },
            }
        kinds = ", ".join(filter(None, (compiled.variant, packing.quantize)))
        self.implementation = named_int4(f"native ({kinds}){packing.drafting}", int4 is not None)
        self.num_layers, self.hidden_size, self.vocab_size = spec.layers, spec.hidden, spec.vocab
        self.max_positions, self.device, self.dtype = spec.context, embedding.device, embedding.dtype

    @classmethod
    def of(
        cls,
        model: nn.Module,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
    ) -> "NativeBackend":
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


_NativeChain = Chain[NativeLayer, NativeHead, NativeProduct]


def _draft_side(
    layers: NativeLayers,
    num_layers: int,
    chain: _NativeChain,
    spec: ModelSpec,
    vocabulary: DraftVocabulary | None,
    shares_states: bool,
) -> DraftSide:
    """`shares_states`: the layers are the target's own, so that it goes on from the states of all drafts."""
    kernel = OneCallDraft(layers, chain.head, vocabulary, shares_states, chain.blocks)
    return LayeredDraftSide(layers, num_layers, chain.head, _placed(chain, spec), vocabulary, shares_states, kernel)


def _placed(chain: _NativeChain, spec: ModelSpec) -> dict[int, PlacedBlock]:
    """The chain's blocks, by their exits."""
    return {
        ends.block.exit_layer: PlacedBlock(ends.block, place, ends.head, _norm(ends.norm, spec), ends.join)
        for place, ends in chain.blocks.items()
    }


def _norm(norm: NormWeights, spec: ModelSpec) -> Norm:
    """Of fp32 hidden states."""
    wide = NormWeights(norm.weight.float(), None if norm.bias is None else norm.bias.float())
    return Norm(wide, spec.eps, folds=False)
