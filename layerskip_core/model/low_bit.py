"""Weights in 8 and 4 bits: how they are rounded and stored.

int4 weights have groups of inputs with 16 levels each. They are rounded from a weight, or stored by a calibration as rows of
bytes: a byte tensor that takes the place of the weight until a kernel packs it. Its rows are reordered, joined and padded like
those of the weight; a row of zero bytes is a row of zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 32  # inputs that share a scale: 5 bits per weight, and a divisor of most widths
LEVELS = 16
_BYTES = GROUP_SIZE // 2 + 4  # of a group: two levels a byte, a scale and a lowest value in bf16


class Int4(NamedTuple):
    """A weight in groups of inputs: level * scale + low. `scale` and `low` hold values of bf16, as the kernels have them."""

    levels: Tensor  # (out, in), uint8, 0..15
    scale: Tensor  # (out, groups), fp32
    low: Tensor  # (out, groups), fp32: the value of level 0

    @property
    def weight(self) -> Tensor:
        """(out, in), fp32."""
        groups = self.levels.view(*self.scale.shape, -1).float()
        return torch.addcmul(self.low[..., None], groups, self.scale[..., None]).flatten(1)


def named_int4(implementation: str, calibrated: bool) -> str:
    """How a model runs, as reports say it, with the kind of int4 where it has any."""
    return implementation.replace("int4", "calibrated int4") if calibrated else implementation


def is_stored(weight: Tensor) -> bool:
    """Whether a weight is rows of bytes."""
    return weight.dtype == torch.uint8


def inputs_of(weight: Tensor) -> int:
    """The width of the inputs of a weight (out, in), or of its rows of bytes."""
    return weight.shape[1] // _BYTES * GROUP_SIZE if is_stored(weight) else weight.shape[1]


def stored_shape(outputs: int, inputs: int) -> tuple[int, int]:
    """The shape of the rows of bytes of a weight (out, in)."""
    return outputs, inputs // GROUP_SIZE * _BYTES


def int4_of(weight: Tensor) -> Int4:
    """Rows of bytes as they are; a weight rounded to nearest, between the smallest and the largest of each group."""
    if is_stored(weight):
        packed, factors = torch.split(weight.view(len(weight), -1, _BYTES), [GROUP_SIZE // 2, 4], dim=-1)
        scale, low = factors.contiguous().view(torch.bfloat16).float().unbind(-1)
        levels = torch.cat([packed & 15, packed >> 4], dim=-1).view(len(weight), -1)
        return Int4(levels, scale.contiguous(), low.contiguous())
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / (LEVELS - 1)).clamp_min_(1e-12).bfloat16().float()
    low = low.bfloat16().float()
    levels = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, LEVELS - 1).to(torch.uint8)
    return Int4(levels.view_as(weight), scale, low)


def stored(weight: Int4) -> Tensor:
    """Rows of bytes, of `stored_shape`."""
    outputs, groups = weight.scale.shape
    halves = weight.levels.view(outputs, groups, 2, GROUP_SIZE // 2)
    factors = torch.stack([weight.scale, weight.low], dim=-1).to(torch.bfloat16).view(torch.uint8)
    return torch.cat([halves[:, :, 0] | halves[:, :, 1] << 4, factors], dim=-1).view(outputs, -1)


def int8_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -127..127 (out, in), int8, and the size of a step, (out,): an output's largest magnitude / 127."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min_(1e-12).div_(127)
    return (wide / scale[:, None]).round_().to(torch.int8), scale
