"""`Backend` by the C kernels, where they were built and the CPU has the instructions that they need."""

from functools import partial

import torch
from torch import Tensor, nn

from ..config.packing import PackingConfig, Quantization
from .cache import KVCache
from .draft_vocabulary import DraftVocabulary
from .exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, with_blocks
from .low_bit import GROUP_SIZE, named_int4
from .native.compiled import ACTIVATIONS, MOST_ROPES, CShape, Kernels, kernels
from .native.draft import OneCallChoice, OneCallDraft
from .native.layers import BufferPool, NativeHead, NativeLayer, NativeLayers, NativeProduct, shape_of
from .native.matrix import Matrices, MatrixForm, Packer
from .repack import repack
from .rope import RopeTables
from .spans import run_in_parts, write_kv_in_parts
from .spec import EMBEDDING, ModelSpec
from .torch_backend import can_repack
from .torch_linear import Norm
from .weights import NormWeights, Projection, Take, Weights, checked, taken_from

_LARGEST_HEAD = 256


def can_run_native(spec: ModelSpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether kernels are here for every part of this architecture in this precision."""
    return suits_kernels(spec, dtype, device, packing) and kernels() is not None


def suits_kernels(spec: ModelSpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether the kernels, if there are any, support this architecture, its widths and this precision."""
    if not can_repack(spec) or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if spec.activation not in ACTIVATIONS or len(spec.ropes) > MOST_ROPES:
        return False
    low_bit = packing is not None and bool(packing.quantize or packing.draft_weights)
    divisor = GROUP_SIZE if low_bit else 2
    if spec.head_dim > _LARGEST_HEAD or spec.head_dim % 2:  # a bf16 cache keeps pairs of dimensions
        return False
    return not any(width % divisor for width in (spec.hidden, spec.inner, spec.queries))


class NativeBackend:
    """The operations and results of `TransformersBackend`, for inference only; hidden states are fp32 in every precision.

    The kernels are batch-invariant: without splitting calls, a token has the same bits alone as among others. Not for two
    threads at once.
    """

    exact = False  # calls need no splitting
    batch_invariant = True
    recordable = False

    def __init__(
        self,
        spec: ModelSpec,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
        matrices: Matrices | None = None,
    ) -> None:
        """Arguments and errors are those of `TorchBackend`, for an architecture that `can_run_native`.

        `matrices`: where the matrices and the embedding come from; None: they are packed from the weights that `take` gives.
        Otherwise it gives the norms, and what else `matrices` asks for.
        """
        packing = packing or PackingConfig()
        compiled = kernels()
        assert compiled is not None
        matrices = matrices or Packer(compiled)
        self.spec, self._chain_spec = spec, with_blocks(spec, exit_blocks.blocks)
        weights = Weights(checked(take, spec.shapes), spec.shapes)
        with torch.inference_mode():
            embedding = matrices.embedding(spec.shapes[EMBEDDING], lambda: weights.of(EMBEDDING))
            shape = shape_of(spec, embedding.dtype)
            pool = BufferPool(shape, any(spec.architecture.norms[1::2]))
            packer = _Packer(compiled, matrices, self._chain_spec, shape, pool, embedding.dtype)
            packed = repack(weights, embedding, spec, packing, token_order, packer, int4, exit_blocks)
            layers_of = partial(NativeLayers, compiled, shape, pool, spec, embedding, RopeTables(spec))
            self._layers, self._head = layers_of(packed.target.layers), packed.target.head
            self.chooser = OneCallChoice(self._layers, self._head) if self._head.is_plain else None
            self.exit_blocks, self.normed = packed.target.blocks, packed.normed

            def draft_kernel(layers: NativeLayers, head: NativeHead, own: bool) -> OneCallDraft:
                return OneCallDraft(layers, head, packed.vocabulary, runs_last=own)

            self.draft_sides = packed.draft_sides(self._layers, layers_of, draft_kernel)
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
        return cls(ModelSpec.of(model.config), taken_from(model), packing, token_order, int4, exit_blocks)

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        return KVCache.of(self._chain_spec, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self._layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self._layers, hidden, start, stop, positions, cache)

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        write_kv_in_parts(self._layers, hidden, start, stop, positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


class _Packer:
    """The `Packer` of the C kernels, for matrices that `matrices` gives."""

    def __init__(
        self, kernels: Kernels, matrices: Matrices, chain_spec: ModelSpec, shape: CShape, pool: BufferPool, dtype: torch.dtype
    ) -> None:
        self._kernels, self._matrices, self._spec, self._shape, self._pool = kernels, matrices, chain_spec, shape, pool
        self._unrounded = "bf16" if dtype == torch.bfloat16 else "fp32"

    def layer(self, weights: Weights, index: int, low_bits: Quantization | None, _: bool) -> NativeLayer:
        return NativeLayer(self._matrices, weights, self._spec, index, low_bits or self._unrounded)

    def head(
        self, norm: NormWeights, weights: Weights, rows: DraftVocabulary | None, low_bits: Quantization | None, _: bool
    ) -> NativeHead:
        form = MatrixForm(low_bits or self._unrounded, self._spec.hidden, self._spec.vocab)

        def read() -> list[Projection]:
            return [Projection(weights.of(self._spec.head_name), None)]

        matrices = self._matrices
        matrix = matrices.matrix("head", form, read) if rows is None else matrices.rows("head", form, read, rows)
        return NativeHead(NativeProduct(self._kernels, self._shape, self._pool, norm, matrix), self._spec)

    def join(self, weights: Weights, block: ExitBlock, low_bits: Quantization | None) -> NativeProduct:
        form = MatrixForm(low_bits or self._unrounded, 2 * self._spec.hidden, self._spec.hidden)
        name = block.input_name
        matrix = self._matrices.matrix(f"{block.prefix}input", form, lambda: [Projection(weights.of(name), None)])
        return NativeProduct(self._kernels, self._shape, self._pool, None, matrix)

    def norm(self, weights: NormWeights) -> Norm:
        """Of fp32 hidden states."""
        wide = NormWeights(weights.weight.float(), None if weights.bias is None else weights.bias.float())
        return Norm(wide, self._spec.eps, folds=False)
