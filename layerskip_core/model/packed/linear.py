"""Linear layers of the packed backend: low-bit if configured, prepacked by oneDNN where that is faster, else plain."""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ...config.packing import Quantization
from ..quantized import quantized

_PREPACKED_SIZE = 1 << 18  # elements; a call of oneDNN costs 9 us, which a smaller fp32 matrix does not regain at one row
_TYPICAL_ROWS = 8  # oneDNN chooses its layout for this row count: a round of speculation, and good at one row too


class Head(Protocol):
    def __call__(self, rows: Tensor) -> Tensor:
        """(rows, in) to a new tensor (rows, out)."""


class Linear(Head, Protocol):
    def write(self, rows: Tensor, out: Tensor) -> None:
        """(rows, in) to `out` (rows, out), which may have another precision."""

    def add(self, rows: Tensor, residual: Tensor) -> None:
        """Adds the layer's output for (rows, in) to `residual` (rows, out)."""


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.t().contiguous()  # (in, out) is about 10% faster than (out, in) for one row in fp32
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.mm(rows, self._weight) if self._bias is None else torch.addmm(self._bias, rows, self._weight)

    def write(self, rows: Tensor, out: Tensor) -> None:
        if out.dtype != rows.dtype:
            out.copy_(self(rows))
        elif self._bias is None:
            torch.mm(rows, self._weight, out=out)
        else:
            torch.addmm(self._bias, rows, self._weight, out=out)

    def add(self, rows: Tensor, residual: Tensor) -> None:
        residual.addmm_(rows, self._weight)
        if self._bias is not None:
            residual.add_(self._bias)


class KernelLinear:
    """A layer whose kernel, `multiply`, returns a new tensor, whose precision may differ from that of the rows."""

    def __init__(self, multiply: Callable[[Tensor], Tensor]) -> None:
        self._multiply = multiply

    def __call__(self, rows: Tensor) -> Tensor:
        return self._multiply(rows).to(rows.dtype)

    def write(self, rows: Tensor, out: Tensor) -> None:
        out.copy_(self._multiply(rows))

    def add(self, rows: Tensor, residual: Tensor) -> None:
        residual.add_(self._multiply(rows))


def linear(weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None, exact: bool = False) -> Linear:
    """A linear layer (out, in) by the best kernel for its device, precision and size.

    `exact` prefers a batch-invariant kernel, oneDNN's, at any size. Raises ConfigError if no low-bit kernel supports the layer.
    """
    if quantization is not None:
        return KernelLinear(quantized(weight, bias, quantization))
    worthwhile = exact or weight.dtype == torch.bfloat16 or weight.numel() >= _PREPACKED_SIZE
    if weight.device.type == "cpu" and worthwhile and prepacks(weight.dtype):
        return KernelLinear(_OneDnn(weight, bias))
    return PlainLinear(weight, bias)


class _OneDnn:
    """In oneDNN's blocked layout: bound by memory, and nearly as fast for several rows as for one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # Looked up here, because not every build of torch has it.
        self._pointwise: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: Tensor) -> Tensor:
        return self._pointwise(rows, self._weight, self._bias, "none", [], "")


@cache
def prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a prepacked kernel for this precision here: not for fp64, on ARM, or for bf16 without AVX-512."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        _OneDnn(torch.zeros(16, 16, dtype=dtype), None)(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True
