"""Low-bit weights as hub checkpoints store them: GPTQ, AWQ, compressed-tensors, MXFP4 and FP8."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.blocks import BlockRows, block_rows

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which level of an int32 each of eight outputs has


class Levels(NamedTuple):
    """A weight (level - zero) * scale, with zeros and scales by group of inputs."""

    levels: Tensor  # (out, in), int32
    zero: Tensor  # (out, groups), int32
    scale: Tensor  # (out, groups)
    bits: int
    groups: Tensor | None = None  # (in,): each input's group, if stored

    @property
    def ordered(self) -> Tensor:
        """The default of `groups`: consecutive inputs share a group."""
        return torch.arange(self.levels.shape[1]) // (self.levels.shape[1] // self.scale.shape[1])

    @property
    def weight(self) -> Tensor:
        """(out, in), fp32."""
        groups = self.ordered if self.groups is None else self.groups
        return (self.levels - self.zero[:, groups]) * self.scale.float()[:, groups]

    @property
    def rows(self) -> BlockRows | None:
        """As rows of blocks; None if these cannot hold its scales, groups or zeros."""
        outputs, inputs = self.levels.shape
        half = self.scale.half()
        size = inputs // self.scale.shape[1]
        middle = bool((self.zero == 1 << self.bits - 1).all())
        if size % 32 or not half.float().equal(self.scale.float()):
            return None
        if self.bits != 4 and not (self.bits == 8 and middle):
            return None
        if self.groups is not None and not self.groups.equal(self.ordered.to(self.groups)):
            return None
        parts = [half.flatten().view(torch.uint8).view(outputs, -1, 2)]
        if not middle:
            parts.append(self.zero.to(torch.uint8)[..., None])
        factors = torch.cat(parts, -1).repeat_interleave(size // 32, 1)
        levels = self.levels.to(torch.uint8).view(outputs, -1, 32)
        if self.bits == 8:
            return block_rows(torch.cat([factors, levels ^ 128], -1).flatten(1), "Q8_0")
        halves = levels[..., :16] | levels[..., 16:] << 4
        kind = "Q4_0" if middle else "Q4_Z"
        return block_rows(torch.cat([factors, halves], -1).flatten(1), kind)


def mxfp4_rows(blocks: Tensor, scales: Tensor) -> BlockRows:
    """From levels (..., out, groups, 16), two neighbouring inputs per byte, and exponents (...,
    out, groups).
    """
    levels = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    halves = levels[..., :16] | levels[..., 16:] << 4
    return block_rows(torch.cat([scales[..., None], halves], -1).flatten(-2), "MXFP4")


def unpacked(numbers: Tensor, bits: int) -> Tensor:
    """Unpacks levels from int32 (rows, columns) to (rows, columns * 32 / bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (numbers[..., None] >> shifts & (1 << bits) - 1).flatten(1)


def levels_of(get: Callable[..., Any], least: int) -> Levels | None:
    """A low-bit projection; None if it is not low-bit. `get(suffix)`: the tensor with this end of
    its name, raises if missing; `get(suffix, False)`: None if missing. `least`: added to GPTQ's
    zeros.
    """
    packed = get(".qweight", False)
    if packed is not None:
        return _gptq_or_awq(get, packed, least)
    return _compressed_tensors(get)


def _gptq_or_awq(get: Callable[..., Any], packed: Tensor, least: int) -> Levels:
    """Scales are (groups, out), zeros (groups, out / n), levels (in / n, out) in GPTQ, (in, out /
    8) in AWQ.
    """
    scale = get(".scales").T.contiguous()
    zeros = get(".qzeros")
    bits = 32 * zeros.shape[1] // len(scale)
    if packed.shape[1] < len(scale):
        levels = _awq_unpacked(packed).T
        zero = _awq_unpacked(zeros).T
    else:
        levels = unpacked(packed.T.contiguous(), bits)
        zero = (unpacked(zeros, bits) + least).T
    return Levels(levels.contiguous(), zero.contiguous(), scale, bits, get(".g_idx", False))


def _awq_unpacked(numbers: Tensor) -> Tensor:
    return unpacked(numbers, 4).view(len(numbers), -1, 8)[..., _AWQ_ORDER].flatten(1)


def _compressed_tensors(get: Callable[..., Any]) -> Levels | None:
    """Levels are (out, in / n) or int8 (out, in), scales (out, groups or 1), and zeros (out / n,
    groups), or signed by group, or none.
    """
    packed = get(".weight_packed", False)
    whole = get(".weight", False)
    if packed is not None:
        inputs = int(get(".weight_shape")[1])
        bits = 32 * packed.shape[1] // inputs
        levels = unpacked(packed, bits)[:, :inputs]
    elif whole is not None and whole.dtype == torch.int8:
        bits = 8
        levels = whole.int() + 128
    else:
        return None
    scale = get(".weight_scale")
    zeros = get(".weight_zero_point", False)
    if zeros is not None and zeros.dtype == torch.int32:
        zero = unpacked(zeros.T.contiguous(), bits).T[: len(scale)].contiguous()
    else:
        zero = torch.full_like(scale, 1 << bits - 1, dtype=torch.int32)
        if zeros is not None:
            zero = zero + zeros
    return Levels(levels, zero, scale, bits, get(".weight_g_idx", False))


def scaled_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Dequantises FP8 (out, in) to fp32, with scales by block, by row or for the whole tensor."""
    wide = scale.float()
    if wide.dim() < 2:
        wide = wide.view(-1, 1)
    for dimension, size in enumerate(weight.shape):
        each = -(-size // wide.shape[dimension])
        wide = wide.repeat_interleave(each, dimension).narrow(dimension, 0, size)
    return weight.float() * wide
