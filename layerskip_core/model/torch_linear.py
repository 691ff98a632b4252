"""Linear layers and norms on PyTorch's kernels."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.model import Quantization
from ..errors import ConfigError
from .weights import GROUP_SIZE, Affine, inputs_of, int4_of, int8_levels

# Elements of an fp32 matrix from which oneDNN is faster at one row: a call costs 9 us
_PREPACKED_SIZE = 1 << 18
# OneDNN optimises its layout for this many rows: a round of speculation; good at one row too
_TYPICAL_ROWS = 8
_MOST_EXACT_ROWS = 8
_MANY_ROWS = 16  # from here the bf16 kernel on converted levels beats int8's: 2.4 times at 64
_STEP = 16  # inputs per step of torch's int8 kernel, and outputs per step of the int4 kernel

Multiply = Callable[[Tensor], Tensor]
"""(rows, in) to a new tensor (rows, out), perhaps in another precision."""


class PlainLinear:
    """A linear layer by torch.mm."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.t().contiguous()  # (in, out) is about 10% faster for one row in fp32
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: Tensor) -> Tensor:
        """(rows, in) to a new tensor (rows, out)."""
        if self._bias is None:
            return torch.mm(rows, self._weight)
        return torch.addmm(self._bias, rows, self._weight)

    def write(self, rows: Tensor, out: Tensor) -> None:
        """(rows, in) to `out` (rows, out), perhaps in another precision."""
        if out.dtype != rows.dtype:
            out.copy_(self(rows))
        elif self._bias is None:
            torch.mm(rows, self._weight, out=out)
        else:
            torch.addmm(self._bias, rows, self._weight, out=out)

    def add(self, rows: Tensor, residual: Tensor) -> None:
        """Adds the layer's output for (rows, in) to `residual` (rows, out)."""
        residual.addmm_(rows, self._weight)
        if self._bias is not None:
            residual.add_(self._bias)


class KernelLinear:
    """The operations of PlainLinear by a kernel."""

    def __init__(self, multiply: Multiply) -> None:
        self._multiply = multiply

    def __call__(self, rows: Tensor) -> Tensor:
        return self._multiply(rows).to(rows.dtype)

    def write(self, rows: Tensor, out: Tensor) -> None:
        out.copy_(self._multiply(rows))

    def add(self, rows: Tensor, residual: Tensor) -> None:
        residual.add_(self._multiply(rows))


Linear = PlainLinear | KernelLinear


def linear(
    weight: Tensor,
    bias: Tensor | None,
    quantization: Quantization | None = None,
    exact: bool = False,
) -> Linear:
    """A linear layer (out, in) by the best kernel for its device, precision and size.

    `exact`: prefers oneDNN's, which is batch-invariant. Raises ConfigError if no low-bit kernel
    supports the layer.
    """
    if quantization is not None:
        return KernelLinear(quantized(weight, bias, quantization))
    worthwhile = exact or weight.dtype == torch.bfloat16 or weight.numel() >= _PREPACKED_SIZE
    if weight.device.type == "cpu" and worthwhile and prepacks(weight.dtype):
        return KernelLinear(_one_dnn(weight, bias))
    return PlainLinear(weight, bias)


def _one_dnn(weight: Tensor, bias: Tensor | None) -> Multiply:
    """In oneDNN's blocked layout, which is nearly as fast for several rows as for one."""
    # Not every build of torch has it
    pointwise: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
    bias = None if bias is None else bias.detach()
    return lambda rows: pointwise(rows, packed, bias, "none", [], "")


