"""Weights as the kernels read them: in panels of 32 outputs, from front to back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.packing import Quantization
from ..int4 import GROUP_SIZE, inputs_of, int4_of
from ..quantized import int8_levels
from .compiled import KINDS, CMatrix

_PANEL = 32  # outputs


class NativeMatrix:
    """One matrix (out, in), or several of the same shape with alternating panels, and the C structure with their addresses."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor] | None, quantization: Quantization | None) -> None:
        """The group size must divide `in` for low-bit weights; for bf16 it must be even."""
        outputs, inputs = len(weights[0]), inputs_of(weights[0])
        kind = quantization or ("bf16" if weights[0].dtype == torch.bfloat16 else "fp32")
        packed = [_PACK[kind](F.pad(weight, (0, 0, 0, -outputs % _PANEL))) for weight in weights]
        self._weight = _alternating([weight for weight, _ in packed])
        scales = [scale for _, scale in packed if scale is not None]
        self._scale = _alternating(scales) if scales else None
        padded = [F.pad(bias.float(), (0, -outputs % _PANEL)).view(-1, _PANEL) for bias in biases or ()]
        self._bias = _alternating(padded) if padded else None
        self.inputs, self.outputs = inputs, outputs * len(weights)
        pointers = [None if part is None else part.data_ptr() for part in (self._weight, self._scale, self._bias)]
        self.structure = CMatrix(KINDS.index(kind), inputs, self.outputs, len(self._weight), *pointers)


def _alternating(parts: list[Tensor]) -> Tensor:
    """Panels (P, ...) of the parts, interleaved."""
    return torch.stack(parts, dim=1).flatten(0, 1).contiguous()


def _fp32(weight: Tensor) -> tuple[Tensor, None]:
    """(P, in, 32)."""
    return weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2).contiguous(), None


def _bf16(weight: Tensor) -> tuple[Tensor, None]:
    """(P, in / 2, 32, 2)."""
    return weight.view(-1, _PANEL, weight.shape[1] // 2, 2).transpose(1, 2).contiguous(), None


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels plus 128, (P, in / 4, 32, 4), and fp32 scales (P, 32)."""
    levels, scale = int8_levels(weight)
    unsigned = levels.to(torch.int16).add_(128).to(torch.uint8)
    return unsigned.view(-1, _PANEL, weight.shape[1] // 4, 4).transpose(1, 2).contiguous(), scale.view(-1, _PANEL)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two levels per byte, of inputs i and i + 16 of a group, (P, groups, 4, 32, 4); scale and smallest, (P, groups, 2, 32)."""
    levels, scale, low = int4_of(weight)
    groups = levels.shape[1] // GROUP_SIZE
    quads = levels.view(-1, _PANEL, groups, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)  # (2, P, groups, 4, 32, 4)
    factors = torch.stack([scale, low]).to(torch.bfloat16).view(2, -1, _PANEL, groups).permute(1, 3, 0, 2)
    return (quads[0] | quads[1] << 4).contiguous(), factors.contiguous()


_PACK = {"fp32": _fp32, "bf16": _bf16, "int8": _int8, "int4": _int4}
