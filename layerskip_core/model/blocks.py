"""Weights as GGUF files store them: rows of blocks, kept unchanged until a kernel packs them.

A block has levels and fp16 scales. A weight is (level - offset) * scale, plus a minimum in some
types. In K types the scale and the minimum of a group are its steps times those of the block. In
MXFP4 levels index a table, and scales are powers of two.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


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
        """How many fp16 factors a block has: a scale, and a minimum where levels have no offset."""
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
        factors = blocks[:, form.scales_at : form.scales_at + 2 * form.factors]
        return factors.contiguous().view(torch.float16)


_TYPES: dict[str, type[BlockRows]] = {
    name: type(name, (BlockRows,), {"type_name": name}) for name in FORMS
}


def block_rows(rows: Tensor, type_name: str) -> BlockRows:
    """Marks bytes as rows of a type in FORMS."""
    return rows.as_subclass(_TYPES[type_name])


def plain(weight: Tensor) -> Tensor:
    """Dequantises rows of blocks to a weight (out, in) in fp32; returns another weight
    unchanged.
    """
    if not isinstance(weight, BlockRows):
        return weight
    form = weight.form
    rows = weight.as_subclass(Tensor)
    # The types of hub checkpoints: without the library gguf
    if form.inputs == 32 and form.offset and form.bits != 5:
        blocks = rows.reshape(*rows.shape[:-1], -1, form.bytes)
        own = blocks[..., form.bytes - 4 * form.bits :]
        levels = torch.cat([own & 15, own >> 4], -1).int()
        if form.bits == 8:
            levels = own.view(torch.int8).int() + 128
        if form.by_table:
            return torch.ldexp(_MXFP4[levels], blocks[..., :1].int() - 128).flatten(-2)
        if form.offset < 0:  # each block has its own
            levels -= blocks[..., 2:3].view(torch.int8).int()
        else:
            levels -= form.offset
        return (levels * blocks[..., :2].contiguous().view(torch.float16).float()).flatten(-2)
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[weight.type_name]))
