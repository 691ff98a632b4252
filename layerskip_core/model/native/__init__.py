"""`Backend` by the C kernels, where they were built and the CPU has the instructions that they need."""

from collections.abc import Sequence
from functools import partial
from math import frexp
from typing import Any

import torch
from torch import Tensor

from ...config.model import PackingConfig, Quantization
from ..backend import DraftKernel
from ..cache import KVCache, Places
from ..configuration import SLIDING
from ..eagle3 import Eagle3Weights
from ..pages import PAGE, PagePool
from ..repacked import RepackedBackend
from ..spec import ModelSpec
from ..torch_layer import missing_feature
from ..torch_linear import Norm
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, Take, Weights, head_weights
from .compiled import MOST_ROPES, kernels
from .eagle3 import NativeEagle3
from .heads import NativeLinear, choose, draft
from .layers import KEPT_ROWS, Engine, NativeLayer, NativeLayers
from .matrix import PANEL, HugePages, MatrixForm, NativeMatrix, PackMatrix
from .recurrence import LARGEST_KEY, MOST_TAPS, memory_of

_LARGEST_HEAD = 256
# of AVX2 and NEON, on two cores
_ROW_COSTS = {"fp32": 0.15, "bf16": 0.25, "widened": 0.25, "int8": 0.3, "int4": 0.3, "stored": 0.4}


def can_run_native(spec: ModelSpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether kernels are here for every part of this architecture in this precision."""
    return suits_kernels(spec, dtype, device, packing) and kernels() is not None


def suits_kernels(spec: ModelSpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether the kernels, if there are any, support this architecture, its widths and this precision."""
    if missing_feature(spec, recurrent=True) is not None or not spec.attending:
        return False
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if len(spec.ropes) > MOST_ROPES or (spec.experts is not None and not spec.experts.are_equal):
        return False
    low_bit = packing is not None and bool(packing.quantize or packing.draft_weights)
    divisor = GROUP_SIZE if low_bit else 2
    if spec.head_dim > _LARGEST_HEAD or spec.head_dim % 2:  # a bf16 cache keeps pairs of dimensions
        return False
    widths = [spec.hidden, spec.inner, spec.experts.inner if spec.experts else spec.inner, spec.queries]
    if (recurrence := spec.recurrence) is not None:
        if recurrence.taps > MOST_TAPS or recurrence.key_dim > LARGEST_KEY:
            return False
        widths.append(recurrence.outputs)
    return not any(width % divisor for width in widths)


class NativeBackend(RepackedBackend):
    """Repacked weights on the C kernels, for an architecture that they `can_run`; hidden states are fp32 in every precision.

    The kernels are batch-invariant: without splitting calls, a token has the same bits alone as among others.
    """

    batch_invariant = True

    def __init__(self, spec: ModelSpec, take: Take, *arguments: Any, pack: PackMatrix | None = None, **options: Any) -> None:
        """As `RepackedBackend`. `pack`: gives the matrices instead of packing them from weights in memory."""
        compiled = kernels()
        assert compiled is not None
        packed = partial(NativeMatrix.packed, compiled, empty=HugePages().empty, narrows=compiled.widens_bf16)
        self._kernels, self._packed, self._pack = compiled, packed, pack or packed
        super().__init__(spec, take, *arguments, **options)
        if not compiled.has_cheap_rows:  # more cores have more arithmetic, and the memory of two
            self.row_cost = _ROW_COSTS[self._head.matrix.form.kind] * 2 / max(torch.get_num_threads(), 2)
        # Rounding may make two logits equal, but not where it divides by a power of two.
        self._is_plain = frexp(spec.logits_divisor)[0] == 0.5 and spec.logits_cap is None

    @property
    def room(self) -> int:
        return int(min(self.spec.context, max(0, self._pool.most - self._pool.pages_of_memory(KVCache.steps_back)) * PAGE))

    @property
    def bytes_per_weight(self) -> float:
        """On average over the layers and the head, with scales and biases."""
        assert isinstance(self._layers, NativeLayers)
        matrices: list[NativeMatrix] = [
            self._head.matrix,
            *(matrix for layer in self._layers.layers for matrix in layer.matrices),
        ]
        held = sum(part.nbytes for matrix in matrices for part in matrix.parts.values())
        return held / sum(matrix.form.panels * PANEL * matrix.form.inputs for matrix in matrices)

    def choose(
        self, tokens: Tensor, states: Tensor | None, start: int, stop: int, kept: Sequence[int], places: Places
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if not self._is_plain or len(tokens) > KEPT_ROWS:
            return super().choose(tokens, states, start, stop, kept, places)
        assert isinstance(self._layers, NativeLayers)
        return choose(self._layers, self._head, tokens, states, start, stop, kept, places)

    def limit_memory(self, kv_bytes: int) -> None:
        """At most so many bytes for keys and values, from now on; a draft model has room for as many tokens."""
        pools = [model._pool for model in (self, self.draft_model) if isinstance(model, NativeBackend)]
        pages = kv_bytes // sum(pool.page_bytes for pool in pools)
        for pool in pools:
            pool.most = pages

    def _prepare(self, packing: PackingConfig) -> None:
        self._unrounded = "bf16" if self._embedding.dtype == torch.bfloat16 else "fp32"
        self._engine, spec = Engine(self._kernels, self.spec, self._embedding.dtype), self._chain_spec
        shape, slides = (len(spec.attending), spec.kv_heads, spec.head_dim), {*spec.kinds} == {SLIDING}
        self._pool = PagePool(shape, self._embedding.dtype, memory_of(spec), spec.window if slides else None)

    def _described(self, packing: PackingConfig) -> str:
        precision = packing.quantize or ("as stored" if self._stored else None)
        return f"native ({', '.join(filter(None, (self._kernels.variant, precision)))}){packing.drafting}"

    def _layer(self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool) -> NativeLayer:
        return NativeLayer(self._pack, weights, self._chain_spec, index, low_bits or self._unrounded)

    def _head_of(
        self, norm: Affine, weights: Weights, rows: DraftVocabulary | None, low_bits: Quantization | None, exact: bool
    ) -> NativeLinear:
        spec = self.spec
        form = MatrixForm(low_bits or self._unrounded, spec.hidden, spec.vocab, biased=spec.architecture.head_bias)
        matrix = self._pack("head", form, lambda: [head_weights(weights, spec)])
        return NativeLinear(self._engine, matrix if rows is None else matrix.rows_of(rows), norm, spec)

    def placed_eagle3(self, stored: Eagle3Weights, place: int, packing: PackingConfig) -> NativeEagle3:
        own, self._pool.window = (self._chain_spec, self._embedding, self._pool), None  # it sees the whole text
        return NativeEagle3(self._kernels, self._packed, stored, *own, place, packing.drafter)

    def _norm(self, weights: Affine) -> Norm:
        """Of fp32 hidden states."""
        return Norm(Affine(weights.weight.float(), None if weights.bias is None else weights.bias.float()), self.spec.eps)

    def _layers_of(self, layers: list[NativeLayer | None], exact: bool) -> NativeLayers:
        return NativeLayers(self._engine, self._chain_spec, self._embedding, self._learned, layers, self._pool)

    def _draft_kernel(self, layers: NativeLayers) -> DraftKernel:
        return partial(draft, layers, self.spec)
