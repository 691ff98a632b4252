"""Journals: files of JSON lines that grow with a run. A process that is killed can leave the last line incomplete."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import LayerSkipError
from .writing import write_file


def whole_lines(path: Path, error: type[LayerSkipError]) -> list[bytes]:
    """The lines with their ends, without an incomplete one; none if there is no file. Raises `error` if it cannot be read."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def drop_incomplete_line(path: Path, error: type[LayerSkipError]) -> None:
    """Before lines are added: the first of them would go on with it."""
    whole = b"".join(whole_lines(path, error))
    if path.exists() and path.stat().st_size > len(whole):
        write_file(path, whole, error)


def append_lines(path: Path, values: Iterable[object], error: type[LayerSkipError]) -> None:
    """Adds a line for each value. Raises `error` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason
