"""Reads the header of a GGUF file within the file's bounds, before a library allocates memory by what it says."""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct codes by type
_MOST_NAME = 1 << 16  # bytes of a key, of a tensor's name or of a text that is kept
_TEXTS = ("general.architecture", "general.name", ".rope.scaling.type")  # that are kept, by the ends of their keys
_ALIGNMENT = "general.alignment"


class GgufTensor(NamedTuple):
    """Where a tensor is in the file. `shape`: as torch has it, the contiguous dimension last."""

    shape: tuple[int, ...]
    kind: int  # ggml's number of how its values are stored
    start: int  # of its bytes in the file


@dataclass(frozen=True)
class GgufHeader:
    """`values`: numbers, and a few texts. `lengths`: of arrays, whose content is not kept."""

    values: Mapping[str, Any]
    lengths: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    @property
    def parameters(self) -> int:
        """In all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError for a file that is shorter than its header says."""
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path.name} is no GGUF file: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(path.name, content).header()


class _Walk:
    """Reads from front to end."""

    def __init__(self, name: str, content: mmap.mmap) -> None:
        self._name = name
        self._content = content
        self._at = 0
        self._values: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{self._name} is no GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._name}: needed GGUF version 2 or 3, found {version}")
        tensors, entries = self._number("Q"), self._number("Q")
        for _ in range(self._fitting(entries, 12, "entries")):
            self._entry()
        listed = [self._tensor() for _ in range(self._fitting(tensors, 24, "tensors"))]
        begin = self._aligned(self._at)
        placed = {name: tensor._replace(start=begin + tensor.start) for name, tensor in listed}
        if len(placed) < len(listed):
            raise self._error("two tensors have the same name")
        return GgufHeader(self._values, self._lengths, placed)

    def _aligned(self, at: int) -> int:
        """Where the tensors begin, if their list ends here."""
        alignment = self._values.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"{_ALIGNMENT} must be a power of two, got {alignment}")
        return -(-at // alignment) * alignment

    def _tensor(self) -> tuple[str, GgufTensor]:
        """A tensor by its name; it starts where the tensors do. Even with one bit each its numbers must fit into the file."""
        name = self._text(_MOST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._error(f"tensor {name} must have 1..{_MOST_DIMENSIONS} dimensions, found {dimensions}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, start = self._number("I"), self._number("Q")
        if prod(shape) // 8 + start > len(self._content):
            raise self._error(f"tensor {name} of {prod(shape)} numbers does not fit into {len(self._content)} bytes")
        return name, GgufTensor(shape, kind, start)

    def _entry(self) -> None:
        key, kind = self._text(_MOST_NAME), self._number("I")
        if key in self._values or key in self._lengths:
            raise self._error(f"the key {key} is there twice")
        if kind in _SCALARS:
            self._values[key] = self._number(_SCALARS[kind])
        elif kind == _ARRAY:
            self._lengths[key] = self._skip_array()
        elif kind != _STRING:
            raise self._error(f"unknown value type {kind}")
        elif key.endswith(_TEXTS):
            self._values[key] = self._text(_MOST_NAME)
        else:
            self._skip_text()

    def _skip_array(self) -> int:
        """Its length."""
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self._at += self._fitting(count, size, "numbers") * size
        elif kind == _STRING:
            for _ in range(self._fitting(count, 8, "texts")):
                self._skip_text()
        else:
            raise self._error(f"unknown array type {kind}")
        return int(count)

    def _fitting(self, count: int, least: int, what: str) -> int:
        """`count`. Raises CheckpointError if that many items of `least` bytes or more do not fit into the rest of the file."""
        if count * least > len(self._content) - self._at:
            raise self._error(f"{count} {what} do not fit into {len(self._content)} bytes")
        return count

    def _text(self, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise self._error(f"a name of {length} bytes is longer than {most}")
        return self._take(length).decode("utf-8", "replace")

    def _skip_text(self) -> None:
        length = self._number("Q")
        self._at += self._fitting(length, 1, "bytes of text")

    def _number(self, code: str) -> Any:
        (number,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return number

    def _take(self, count: int) -> bytes:
        if count > len(self._content) - self._at:
            raise self._error(f"it ends in its header, after {len(self._content)} bytes")
        taken = self._content[self._at : self._at + count]
        self._at += count
        return taken

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._name} is damaged: {what}")
