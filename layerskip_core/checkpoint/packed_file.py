"""packed.safetensors: a model's weights in the layout of the compiled kernels, which map the file.

It holds the embedding, norms and routers by their names in a checkpoint, and the parts of each
matrix (model/native/matrix.py) as `KIND.MATRIX.PART`: `int4.layers.0.qkv.weight`. fp32 weights that
bf16 holds exactly are `widened`, for kernels that widen bf16. bf16 mostly takes 12 bits.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import torch
from torch import Tensor

from ..config.model import PackingConfig, Quantization
from ..errors import require
from ..model.exit_blocks import ExitBlock, StoredDrafters
from ..model.native.compiled import Kernels
from ..model.native.matrix import LAYOUT, MatrixForm, NativeMatrix, are_listed
from ..model.spec import ModelSpec, Shapes
from ..model.weights import Affine
from .folder import METADATA, PACKED_FILE
from .loaded import TORCH_DTYPES
from .sidecars import naming, open_formed

_FORM = {"format": "layerskip packed 1", "layout": str(LAYOUT)}
_CONTENT = "content"  # key of the header
NAMES = {  # in safetensors
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_ADVICE = "export the model again with `--format packed`"
_PAGE = 4096
ENTRY = 256  # bytes of a header entry, at most

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
"""Types and shapes of a file's tensors, by name."""


@dataclass(frozen=True)
class Content:
    """The packings that a file holds."""

    dtype: Literal["fp32", "bf16"]  # of the embedding and unquantized weights
    quantize: Quantization | None
    draft_weights: tuple[Quantization, ...]
    draft_head: Quantization | None
    calibrated: bool

    def packing(self, asked: PackingConfig, dtype: str) -> PackingConfig:
        """The requested packing. Raises ConfigError if the file does not hold it."""
        copies = asked.draft_weights
        head = asked.draft_head or "int8"
        drafts = copies or self.quantize or asked.exact
        if asked.adaptive and not drafts and head == self.draft_head:
            usual: Quantization = "int4" if self.calibrated else "int8"
            if usual in self.draft_weights:
                copies = (usual,)
        _require_packed("dtype", dtype, ("auto", self.dtype))
        _require_packed("quantize", asked.quantize, (None, self.quantize))
        for kind in copies:
            _require_packed("draft_weights", kind, self.draft_weights)
        if copies:
            _require_packed("draft_head", head, (self.draft_head,))
        return replace(asked, quantize=self.quantize, draft_weights=copies)


def _require_packed(field: str, value: str | None, packed: Collection[str | None]) -> None:
    """Raises ConfigError for a setting that is not among the `packed` ones."""
    names = [kind or "left out" for kind in packed] or ["left out"]
    require(value in packed, field, f"{' or '.join(names)}, as the model was packed", value)


