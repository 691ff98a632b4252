"""Weights in 8 and 4 bits: how they are rounded and stored, and linear layers on PyTorch's kernels for them.

int4 weights have groups of inputs with 16 levels each. They are rounded from a weight, or stored by a calibration as rows of
bytes: a byte tensor that takes the place of the weight until a kernel packs it. Its rows are reordered, joined and padded like
those of the weight; a row of zero bytes is a row of zeros.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.packing import Quantization
from ..errors import ConfigError

GROUP_SIZE = 32  # inputs that share a scale: 5 bits per weight, and a divisor of most widths
LEVELS = 16
_BYTES = GROUP_SIZE // 2 + 4  # of a group: two levels a byte, a scale and a lowest value in bf16
_MANY_ROWS = 16  # from here on the bf16 kernel, on levels converted for the call, is faster than int8's: 2.4 times at 64
_STEP = 16  # inputs per step of torch's int8 kernel, and outputs per step of the int4 kernel


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
        return _read(weight)
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


def _read(rows: Tensor) -> Int4:
    groups = rows.view(len(rows), -1, _BYTES)
    packed, factors = torch.split(groups, [GROUP_SIZE // 2, 4], dim=-1)
    scale, low = factors.contiguous().view(torch.bfloat16).float().unbind(-1)
    levels = torch.cat([packed & 15, packed >> 4], dim=-1).view(len(rows), -1)
    return Int4(levels, scale.contiguous(), low.contiguous())


def int8_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -127..127 (out, in), int8, and the size of a step, (out,): an output's largest magnitude / 127."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min_(1e-12).div_(127)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


class Int8Linear:
    """A linear layer with int8 weights, rounded to nearest, over rows that are rounded to bf16.

    Without AVX-512 PyTorch's kernels take ten times as long for fp32 rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape[1] % _STEP:  # torch's kernel reads past the end of such rows
            raise ConfigError(f"int8 weights need layer widths that {_STEP} divides, got {weight.shape[1]}")
        self._weight, scale = int8_levels(weight)
        self._scale = scale.to(torch.bfloat16)
        self._bias = None if bias is None else bias.detach()
        self._multiply: Callable[..., Tensor] = torch.ops.aten._weight_int8pack_mm.default

    def __call__(self, rows: Tensor) -> Tensor:
        """(rows, in) in any precision to (rows, out) in bf16, or in the precision of the bias."""
        rows = rows.to(torch.bfloat16)
        if len(rows) < _MANY_ROWS:
            product = self._multiply(rows, self._weight, self._scale)
        else:
            product = F.linear(rows, self._weight.to(torch.bfloat16)).mul_(self._scale)
        return product if self._bias is None else product + self._bias


class Int4Linear:
    """As Int8Linear, with int4 weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._outputs, inputs = len(weight), inputs_of(weight)
        if inputs % GROUP_SIZE:
            raise ConfigError(f"int4 weights need layer widths that the group size {GROUP_SIZE} divides, got {inputs}")
        levels, scale, low = int4_of(F.pad(weight, (0, 0, 0, -self._outputs % _STEP)))
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 2)
        zero = low + 8 * scale  # the kernel computes a weight as (level - 8) * scale + zero
        self._scale_and_zero = torch.stack([scale, zero], dim=-1).to(torch.bfloat16).transpose(0, 1).contiguous()
        self._bias = None if bias is None else bias.detach()
        self._multiply: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, rows: Tensor) -> Tensor:
        product = self._multiply(rows.to(torch.bfloat16), self._weight, GROUP_SIZE, self._scale_and_zero)
        product = product[:, : self._outputs]
        return product if self._bias is None else product + self._bias


def quantized(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Int8Linear | Int4Linear:
    """A low-bit linear layer of weight (out, in). Raises ConfigError if no kernel supports it."""
    if weight.device.type != "cpu":
        raise ConfigError(f"{quantization} weights need `device` cpu, got {weight.device.type}")
    if not _works(quantization):
        raise ConfigError(f"{quantization} weights need a kernel that torch {torch.__version__} does not have for this CPU")
    return Int8Linear(weight, bias) if quantization == "int8" else Int4Linear(weight, bias)


@cache
def _works(quantization: Quantization) -> bool:
    """Whether the kernel exists and is correct: weights that are levels must come out unchanged."""
    weight = (torch.arange(64 * 64).view(64, 64) * 7 % 16).float()
    weight[:, ::GROUP_SIZE], weight[:, 1::GROUP_SIZE] = 0, 15
    expected = weight.sum(1)
    try:
        layer = Int8Linear(weight, None) if quantization == "int8" else Int4Linear(weight, None)
        actual = layer(torch.ones(1, 64))[0].float()
    except (RuntimeError, AttributeError):
        return False
    return bool(((actual - expected).abs() <= 0.02 * expected).all())
