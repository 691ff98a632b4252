"""Weights as GGUF files store them: rows of blocks, which stay as they are until a kernel packs them.

A block has levels of some bits, and fp16 scales. A weight is (level - offset) * scale, plus a minimum where there is one. In K
types the scale and the minimum of a group are its steps times those of the block. Of MXFP4 the levels stand in a table, and the
scales are powers of two.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class BlockForm(NamedTuple):
    """A type of blocks: how many inputs it has and bytes, and what a kernel reads of it (see StoredPanel in kernels.c)."""

    code: int  # in pack.c
    inputs: int
    bytes: int
    bits: int
    offset: int  # 0 where there are minima
    scales_at: int = 0  # byte of the fp16 scale, which that of the minimum follows
    by_table: bool = False  # MXFP4, whose first byte is the exponent of the scale

    @property
    def factors(self) -> int:
        return 1 if self.offset else 2

    @property
    def step_inputs(self) -> int:
        """Inputs that share a step, 0 where there are none."""
        return 0 if self.inputs == 32 and not self.by_table else 16 if self.bits == 6 else 32


FORMS = {
    "Q4_0": BlockForm(16, 32, 18, 4, 8),
    "Q4_1": BlockForm(17, 32, 20, 4, 0),
    "Q5_0": BlockForm(18, 32, 22, 5, 16),
    "Q5_1": BlockForm(19, 32, 24, 5, 0),
    "Q8_0": BlockForm(20, 32, 34, 8, 128),
    "MXFP4": BlockForm(21, 32, 17, 4, 12, by_table=True),
    "Q4_K": BlockForm(22, 256, 144, 4, 0),
    "Q5_K": BlockForm(23, 256, 176, 5, 0),
    "Q6_K": BlockForm(24, 256, 210, 6, 32, 208),
}


class BlockRows(Tensor):
    """A weight as bytes (out, bytes of a row). Its class says which type: rows that are chosen, split or joined keep it."""

    type_name: ClassVar[str]

    @property
    def form(self) -> BlockForm:
        return FORMS[self.type_name]

    @property
    def scales(self) -> Tensor:
        """All scales of blocks and of their minima."""
        form = self.form
        blocks = self.as_subclass(Tensor).reshape(-1, form.bytes)
        if form.by_table:
            return (blocks[:, 0].int() << 23).view(torch.float32)
        return blocks[:, form.scales_at : form.scales_at + 2 * form.factors].contiguous().view(torch.float16)


_TYPES: dict[str, type[BlockRows]] = {name: type(name, (BlockRows,), {"type_name": name}) for name in FORMS}


def block_rows(rows: Tensor, type_name: str) -> BlockRows:
    """`rows`: of a type in FORMS."""
    return rows.as_subclass(_TYPES[type_name])


def plain(weight: Tensor) -> Tensor:
    """Rows of blocks as the weight (out, in) that they stand for, in fp32; another weight as it is."""
    if not isinstance(weight, BlockRows):
        return weight
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(weight.as_subclass(Tensor).numpy(), GGMLQuantizationType[weight.type_name]))
