"""Weights as GGUF files store them: rows of blocks, kept unchanged until a kernel packs them.

A block has levels and fp16 scales. A weight is (level - offset) * scale, plus a minimum in some
types. In K types the scale and the minimum of a group are its steps times those of the block. In
MXFP4 levels index a table, and scales are powers of two.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .spec import ModelSpec


class BlockForm(NamedTuple):
    """A type of blocks (see StoredPanel in kernels.c)."""

    code: int  # in pack.c
    inputs: int
    bytes: int
    bits: int
    offset: int  # of levels; 0: the type has minima; -1: stored in the byte after the scale
    scales_at: int = 0  # where the fp16 scale begins; the minimum follows it
    by_table: bool = False  # MXFP4: the first byte is the exponent of the scale

    @property
    def factors(self) -> int:
        """How many fp16 factors a block has: a scale, and perhaps a minimum."""
        return 1 if self.offset else 2

    @property
    def step_inputs(self) -> int:
        """Inputs that share a step; 0: the type has no steps."""
        if self.inputs == 32 and not self.by_table and self.offset >= 0:
            return 0
        return 16 if self.bits == 6 else 32


FORMS = {
    "Q4_0": BlockForm(16, 32, 18, 4, 8),
    "Q4_1": BlockForm(17, 32, 20, 4, 0),
    "Q5_0": BlockForm(18, 32, 22, 5, 16),
    "Q5_1": BlockForm(19, 32, 24, 5, 0),
    "Q8_0": BlockForm(20, 32, 34, 8, 128),
    "MXFP4": BlockForm(21, 32, 17, 4, 12, by_table=True),
    "Q4_Z": BlockForm(22, 32, 19, 4, -1),  # ours, for AWQ and others with zero points
    "Q4_K": BlockForm(23, 256, 144, 4, 0),
    "Q5_K": BlockForm(24, 256, 176, 5, 0),
    "Q6_K": BlockForm(25, 256, 210, 6, 32, 208),
}

# Twice the values
_MXFP4 = torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
_RENAMED = (  # names in transformers, and in the library gguf
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"\.(sinks|layer_scalar)$", r".\1.weight"),
    (r"experts\.(\w+_proj)_bias$", r"experts.\1.bias"),
    (r"experts\.(\w+_proj)$", r"experts.\1.weight"),
)


class BlockRows(Tensor):
    """A weight as bytes (out, bytes of a row). Its class names the type and survives indexing,
    splitting and joining.
    """

    type_name: ClassVar[str]

    @property
    def form(self) -> BlockForm:
        return FORMS[self.type_name]

    @property
    def scales(self) -> Tensor:
        """The scales, and minima, of all blocks."""
        form = self.form
        blocks = self.as_subclass(Tensor).reshape(-1, form.bytes)
        if form.by_table:
            return (blocks[:, 0].int() << 23).view(torch.float32)
        return (
            blocks[:, form.scales_at : form.scales_at + 2 * form.factors]
            .contiguous()
            .view(torch.float16)
        )


_TYPES: dict[str, type[BlockRows]] = {
    name: type(name, (BlockRows,), {"type_name": name}) for name in FORMS
}


def block_rows(rows: Tensor, type_name: str) -> BlockRows:
    """Marks bytes as rows of a type in FORMS."""
    return rows.as_subclass(_TYPES[type_name])


def plain(weight: "Tensor | Levels") -> Tensor:
    """Dequantises rows of blocks or levels to a weight (out, in) in fp32; returns another weight
    unchanged.
    """
    if isinstance(weight, Levels):
        return weight.weight
    if not isinstance(weight, BlockRows):
        return weight
    form = weight.form
    rows = weight.as_subclass(Tensor)
    # The types of hub checkpoints: without the library gguf
    if form.inputs == 32 and form.offset and form.bits != 5:
        blocks = rows.reshape(*rows.shape[:-1], -1, form.bytes)
        own = blocks[..., form.bytes - 4 * form.bits :]
        levels = own.view(torch.int8).int() + 128 if form.bits == 8 else _two_per_byte(own)
        if form.by_table:
            return torch.ldexp(_MXFP4[levels], blocks[..., :1].int() - 128).flatten(-2)
        if form.offset < 0:  # each block has its own
            levels -= blocks[..., 2:3].view(torch.int8).int()
        else:
            levels -= form.offset
        return (levels * blocks[..., :2].contiguous().view(torch.float16).float()).flatten(-2)
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[weight.type_name]))


def _two_per_byte(levels: Tensor) -> Tensor:
    """The lower levels of all bytes, then the upper ones."""
    return torch.cat([levels & 15, levels >> 4], -1).int()


# Low-bit weights as hub checkpoints store them.

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
        own = levels[..., :16] | levels[..., 16:] << 4 if self.bits == 4 else levels ^ 128
        kind = "Q8_0" if self.bits == 8 else "Q4_0" if middle else "Q4_Z"
        return block_rows(torch.cat([factors, own], -1).flatten(1), kind)


def mxfp4_rows(blocks: Tensor, scales: Tensor) -> BlockRows:
    """From levels (..., out, groups, 16), two neighbouring inputs per byte, and exponents (...,
    out, groups).
    """
    levels = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    halves = levels[..., :16] | levels[..., 16:] << 4
    return block_rows(torch.cat([scales[..., None], halves], -1).flatten(-2), "MXFP4")


def unpacked(numbers: Tensor, bits: int) -> Tensor:
    """Unpacks levels from int32 (rows, columns) to (rows, columns * 32 / bits)."""
    return (
        numbers[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1
    ).flatten(1)


def levels_of(get: Callable[..., Any], least: int) -> Levels | None:
    """A low-bit projection; None if it is not low-bit. `get(suffix)`: the tensor with this end of
    its name, raises if missing; `get(suffix, False)`: None if missing. `least`: added to GPTQ's
    zeros.

    GPTQ and AWQ: scales (groups, out), zeros (groups, out / n), and levels (in / n, out) or (in,
    out / 8). compressed-tensors: levels (out, in / n), scales (out, groups or 1), and zeros (out /
    n, groups), or signed by group, or none.
    """
    if (packed := get(".qweight", False)) is not None:
        scale = get(".scales").T.contiguous()
        zeros = get(".qzeros")
        bits = 32 * zeros.shape[1] // len(scale)
        if packed.shape[1] < len(scale):  # AWQ
            levels, zero = (
                unpacked(part, 4).view(len(part), -1, 8)[..., _AWQ_ORDER].flatten(1).T
                for part in (packed, zeros)
            )
        else:
            levels = unpacked(packed.T.contiguous(), bits)
            zero = (unpacked(zeros, bits) + least).T
        return Levels(levels.contiguous(), zero.contiguous(), scale, bits, get(".g_idx", False))
    packed, whole, zeros = (
        get(end, False) for end in (".weight_packed", ".weight", ".weight_zero_point")
    )
    if packed is not None:
        inputs = int(get(".weight_shape")[1])
        bits = 32 * packed.shape[1] // inputs
        levels = unpacked(packed, bits)[:, :inputs]
    elif whole is not None and whole.dtype == torch.int8:
        levels = whole.int() + 128
        bits = 8
    else:
        return None
    scale = get(".weight_scale")
    if zeros is not None and zeros.dtype == torch.int32:
        zero = unpacked(zeros.T.contiguous(), bits).T[: len(scale)].contiguous()
    else:
        zero = torch.full_like(scale, 1 << bits - 1, dtype=torch.int32) + (
            0 if zeros is None else zeros
        )
    return Levels(levels, zero, scale, bits, get(".weight_g_idx", False))


def scaled_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Dequantises FP8 (out, in) to fp32, with scales by block, by row or for the whole tensor."""
    wide = scale.float() if scale.dim() > 1 else scale.float().view(-1, 1)
    for dimension, size in enumerate(weight.shape):
        each = -(-size // wide.shape[dimension])
        wide = wide.repeat_interleave(each, dimension).narrow(dimension, 0, size)
    return weight.float() * wide


# Where GGUF files lay out weights differently from transformers.


def gguf_parts(name: str) -> list[str]:
    """A weight's tensors in GGUF files, by names that the library gguf maps: one, or gate and up of
    experts.
    """
    for pattern, other in _RENAMED:
        name = re.sub(pattern, other, name)
    if ".experts.gate_up" not in name:
        return [name]
    return [name.replace("gate_up", part) for part in ("gate", "up")]


def from_gguf_shape(name: str, shapes: list[tuple[int, ...]], spec: ModelSpec) -> tuple[int, ...]:
    """A weight's shape in transformers, from those of its parts."""
    experts = spec.architecture.experts
    mixer = spec.architecture.mixer
    shape = shapes[0]
    if mixer is not None and name.endswith(f".{mixer.convolution}.weight"):
        return shape[0], 1, *shape[1:]
    if experts is None or experts.prefix not in name:
        return shape
    joined = shape[0], shape[1] * len(shapes), *shape[2:]
    return joined[:1] + joined[:0:-1] if experts.by_inputs else joined


def from_gguf(
    name: str,
    parts: list[Tensor],
    spec: ModelSpec,
    interleaved: bool,
    form: BlockForm | None = None,
) -> Tensor | None:
    """A weight in transformers' order; None if reordering would split blocks.

    `interleaved`: whether the file's rope is. `form`: of rows of blocks; experts stay (experts,
    outputs, bytes).
    """
    experts = spec.architecture.experts
    sizes = spec.recurrence
    weight = parts[0]
    kind = name.split(".")[-2]
    if experts is not None and experts.prefix in name:
        if not experts.by_inputs:
            return torch.cat(parts, 1)
        parts = [*weight.chunk(2, 1)] if ".gate_up_" in name and len(parts) == 1 else parts
        # Gate and up in turns
        both = torch.stack(parts, 2).flatten(1, 2) if len(parts) > 1 else weight
        return both.transpose(1, 2) if form is None and weight.dim() > 2 else both
    if interleaved and kind in ("q_proj", "k_proj"):
        heads = spec.heads if kind == "q_proj" else spec.kv_heads
        return weight.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
    if (
        ".linear_attn." not in name
        or sizes is None
        or kind == "norm"
        or sizes.heads == sizes.key_heads
    ):
        return weight

    def by_key_head(rows: Tensor) -> Tensor:
        """Groups rows of value heads by key head; the file interleaves them over key heads."""
        turns = rows.reshape(sizes.heads // sizes.key_heads, sizes.key_heads, -1, *rows.shape[1:])
        return turns.transpose(0, 1).reshape(rows.shape)

    if kind == "out_proj":  # its inputs are the value heads
        divides = form is not None and sizes.value_dim % form.inputs
        return None if divides else by_key_head(weight.T).T.contiguous()
    before = 2 * sizes.keys if kind in ("in_proj_qkv", "conv1d") else 0
    return torch.cat([weight[:before], by_key_head(weight[before:])])
