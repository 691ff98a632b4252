"""Weights as the kernels read them: in panels of 32 outputs, from front to back. The same for all variants of the kernels."""

import mmap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, is_stored
from .compiled import KINDS, CMatrix, Kernels

LAYOUT = 1  # the version of the panels below: files of panels say which they have
_PANEL = 32  # outputs
_CHUNK = 1 << 25  # bytes of weights that stand together
_CACHE_LINE = 64  # bytes

Part = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class MatrixForm:
    """One matrix (outputs, inputs), or `count` of the same shape with alternating panels; or those of each of `experts`, one
    after the other.

    The group size must divide `inputs` for low-bit weights; for bf16 it must be even.
    """

    kind: str  # one of KINDS
    inputs: int
    outputs: int
    count: int = 1
    biased: bool = False
    experts: int = 1

    @property
    def panels_of_one(self) -> int:
        """Of each expert's matrices."""
        return -(-self.outputs // _PANEL) * self.count

    @property
    def panels(self) -> int:
        return self.panels_of_one * self.experts

    @property
    def parts(self) -> dict[str, Part]:
        """Types and shapes of its tensors (P: panels):

        fp32: (P, inputs, 32)
        bf16, and widened, which is bf16 that multiplies fp32: (P, inputs / 2, 32, 2)
        int8: levels plus 128, (P, inputs / 4, 32, 4), and fp32 scales (P, 32)
        int4: two levels per byte, of inputs i and i + 16 of a group, (P, groups, 4, 32, 4), and the scale and the smallest
            value in bf16, (P, groups, 2, 32)

        A bias is (P, 32) in fp32.
        """
        panels, inputs, groups = self.panels, self.inputs, self.inputs // GROUP_SIZE
        by_kind: dict[str, dict[str, Part]] = {
            "fp32": {"weight": (torch.float32, (panels, inputs, _PANEL))},
            "bf16": {"weight": (torch.bfloat16, (panels, inputs // 2, _PANEL, 2))},
            "int8": {"weight": (torch.uint8, (panels, inputs // 4, _PANEL, 4)), "scale": (torch.float32, (panels, _PANEL))},
            "int4": {
                "weight": (torch.uint8, (panels, groups, 4, _PANEL, 4)),
                "scale": (torch.bfloat16, (panels, groups, 2, _PANEL)),
            },
        }
        by_kind["widened"] = by_kind["bf16"]
        return by_kind[self.kind] | ({"bias": (torch.float32, (panels, _PANEL))} if self.biased else {})


class HugePages:
    """Room for a model's weights in huge pages, where the system has them: a pass reads all, and looks up every page."""

    def __init__(self) -> None:
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            memory = mmap.mmap(-1, max(size, _CHUNK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # not on every system
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        part = self._chunk[self._used : self._used + size]
        self._used += -(-size // _CACHE_LINE) * _CACHE_LINE
        return part.view(dtype).view(shape)


class NativeMatrix:
    """A matrix by its tensors, and the C structure with their addresses."""

    def __init__(self, form: MatrixForm, parts: Mapping[str, Tensor]) -> None:
        """`parts` have the types and shapes of `form.parts`."""
        self.form, self.parts = form, parts
        self.outputs = form.outputs * form.count
        pointers = [parts[name].data_ptr() if name in parts else None for name in ("weight", "scale", "bias")]
        self.structure = CMatrix(KINDS.index(form.kind), form.inputs, self.outputs, form.panels_of_one, *pointers)

    @classmethod
    def packed(
        cls,
        kernels: Kernels,
        name: str,
        form: MatrixForm,
        read: Callable[[], Iterable[Affine]],
        empty: Callable[..., Tensor] = torch.empty,
        narrows: bool = False,
    ) -> "NativeMatrix":
        """A `PackMatrix`, after the kernels. `read` gives `count` projections (outputs, inputs) of each expert, which are
        rounded where the form has low bits, or stored in int4. `empty` gives the room for its tensors.

        `narrows`: fp32 weights that bf16 holds exactly, as most published ones, are stored in it: a pass of few tokens takes as
        long as reading them. The products have the same bits.
        """
        if narrows and form.kind == "fp32" and form.inputs % 2 == 0:
            projections = list(read())
            if all(_fits_bf16(projection.weight) for projection in projections):
                form = replace(form, kind="widened")
                projections = [projection._replace(weight=projection.weight.bfloat16()) for projection in projections]
            read = partial(iter, projections)
        parts = {name: empty(shape, dtype=dtype) for name, (dtype, shape) in form.parts.items()}
        matrix = cls(form, parts)
        rest = iter(read())
        for place in range(form.experts * form.count):
            projection = next(rest)
            index = place // form.count * form.panels_of_one + place % form.count  # of its first panel
            rows = projection.weight.contiguous()
            source = "int4" if is_stored(rows) else "bf16" if rows.dtype == torch.bfloat16 else "fp32"
            threads = torch.get_num_threads()
            kernels.pack(matrix.structure, rows.data_ptr(), KINDS.index(source), form.outputs, index, form.count, threads)
            if projection.bias is not None:
                padded = F.pad(projection.bias.float(), (0, -form.outputs % _PANEL))
                parts["bias"][index :: form.count] = padded.view(-1, _PANEL)
            del projection, rows  # before the next one is read
        return matrix

    def rows_of(self, vocabulary: DraftVocabulary) -> "NativeMatrix":
        """The rows of some tokens, as if they alone had been packed."""
        chosen = vocabulary.rows_of(torch.arange(self.outputs))
        form = replace(self.form, outputs=len(chosen))
        parts = {}
        for name, (dtype, shape) in form.parts.items():
            units = self.parts[name]
            units = (units if units.shape[-1] == _PANEL else units.view(torch.int32)).reshape(len(units), -1, _PANEL)
            rows = F.pad(units[chosen // _PANEL, :, chosen % _PANEL], (0, 0, 0, -len(chosen) % _PANEL))
            parts[name] = rows.view(-1, _PANEL, rows.shape[1]).transpose(1, 2).contiguous().view(dtype).view(shape)
        return NativeMatrix(form, parts)


def _fits_bf16(weight: Tensor) -> bool:
    """Whether bf16 holds fp32 weights (outputs, inputs) exactly. A first row tells of most that it does not."""
    return all(not (rows.view(torch.int32) << 16).any() for rows in (weight[:1], weight))


PackMatrix = Callable[[str, MatrixForm, Callable[[], Iterable[Affine]]], NativeMatrix]
"""Gives a matrix by its name, which with the form's kind is unique in a model, from weights that it reads if it needs them."""
