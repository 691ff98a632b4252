"""Weights as the kernels read them: in panels of 32 outputs, from front to back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.packing import Quantization
from ..int4 import GROUP_SIZE, inputs_of, is_stored
from .compiled import KINDS, CMatrix, Kernels

_PANEL = 32  # outputs
_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}  # of a weight


class NativeMatrix:
    """One matrix (out, in), or several of the same shape with alternating panels, and the C structure with their addresses.

    Panels, with scales where there are any (P: panels):
        fp32: (P, in, 32)
        bf16: (P, in / 2, 32, 2)
        int8: levels plus 128, (P, in / 4, 32, 4), and fp32 scales (P, 32)
        int4: two levels per byte, of inputs i and i + 16 of a group, (P, groups, 4, 32, 4), and the scale and the smallest
            value in bf16, (P, groups, 2, 32)
    """

    def __init__(
        self, kernels: Kernels, weights: list[Tensor], biases: list[Tensor] | None, quantization: Quantization | None
    ) -> None:
        """The group size must divide `in` for low-bit weights; for bf16 it must be even."""
        outputs, inputs = len(weights[0]), inputs_of(weights[0])
        kind = quantization or _kind_of(weights[0])
        panels = -(-outputs // _PANEL) * len(weights)
        self._weight = torch.empty(panels * _PANEL * inputs * _BITS[kind] // 8, dtype=torch.uint8)
        factors = {"int8": (torch.float32, 1), "int4": (torch.bfloat16, 2 * inputs // GROUP_SIZE)}.get(kind)  # by output
        self._scale = None if factors is None else torch.empty(panels * _PANEL * factors[1], dtype=factors[0])
        padded = [F.pad(bias.float(), (0, -outputs % _PANEL)).view(-1, _PANEL) for bias in biases or ()]
        self._bias = torch.stack(padded, dim=1) if padded else None
        self.inputs, self.outputs = inputs, outputs * len(weights)
        pointers = [None if part is None else part.data_ptr() for part in (self._weight, self._scale, self._bias)]
        self.structure = CMatrix(KINDS.index(kind), inputs, self.outputs, panels, *pointers)
        for index, weight in enumerate(weights):
            rows = weight.contiguous()
            source = KINDS.index(_kind_of(rows))
            kernels.pack(self.structure, rows.data_ptr(), source, outputs, index, len(weights), torch.get_num_threads())


def _kind_of(weight: Tensor) -> str:
    return "int4" if is_stored(weight) else "bf16" if weight.dtype == torch.bfloat16 else "fp32"