class PackedFile:
    """The packed file of a folder. Its matrices are views of the memory-mapped file."""

    def __init__(self, folder: str | Path) -> None:
        """Reads the header. Raises CheckpointError for a damaged or foreign file."""
        self._path = Path(folder) / PACKED_FILE
        with naming(self._path, _ADVICE):
            self._file = open_formed(self._path, _FORM)
            content = self._file.metadata.get(_CONTENT, "null")
            self.content: Content = msgspec.json.decode(content, type=Content)
        self.dtype = TORCH_DTYPES[self.content.dtype]
        exits = set()
        for name in self._file.entries:
            if name.startswith("exits."):
                exits.add(int(name.split(".")[1]))
        # Only norms are unpacked
        self.stored_drafters = StoredDrafters(tuple(map(ExitBlock, sorted(exits))), self.unpacked)

    def unpacked(self, name: str) -> Tensor | None:
        """A weight that is stored unpacked, by its name in a checkpoint; None for others."""
        return self._file.mapped(name) if name in self._file.entries else None

    def embedding(self, spec: ModelSpec) -> Tensor:
        return self._part(spec.embedding_name, self.dtype, spec.shapes[spec.embedding_name])

    @property
    def is_widened(self) -> bool:
        """Whether fp32 weights are stored in bf16, which only kernels that widen bf16 read."""
        return any(name.startswith("widened.") for name in self._file.entries)

    def matrix(
        self, name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]
    ) -> NativeMatrix:
        form = form_in_file(self._file.entries, name, form)
        parts = {}
        for part, like in form.parts.items():
            parts[part] = self._part(f"{form.kind}.{name}.{part}", *like)
        if form.exceptions is not None and not are_listed(form, parts["exceptions"]):
            with naming(self._path, _ADVICE):
                raise ValueError(f"the exceptions of {name} must be places in it, in order")
        return NativeMatrix(form, parts)

    def _part(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of a tensor. Raises CheckpointError if it is missing, or not of the type and shape
        that the model needs.
        """
        needed = (NAMES[dtype], shape)
        found = self._file.entries.get(name)
        with naming(self._path, _ADVICE):
            if found != needed:
                raise ValueError(f"{name} must be {needed}, as config.json says, found {found}")
            return self._file.mapped(name)


def form_in_file(entries: Entries, name: str, form: MatrixForm) -> MatrixForm:
    """The form of a matrix in a file, which may hold fp32 as bf16, and bf16 in 12 bits."""
    if form.kind == "fp32" and f"widened.{name}.weight" in entries:
        form = replace(form, kind="widened")
    listed = entries.get(f"{form.kind}.{name}.exceptions")
    if form.kind not in ("bf16", "widened") or listed is None:
        return form
    _, shape = listed
    return replace(form, exceptions=shape[0] if shape else 0)


class TensorWriter:
    """Writes a safetensors file tensor by tensor, and its header at the end, which makes the file
    valid.
    """

    def __init__(self, file: BinaryIO, header_bytes: int) -> None:
        """`file` is open and empty. `header_bytes`: the size of the header, at most."""
        self._file = file
        # Of the tensors, after the header
        self._start = self._end = -(-header_bytes // _PAGE) * _PAGE
        self._file.seek(self._start)
        self._entries: dict[str, object] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        begin = self._end - self._start
        self._end = self._end + tensor.nbytes
        offsets = [begin, self._end - self._start]
        self._entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }

    def end(self, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        header = json.dumps(
            {METADATA: dict(metadata), **self._entries}, separators=(",", ":")
        ).encode()
        size = self._start - 8
        assert len(header) <= size
        self._file.seek(0)
        self._file.write(size.to_bytes(8, "little") + header.ljust(size))


class PackedWriter(TensorWriter):
    """Writes a packed file matrix by matrix while a backend is built, and keeps none in memory."""

    def __init__(self, file: BinaryIO, kernels: Kernels, most: int, codes: bool) -> None:
        """`file` is open and empty. The header has room for `most` tensors. `codes`: bf16 takes 12
        bits.
        """
        super().__init__(file, (most + 16) * ENTRY)
        self._kernels = kernels
        self._codes = codes

    def matrix(
        self, name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]
    ) -> NativeMatrix:
        """Writes a matrix; the returned one has no memory, so the backend cannot run."""
        # A head is asked for twice: by the model and by its drafts
        written = {f"{form.kind}.{name}.weight"}
        if form.kind == "fp32":
            written.add(f"widened.{name}.weight")
        if written.isdisjoint(self._entries):
            matrix = NativeMatrix.packed(
                self._kernels,
                name,
                form,
                read,
                narrows=self._kernels.widens_bf16,
                codes=self._codes,
            )
            for part, tensor in matrix.parts.items():
                self.add(f"{matrix.form.kind}.{name}.{part}", tensor)
        empty = {}
        for part, (dtype, shape) in form.parts.items():
            empty[part] = torch.empty(shape, dtype=dtype, device="meta")
        return NativeMatrix(form, empty)

    def finish(self, content: Content) -> None:
        """Writes the header, which makes the file valid."""
        self.end({**_FORM, _CONTENT: json.dumps(asdict(content))})


def unpacked_names(spec: ModelSpec, shapes: Shapes) -> list[str]:
    """The names of weights stored unpacked: norms, activations, learned positions, convolutions and
    routers.
    """
    whole = {f"{spec.names.positions}.weight", *spec.mapped}
    modules = list[str]()
    mixer = spec.architecture.mixer
    if mixer is not None:
        modules += [mixer.convolution, *mixer.steps]
    endings = list[str]()
    experts = spec.architecture.experts
    for part in (experts.router, experts.shared_gate) if experts is not None else ():
        endings += [f"{part}.weight", f"{part}.bias"]
    names = []
    for name, shape in shapes.items():
        # A bias is unpacked if its weight is
        weight = shapes.get(f"{name.rpartition('.')[0]}.weight", shape)
        is_part = any(f".{module}." in name for module in modules)
        if len(weight) == 1 or is_part or name in whole or name.endswith(tuple(endings)):
            names.append(name)
    return names
