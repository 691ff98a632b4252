"""Reads the header of a GGUF file within the file's bounds, before a library allocates memory by what it says."""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..model.config_values import check_named

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct codes by type
_MOST_NAME = 1 << 16  # bytes of a key or of a tensor's name

# The keys that set a model's sizes, without the architecture's name before them, and the keys of config.json that they become.
_VALUES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


class GgufHeader(NamedTuple):
    architecture: str
    parameters: int  # in all tensors


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError for a file that is shorter than its header says, or whose sizes are out of range."""
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path.name} is no GGUF file: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(path.name, content).header()


class _Walk:
    """Reads from front to end. It keeps only single numbers and the architecture's name."""

    def __init__(self, name: str, content: mmap.mmap) -> None:
        self._name = name
        self._content = content
        self._at = 0

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{self._name} is no GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._name}: needed GGUF version 2 or 3, found {version}")
        tensors, entries = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(self._fitting(entries, 12, "entries")):
            key = self._text(_MOST_NAME)
            value = self._value(self._number("I"), keep=key == "general.architecture")
            if value is not None:
                values[key] = value
        architecture = str(values.get("general.architecture"))
        check_named(values, {f"{architecture}.{key}": name for key, name in _VALUES.items()})
        parameters = sum(self._tensor() for _ in range(self._fitting(tensors, 24, "tensors")))
        return GgufHeader(architecture, parameters)

    def _tensor(self) -> int:
        """How many numbers a tensor holds. Even with one bit each they must fit into the file."""
        name = self._text(_MOST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._error(f"tensor {name} must have 1..{_MOST_DIMENSIONS} dimensions, found {dimensions}")
        count: int = prod(self._number("Q") for _ in range(dimensions))
        self._take(4)
        if count // 8 + self._number("Q") > len(self._content):
            raise self._error(f"tensor {name} of {count} numbers does not fit into {len(self._content)} bytes")
        return count

    def _value(self, kind: int, keep: bool) -> Any:
        """A number, or a text if `keep`; None for a value that is skipped."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(_MOST_NAME) if keep else self._skip_text()
        if kind != _ARRAY:
            raise self._error(f"unknown value type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._take(self._fitting(count, struct.calcsize(_SCALARS[inner]), "numbers") * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(self._fitting(count, 8, "texts")):
                self._skip_text()
        else:
            raise self._error(f"unknown array type {inner}")
        return None

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
