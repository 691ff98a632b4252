"""Weights in the kernels' layout: panels of 32 outputs, read from front to back."""

import ctypes
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import FORMS, BlockRows, plain
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, is_int4_bytes
from .compiled import KINDS, CMatrix, CStoredPanel, Kernels

LAYOUT = 2  # version of the panels, for packed files
PANEL = 32  # outputs
_CHUNK = 1 << 25  # bytes of an allocation for weights
_CACHE_LINE = 64  # bytes
_CODED = 192  # bytes of 32 outputs by 4 inputs in 12 bits
_MOST_EXCEPTIONS = 1 / 256  # of the weights of a matrix in 12 bits; with more, 16 bits are as fast

Part = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class MatrixForm:
    """The form of a matrix (outputs, inputs). `inputs` must be a multiple of the group size for low
    bits, of 2 for bf16.
    """

    kind: str  # one of KINDS
    inputs: int
    outputs: int
    count: int = 1  # matrices of this shape whose panels alternate
    biased: bool = False
    experts: int = 1  # each with `count` matrices, one after the other
    types: tuple[str, ...] = ()  # of `stored`: each panel's type, a key of FORMS
    # Of bf16 and widened weights in 12 bits: how many are listed, with the end of the list
    exceptions: int | None = None

    @property
    def panels_of_one(self) -> int:
        """The panels of an expert's matrices."""
        return -(-self.outputs // PANEL) * self.count

    @property
    def panels(self) -> int:
        return self.panels_of_one * self.experts

    @property
    def parts(self) -> dict[str, Part]:
        """Types and shapes of its tensors, P panels of 32 outputs:

        - fp32: (P, inputs, 32).
        - bf16, and widened (bf16 weights times fp32 rows): (P, inputs / 2, 32, 2). In 12 bits: low
          bytes and codes (P, inputs / 4, 192), the 16 coded high bytes of a panel (P, 16), and the
          weights with other high bytes as `place << 16 | bits`, see coded.h.
        - int8: levels plus 128, (P, inputs / 4, 32, 4), and fp32 scales (P, 32).
        - int4: two levels per byte, of inputs i and i + 16 of a group, (P, groups, 4, 32, 4); scale
          and lowest value in bf16, (P, groups, 2, 32).
        - stored: for the P panels of a type levels in units of four bytes, (P, groups * bits, 32);
          fp16 scales of blocks and of minima, (P, blocks * 1 or 2, 32); steps, (P, steps * 1 or 2,
          32).

        A bias is (P, 32) in fp32.
        """
        panels = self.panels
        inputs = self.inputs
        groups = self.inputs // GROUP_SIZE
        by_kind: dict[str, dict[str, Part]] = {
            "fp32": {"weight": (torch.float32, (panels, inputs, PANEL))},
            "bf16": {"weight": (torch.bfloat16, (panels, inputs // 2, PANEL, 2))},
            "int8": {
                "weight": (torch.uint8, (panels, inputs // 4, PANEL, 4)),
                "scale": (torch.float32, (panels, PANEL)),
            },
            "int4": {
                "weight": (torch.uint8, (panels, groups, 4, PANEL, 4)),
                "scale": (torch.bfloat16, (panels, groups, 2, PANEL)),
            },
        }
        if self.exceptions is not None:
            by_kind["bf16"] = {
                "weight": (torch.uint8, (panels, inputs // 4, _CODED)),
                "high": (torch.uint8, (panels, 16)),
                "exceptions": (torch.int64, (self.exceptions,)),
            }
        by_kind["widened"] = by_kind["bf16"]
        by_kind["stored"] = {
            part: kind
            for name in dict.fromkeys(self.types)
            for part, kind in self._stored_parts(name)
        }
        return by_kind[self.kind] | (
            {"bias": (torch.float32, (panels, PANEL))} if self.biased else {}
        )

    def _stored_parts(self, name: str) -> Iterator[tuple[str, Part]]:
        form = FORMS[name]
        panels = self.types.count(name)
        factors = self.inputs // form.inputs * form.factors
        yield (
            f"{name}.weight",
            (torch.int32, (panels, self.inputs // GROUP_SIZE * form.bits, PANEL)),
        )
        if not form.by_table:
            yield f"{name}.scale", (torch.float16, (panels, factors, PANEL))
        if form.step_inputs:
            yield (
                f"{name}.steps",
                (torch.int8, (panels, factors * form.inputs // form.step_inputs, PANEL)),
            )


class HugePages:
    """Memory for a model's weights in huge pages, if the system has them: a pass reads all weights,
    so TLB misses count.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            memory = mmap.mmap(-1, max(size, _CHUNK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # not on every system
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk = torch.frombuffer(memory, dtype=torch.uint8)
            self._used = 0
        part = self._chunk[self._used : self._used + size]
        self._used += -(-size // _CACHE_LINE) * _CACHE_LINE
        return part.view(dtype).view(shape)


class NativeMatrix:
    """A matrix by its tensors, and the C structure with their addresses."""

    def __init__(self, form: MatrixForm, parts: Mapping[str, Tensor]) -> None:
        """`parts`: with the types and shapes of `form.parts`."""
        self.form = form
        self.parts = parts
        self.outputs = form.outputs * form.count
        held = dict(parts)
        if form.exceptions is not None and not parts["weight"].is_meta:
            held["starts"] = self._starts = _starts(form, parts["exceptions"])
        pointers = [
            held[name].data_ptr() if name in held else None
            for name in ("weight", "scale", "bias", "high", "exceptions", "starts")
        ]
        if form.types:
            self._table = _table(form.types, parts)
            pointers[0] = ctypes.addressof(self._table)
        self.structure = CMatrix(
            KINDS.index(form.kind), form.inputs, self.outputs, form.panels_of_one, *pointers
        )

    @classmethod
    def packed(
        cls,
        kernels: Kernels,
        name: str,
        form: MatrixForm,
        read: Callable[[], Iterable[Affine]],
        empty: Callable[..., Tensor] = torch.empty,
        narrows: bool = False,
        codes: bool = False,
    ) -> "NativeMatrix":
        """A `PackMatrix` once `kernels` is bound.

        `read` gives `count` projections (outputs, inputs) for each expert, or one projection in
        parts, where all parts but the last fill panels. A low-bit form rounds them; rows of blocks
        stay unchanged if all weights are rows of blocks. `empty` allocates tensors. `narrows`:
        stores fp32 weights in bf16 if bf16 holds them exactly, as it does for most published
        models: passes of few tokens are memory-bound. `codes`: stores bf16 in 12 bits where few
        weights are exceptions. The products have the same bits.
        """
        projections = list(read())
        blocks = [
            projection.weight
            for projection in projections
            if isinstance(projection.weight, BlockRows)
        ]
        if len(blocks) == len(projections):
            form = _stored(form, blocks)
        elif blocks:
            dtype = torch.float32 if form.kind == "fp32" else torch.bfloat16
            projections = [
                projection._replace(weight=plain(projection.weight).to(dtype))
                for projection in projections
            ]
        if (
            narrows
            and form.kind == "fp32"
            and form.inputs % 2 == 0
            and all(_fits_bf16(part.weight) for part in projections)
        ):
            form = replace(form, kind="widened")
            projections = [
                projection._replace(weight=projection.weight.bfloat16())
                for projection in projections
            ]
        if codes and form.kind in ("bf16", "widened") and form.inputs % GROUP_SIZE == 0:
            coded = cls._coded(kernels, form, projections, empty)
            if coded is not None:
                return coded
        parts = {name: empty(shape, dtype=dtype) for name, (dtype, shape) in form.parts.items()}
        matrix = cls(form, parts)
        matrix._pack(kernels, projections)
        return matrix

    @classmethod
    def _coded(
        cls,
        kernels: Kernels,
        form: MatrixForm,
        projections: Sequence[Affine],
        empty: Callable[..., Tensor],
    ) -> "NativeMatrix | None":
        """A bf16 matrix in 12 bits; None if that leaves too many exceptions."""
        weights = form.panels * PANEL * form.inputs
        most = int(weights * _MOST_EXCEPTIONS)
        # Mostly the first panel decides, before memory is taken
        if any(_exceptions(part.weight[:PANEL]) > _MOST_EXCEPTIONS for part in projections):
            return None
        found = torch.empty(2 + most, dtype=torch.int64)
        found[0] = 0
        found[1] = most
        parts = {}
        for name, (dtype, shape) in replace(form, exceptions=0).parts.items():
            parts[name] = empty(shape, dtype=dtype)
        # While it is packed the list has no end
        packing = cls(form, parts)
        packing.structure.high = parts["high"].data_ptr()
        packing._pack(kernels, projections, found)
        count = int(found[0])
        if count > most:
            return None
        listed = found[2 : 2 + count].sort().values
        parts["exceptions"] = torch.cat((listed, torch.tensor([weights << 16])))
        return cls(replace(form, exceptions=count + 1), parts)

    def _pack(
        self, kernels: Kernels, projections: Sequence[Affine], found: Tensor | None = None
    ) -> None:
        """Fills the parts. `found`: where weights are listed that 12 bits cannot hold."""
        form = self.form
        threads = torch.get_num_threads()
        first = 0  # panel
        for place, (weight, bias) in enumerate(projections):
            if form.count > 1:  # panels alternate
                first = place // form.count * form.panels_of_one + place % form.count
            rows = weight.contiguous()
            kernels.pack(
                self.structure,
                rows.data_ptr(),
                _source(rows),
                len(rows),
                first,
                form.count,
                None if found is None else found.data_ptr(),
                threads,
            )
            stop = first - (-len(rows) // PANEL) * form.count
            if bias is not None:
                self.parts["bias"][first : stop : form.count] = F.pad(
                    bias.float(), (0, -len(rows) % PANEL)
                ).view(-1, PANEL)
            first = stop

    def decoded(self, kernels: Kernels) -> Affine:
        """The weights (outputs, inputs) of a matrix in 12 bits, and its bias."""
        form = self.form
        panels = torch.empty(form.panels, form.inputs // 2, PANEL, 2, dtype=torch.bfloat16)
        kernels.decode(self.structure, form.panels, panels.data_ptr())
        rows = panels.transpose(1, 2).reshape(-1, form.inputs)[: self.outputs]
        bias = self.parts.get("bias")
        return Affine(rows, None if bias is None else bias.view(-1)[: self.outputs])

    def rows_of(self, vocabulary: DraftVocabulary) -> "NativeMatrix":
        """The head with a draft vocabulary's rows only."""
        chosen = vocabulary.rows_of(torch.arange(self.outputs))
        types = self.form.types[:1] * -(-len(chosen) // PANEL)
        form = replace(self.form, outputs=len(chosen), types=types)
        parts = {}
        for name, (dtype, shape) in form.parts.items():
            units = self.parts[name]
            units = (units if units.shape[-1] == PANEL else units.view(torch.int32)).reshape(
                len(units), -1, PANEL
            )
            rows = F.pad(units[chosen // PANEL, :, chosen % PANEL], (0, 0, 0, -len(chosen) % PANEL))
            parts[name] = (
                rows.view(-1, PANEL, rows.shape[1])
                .transpose(1, 2)
                .contiguous()
                .view(dtype)
                .view(shape)
            )
        return NativeMatrix(form, parts)


def _table(types: Sequence[str], parts: Mapping[str, Tensor]) -> ctypes.Array[CStoredPanel]:
    """The C structure of each panel of a matrix in `stored`."""
    table = (CStoredPanel * len(types))()
    places = Counter[str]()
    for panel, name in enumerate(types):
        tensors = [parts.get(f"{name}.{part}") for part in ("weight", "scale", "steps")]
        pointers = [None if part is None else part[places[name]].data_ptr() for part in tensors]
        table[panel] = CStoredPanel(*pointers, FORMS[name].bits, FORMS[name].offset)
        places[name] += 1
    return table


def _starts(form: MatrixForm, exceptions: Tensor) -> Tensor:
    """Each panel's first exception."""
    places = torch.arange(form.panels) * (PANEL * form.inputs)
    return torch.searchsorted(exceptions >> 16, places).int()


def are_listed(form: MatrixForm, exceptions: Tensor) -> bool:
    """Whether a file's exceptions are as the kernels need them: ascending, up to their end."""
    places = exceptions >> 16
    if form.exceptions == 0 or places[0] < 0 or not bool((places.diff() > 0).all()):
        return False
    return int(places[-1]) == form.panels * PANEL * form.inputs


def _exceptions(weight: Tensor) -> float:
    """The share of a panel's weights (bf16) that are exceptions in 12 bits."""
    high = weight.contiguous().view(torch.uint8).view(-1, 2)[:, 1].int()
    counts = torch.bincount(high, minlength=16)
    return 1 - int(counts.topk(16).values.sum()) / weight.numel()


def _stored(form: MatrixForm, weights: Sequence[BlockRows]) -> MatrixForm:
    """The form of weights that are rows of blocks."""
    names = [weight.type_name for weight in weights for _ in range(0, len(weight), PANEL)]
    each = form.panels_of_one // form.count
    places = (
        (expert, panel, one)
        for expert in range(form.experts)
        for panel in range(each)
        for one in range(form.count)
    )
    types = tuple(
        names[(expert * form.count + one) * each + panel] for expert, panel, one in places
    )
    return replace(form, kind="stored", types=types)


def _source(rows: Tensor) -> int:
    """The kind of weights to pack, in the numbering of the C code."""
    if isinstance(rows, BlockRows):
        return rows.form.code
    if is_int4_bytes(rows):
        return KINDS.index("int4")
    return KINDS.index("bf16" if rows.dtype == torch.bfloat16 else "fp32")


def _fits_bf16(weight: Tensor) -> bool:
    """Whether bf16 holds fp32 weights (outputs, inputs) exactly."""
    # Mostly the first row decides
    return all(not (rows.view(torch.int32) << 16).any() for rows in (weight[:1], weight))


PackMatrix = Callable[[str, MatrixForm, Callable[[], Iterable[Affine]]], NativeMatrix]
"""Makes a matrix from its name (unique in a model, by kind of form), its form, and a function that reads its weights."""
