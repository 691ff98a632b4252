"""Reading files from outside: only regular files are opened, lines have a bounded length, and errors quote a bounded part."""

import gzip
import itertools
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, LayerSkipError, first_line
from .writing import kind_of

MAX_LINE = 256 << 20  # bytes; a whole line is held in memory
_EXPANSION = 100  # limit of unpacked over packed size of a .gz file: text compresses 20-fold, a decompression bomb 1000-fold
_ALWAYS_UNPACKED = 4 << 20  # bytes that any .gz file may unpack to
_EMPTY_LINES = 1_000_000  # limit of consecutive empty lines, so that a huge file without rows does not take forever
_QUOTED = 80  # characters of a value in an error


def open_regular(path: Path, name: str, error: type[LayerSkipError]) -> BinaryIO:
    """Opens a file for reading. FIFOs and devices are refused: they may block, or never end.

    Raises `error`, whose message begins with `name`, for anything but a readable regular file.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise error(f"{name} must be a regular file, found {kind_of(mode)}")
        return path.open("rb")
    except FileNotFoundError:
        raise error(f"{name}: there is no such file") from None
    except OSError as reason:
        raise error(f"{name} cannot be read: {reason.strerror}") from None


def text_lines(path: Path, setting: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends, without a byte order mark; unpacked if its name ends in .gz.

    Raises DataError for a file that cannot be read (`setting` named it), and, with the line's number, for a line that is not
    UTF-8, holds a NUL or is longer than MAX_LINE, for a million empty lines on end, and for a .gz file that is damaged or
    unpacks to far more than its size.
    """
    with open_regular(path, f"`{setting}` {path}", DataError) as file:
        packed = path.suffix == ".gz"
        source = gzip.GzipFile(fileobj=file) if packed else file
        budget = max(_EXPANSION * os.fstat(file.fileno()).st_size, _ALWAYS_UNPACKED)
        empty = 0
        for number in itertools.count(1):
            try:
                line = source.readline(MAX_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:
                what = "not readable as gzip" if packed else "cannot be read"
                raise DataError(f"{path}:{number}: {what}: {first_line(error)}") from None
            if not line:
                return
            empty = empty + 1 if line.isspace() else 0
            if empty > _EMPTY_LINES:
                raise DataError(f"{path}:{number}: {_EMPTY_LINES} empty lines in a row")
            budget -= len(line)
            if packed and budget < 0:
                raise DataError(f"{path}:{number}: unpacks to more than {_EXPANSION} times its size; text does not")
            yield _decoded(line, path, number)


def read_bytes(path: Path, name: str, error: type[LayerSkipError]) -> bytes:
    """The content of a regular file. Raises `error` like `open_regular`."""
    with open_regular(path, name, error) as file:
        try:
            return file.read()
        except OSError as reason:
            raise error(f"{name} cannot be read: {reason.strerror}") from None


def read_text(path: Path, name: str, error: type[LayerSkipError]) -> str:
    """The text of a UTF-8 file without a byte order mark. Raises `error` like `open_regular`."""
    try:
        return read_bytes(path, name, error).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{name} must be UTF-8 text: {reason.reason} at byte {reason.start + 1}") from None


def quoted(value: Any) -> str:
    """A value for an error message: on one line, at most 80 characters."""
    return _cut(repr(value[: 2 * _QUOTED] if isinstance(value, str | bytes | list) else value))


def listed(names: Iterable[str]) -> str:
    """Names for an error message: on one line, at most 80 characters."""
    return _cut(", ".join(name if name.isprintable() else repr(name) for name in names) or "none")


def _cut(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _decoded(line: bytes, path: Path, number: int) -> str:
    if len(line) > MAX_LINE:
        raise DataError(f"{path}:{number}: a line must have at most {MAX_LINE >> 20} MiB, found a longer one")
    if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:{number}: not UTF-8 text: it begins with the byte order mark of UTF-16")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    if "\0" in text:
        raise DataError(f"{path}:{number}: not UTF-8 text: a NUL at character {text.index(chr(0)) + 1}")
    return text