@cache
def prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a prepacked kernel for this precision here: not on ARM, nor for bf16
    without AVX-512.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        _one_dnn(torch.zeros(16, 16, dtype=dtype), None)(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True


def quantized(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Multiply:
    """A low-bit linear layer (out, in). Rows are rounded to bf16, which is ten times as fast as
    fp32 without AVX-512; outputs are in bf16, or in the precision of the bias. Raises ConfigError
    if no kernel supports it.
    """
    if weight.device.type != "cpu":
        raise ConfigError(f"{quantization} weights need `device` cpu, got {weight.device.type}")
    if not _works(quantization):
        raise ConfigError(
            f"{quantization} weights need a kernel that torch {torch.__version__} does not have for this CPU"
        )
    multiply = _LOW_BIT[quantization](weight)
    if bias is None:
        return multiply
    added = bias.detach()
    return lambda rows: multiply(rows) + added


def _int8(weight: Tensor) -> Multiply:
    """Rounded to nearest."""
    if weight.shape[1] % _STEP:  # torch's kernel reads past the end of such rows
        raise ConfigError(
            f"int8 weights need layer widths that {_STEP} divides, got {weight.shape[1]}"
        )
    levels, scale = int8_levels(weight)
    scale = scale.to(torch.bfloat16)
    kernel: Callable[..., Tensor] = torch.ops.aten._weight_int8pack_mm.default

    def multiply(rows: Tensor) -> Tensor:
        rows = rows.to(torch.bfloat16)
        if len(rows) < _MANY_ROWS:
            return kernel(rows, levels, scale)
        return F.linear(rows, levels.to(torch.bfloat16)).mul_(scale)

    return multiply


def _int4(weight: Tensor) -> Multiply:
    """Rounded to nearest, or stored as rows of bytes."""
    outputs = len(weight)
    inputs = inputs_of(weight)
    if inputs % GROUP_SIZE:
        raise ConfigError(
            f"int4 weights need layer widths that the group size {GROUP_SIZE} divides, got {inputs}"
        )
    levels, scale, low = int4_of(F.pad(weight, (0, 0, 0, -outputs % _STEP)))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 2)
    zero = low + 8 * scale  # the kernel computes a weight as (level - 8) * scale + zero
    scale_and_zero = (
        torch.stack([scale, zero], dim=-1).to(torch.bfloat16).transpose(0, 1).contiguous()
    )
    kernel: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def multiply(rows: Tensor) -> Tensor:
        return kernel(rows.to(torch.bfloat16), packed, GROUP_SIZE, scale_and_zero)[:, :outputs]

    return multiply


_LOW_BIT: dict[Quantization, Callable[[Tensor], Multiply]] = {"int8": _int8, "int4": _int4}


@cache
def _works(quantization: Quantization) -> bool:
    """Whether the kernel exists and is correct, on weights that equal their levels."""
    weight = (torch.arange(64 * 64).view(64, 64) * 7 % 16).float()
    weight[:, ::GROUP_SIZE] = 0
    weight[:, 1::GROUP_SIZE] = 15
    expected = weight.sum(1)
    try:
        actual = _LOW_BIT[quantization](weight)(torch.ones(1, 64))[0].float()
    except (RuntimeError, AttributeError):
        return False
    return bool(((actual - expected).abs() <= 0.02 * expected).all())


def exact_rows(known: dict[int, int], same_alone: Callable[[int], bool]) -> int:
    """The most rows for which a kernel is batch-invariant, measured once per number of threads.

    `known`: earlier measurements. `same_alone(n)`: whether n rows together have the results of each
    alone.
    """
    threads = torch.get_num_threads()
    if threads not in known:
        rows = 1
        while rows < _MOST_EXACT_ROWS and same_alone(rows + 1):
            rows += 1
        known[threads] = rows
    return known[threads]


class Norm:
    """RMSNorm over the last dimension, or LayerNorm if there is a bias. On the CPU torch.rms_norm
    takes some eight passes.

    If it `folds` (fp32, fp64), the next linear layer includes the weight, and three passes remain.
    Otherwise (in bf16 folding would round the layer's weights again) layer_norm is one pass, over a
    row and its negative: their mean is 0, their mean square the row's.
    """

    def __init__(self, weights: Affine, eps: float, folds: bool = False) -> None:
        self._weight = weights.weight
        self._bias = weights.bias
        self._eps = eps
        size = self._weight.numel()
        self._on_cpu = self._weight.device.type == "cpu"
        self._folds = self._on_cpu and folds and self._bias is None
        self._twice = torch.cat((self._weight, self._weight))
        self._floor = self._weight.new_tensor(math.sqrt(size * eps))

    def folded_into(self, weight: Tensor) -> Tensor:
        """The `weight` (out, D) of the linear layer after this norm, times the norm's own if it
        folds.
        """
        if not self._folds:
            return weight
        return weight * (self._weight * math.sqrt(self._weight.numel()))

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if self._folds:
            # sqrt(mean(x^2) + eps) is hypot(|x|, sqrt(D eps)) / sqrt(D)
            length: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return hidden / length.hypot_(self._floor)
        wide = hidden
        if not self._on_cpu:
            wide = hidden.to(self._weight.dtype)  # CUDA kernels take one precision
        shape = self._weight.shape
        if self._bias is not None:
            normed = F.layer_norm(wide, shape, self._weight, self._bias, self._eps)
            return normed.to(hidden.dtype)
        if not self._on_cpu:
            return torch.rms_norm(wide, shape, self._weight, self._eps).to(hidden.dtype)
        both: Tensor = torch.layer_norm(
            torch.cat((hidden, -hidden), dim=-1), self._twice.shape, self._twice, None, self._eps
        )
        return both[..., : self._weight.numel()].contiguous()


class SlotNorm:
    """RMSNorm of queries and keys, over each head or over all heads, in place over (B, T, kv heads,
    G+1, head dim).
    """

    def __init__(self, weights: Tensor, eps: float, per_head: bool, scale: float = 1.0) -> None:
        """`weights` (kv heads, G+1, head dim). `scale`: a factor of the queries, which the norm
        preserves.
        """
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        self._groups = weights.shape[1] - 1
        self._per_head = per_head
        self._scales: list[Tensor] = []
        self._floors: list[Tensor] = []
        if per_head:
            kept = wide.new_tensor([scale] * self._groups + [1.0])[:, None]
            self._add(wide, wide.shape[-1], eps, kept)
        else:
            for part in torch.split(wide, [self._groups, 1], dim=1):
                self._add(part, part.numel(), eps, wide.new_tensor(1.0))

    def _add(self, weights: Tensor, size: int, eps: float, kept: Tensor) -> None:
        """`size`: numbers that are normed together. `kept`: the factor that the norm preserves."""
        self._scales.append(weights * math.sqrt(size) * kept)
        self._floors.append(weights.new_tensor(math.sqrt(size * eps)) * kept)

    def apply_(self, slots: Tensor) -> None:
        parts: Sequence[Tensor] = [slots]
        dims: tuple[int, ...] = (-1,)
        if not self._per_head:
            parts = torch.split(slots, [self._groups, 1], dim=-2)
            dims = (-3, -2, -1)
        for part, scale, floor in zip(parts, self._scales, self._floors, strict=True):
            length = torch.linalg.vector_norm(part, dim=dims, keepdim=True).hypot_(floor)
            part.div_(length).mul_(scale)
