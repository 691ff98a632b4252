"""Weight-only int8 and int4 linear layers by torch's kernels. Weights are rounded to the nearest level, inputs to bf16.

An int4 weight may also be rows of bytes that a calibration stored, see int4.py.

The kernels take fp32 inputs too, but without AVX-512 they are then ten times as slow. The layers around them keep their own
precision.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.packing import Quantization
from ..errors import ConfigError
from .int4 import GROUP_SIZE, inputs_of, int4_of

_MANY_ROWS = 16  # from here on the bf16 kernel, on levels converted for the call, is faster than int8's: 2.4 times at 64
_STEP = 16  # inputs per step of torch's int8 kernel, and outputs per step of the int4 kernel


class Int8Linear:
    """Each output has one scale, its largest magnitude / 127; its weights are multiples of it, in 8 bits."""

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
    """Each group of an output's inputs has 16 levels, from its smallest to its largest weight."""

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
        """As Int8Linear."""
        product = self._multiply(rows.to(torch.bfloat16), self._weight, GROUP_SIZE, self._scale_and_zero)
        product = product[:, : self._outputs]
        return product if self._bias is None else product + self._bias


def int8_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -127..127 (out, in), int8, and the size of a step, (out,)."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min_(1e-12).div_(127)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


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
