"""Linear layers of the packed model: prepacked by oneDNN where that is faster and works, else plain."""

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

_PREPACKED_SIZE = 1 << 18  # elements; calling oneDNN costs 9 us, which a smaller fp32 matrix does not win back at one row
_TYPICAL_ROWS = 8  # the row count that oneDNN chooses the layout for: a round of speculation, and good at one row too


class Linear(Protocol):
    def __call__(self, rows: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """residual (rows, out) plus the layer's output, as one operation."""


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.t().contiguous()  # (in, out): some 10% faster than (out, in) for one row in fp32
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.mm(rows, self._weight) if self._bias is None else torch.addmm(self._bias, rows, self._weight)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        added = torch.addmm(residual, rows, self._weight)
        return added if self._bias is None else added.add_(self._bias)


class OneDnnLinear:
    """In oneDNN's blocked layout: near the memory limit, and nearly as fast for several rows as for one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # Looked up here, since not every build of torch has it.
        self._pointwise: Any = torch.ops.mkldnn._linear_pointwise
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, rows: Tensor) -> Tensor:
        return self._pointwise.default(rows, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return self._pointwise.binary(rows, residual, self._weight, self._bias, "add")  # type: ignore[no-any-return]


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear layer (out, in) by the best kernel for its device, precision and size."""
    large = weight.dtype == torch.bfloat16 or weight.numel() >= _PREPACKED_SIZE
    if weight.device.type == "cpu" and large and prepacks(weight.dtype):
        return OneDnnLinear(weight, bias)
    return PlainLinear(weight, bias)


@cache
def prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a prepacked kernel for this precision here: none for fp64, on ARM, for bf16 without AVX-512."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        OneDnnLinear(torch.zeros(16, 16, dtype=dtype), None)(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True
