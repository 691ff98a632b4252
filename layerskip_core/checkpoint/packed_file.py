"""packed.safetensors: a model's weights in the layout of the compiled kernels, which map the file.

It holds the embedding, norms and routers by their names in a checkpoint, and the parts of each
matrix (model/native/matrix.py) as `KIND.MATRIX.PART`: `int4.layers.0.qkv.weight`. fp32 weights that
bf16 holds exactly are `widened`, for kernels that widen bf16. The header has a fingerprint of a few
bytes of every tensor, to detect incomplete copies.
"""

import hashlib
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
from ..model.exit_blocks import ExitBlock, ExitBlocks
from ..model.native.compiled import Kernels
from ..model.native.matrix import LAYOUT, MatrixForm, NativeMatrix
from ..model.spec import ModelSpec, Shapes
from ..model.weights import Affine
from .folder import METADATA, PACKED_FILE
from .loaded import TORCH_DTYPES
from .sidecars import FINGERPRINT, naming, open_formed

_FORM = {"format": "layerskip packed 1", "layout": str(LAYOUT)}
_CONTENT = "content"  # key of the header
NAMES = {  # in safetensors
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"},
}
_ADVICE = "export the model again with `--format packed`"
_PAGE = 4096
ENTRY = 256  # bytes of a header entry, at most


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
        if asked.adaptive and not copies and self.quantize is None and not asked.exact:
            usual: Quantization = "int4" if self.calibrated else "int8"
            copies = (usual,) if usual in self.draft_weights and head == self.draft_head else ()
        checks: list[tuple[str, str | None, Collection[str | None]]] = [
            ("dtype", dtype, ("auto", self.dtype)),
            ("quantize", asked.quantize, (None, self.quantize)),
            *(("draft_weights", kind, self.draft_weights) for kind in copies),
            *(("draft_head", head, (self.draft_head,)) for _ in copies[:1]),
        ]
        for field, value, packed in checks:
            there = " or ".join(kind or "left out" for kind in packed) or "left out"
            require(value in packed, field, f"{there}, as the model was packed", value)
        return replace(asked, quantize=self.quantize, draft_weights=copies)


class PackedFile:
    """The packed file of a folder. Its matrices are views of the memory-mapped file."""

    def __init__(self, folder: str | Path) -> None:
        """Reads header and fingerprint. Raises CheckpointError for a damaged or foreign file."""
        self._path = Path(folder) / PACKED_FILE
        with naming(self._path, _ADVICE):
            self._file = open_formed(self._path, _FORM)
            self.content: Content = msgspec.json.decode(
                self._file.metadata.get(_CONTENT, "null"), type=Content
            )
            samples = {name: _sample(self._file.mapped(name)) for name in self._file.entries}
            if self._file.metadata.get(FINGERPRINT) != _fingerprint(samples):
                raise ValueError("its content is damaged or missing, as when it was copied in part")
        self.dtype = TORCH_DTYPES[self.content.dtype]
        exits = {
            int(name.split(".")[1]) for name in self._file.entries if name.startswith("exits.")
        }
        # Only norms are unpacked
        self.exit_blocks = ExitBlocks(tuple(map(ExitBlock, sorted(exits))), self.unpacked)

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
        if form.kind == "fp32" and f"widened.{name}.weight" in self._file.entries:
            form = replace(form, kind="widened")
        return NativeMatrix(
            form,
            {
                part: self._part(f"{form.kind}.{name}.{part}", *kind)
                for part, kind in form.parts.items()
            },
        )

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

    def __init__(self, file: BinaryIO, kernels: Kernels, most: int) -> None:
        """`file` is open and empty. The header has room for `most` tensors."""
        super().__init__(file, (most + 16) * ENTRY)
        self._kernels = kernels
        self._samples: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._samples[name] = _sample(tensor)
        super().add(name, tensor)

    def matrix(
        self, name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]
    ) -> NativeMatrix:
        """Writes a matrix; the returned one has no memory, so the backend cannot run."""
        kinds = (form.kind, "widened") if form.kind == "fp32" else (form.kind,)
        if not any(f"{kind}.{name}.weight" in self._entries for kind in kinds):
            matrix = NativeMatrix.packed(
                self._kernels, name, form, read, narrows=self._kernels.widens_bf16
            )
            for part, tensor in matrix.parts.items():
                self.add(f"{matrix.form.kind}.{name}.{part}", tensor)
        empty = {
            part: torch.empty(shape, dtype=dtype, device="meta")
            for part, (dtype, shape) in form.parts.items()
        }
        return NativeMatrix(form, empty)

    def finish(self, content: Content) -> None:
        """Writes the header, which makes the file valid."""
        self.end(
            {
                **_FORM,
                _CONTENT: json.dumps(asdict(content)),
                FINGERPRINT: _fingerprint(self._samples),
            }
        )


def unpacked_names(spec: ModelSpec, shapes: Shapes) -> list[str]:
    """The names of weights stored unpacked: norms, activations, learned positions, convolutions and
    routers.
    """
    experts = spec.architecture.experts
    mixer = spec.architecture.mixer
    whole = {f"{spec.names.positions}.weight", *spec.mapped}
    if mixer is not None:
        whole |= {
            name
            for name in shapes
            if any(f".{part}." in name for part in (mixer.convolution, *mixer.steps))
        }
    parts = (None if experts is None else (experts.router, experts.shared_gate)) or ()
    routers = tuple(f"{name}.{part}" for name in parts for part in ("weight", "bias"))
    whole |= {name for name in shapes if name.endswith(routers)}
    sizes = {
        name: len(shapes.get(f"{name.rpartition('.')[0]}.weight", shape))
        for name, shape in shapes.items()
    }
    return [name for name, dimensions in sizes.items() if name in whole or dimensions == 1]


def _sample(tensor: Tensor) -> bytes:
    """The first, middle and last bytes."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    middle = len(content) // 2
    return b"".join(
        part.tobytes() for part in (content[:64], content[middle : middle + 64], content[-64:])
    )


def _fingerprint(samples: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()
