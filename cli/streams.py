"""The standard streams, usable in any state that the shell left them in: closed, full, or with a reader that went away.

Standard input carries prompts only: no library can read it as the answer to a question of its own.
"""

import errno
import io
import os
import select
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO

from layerskip_core.errors import LayerSkipError

from .console import narrate

_EXAMPLE = "remind me to call mom at 5"
_taken: TextIO | None = None


def take() -> None:
    """Makes all three usable. `main` calls this first."""
    _fill_descriptors()
    _take_input()
    # A descriptor that was closed is now /dev/null for reading: writing to it fails, which is reported as an error.
    out = sys.stdout if sys.stdout is not None else open(1, "w", closefd=False)  # noqa: SIM115
    out.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # whatever the locale
    sys.stdout = _Results(out)
    err = sys.stderr if sys.stderr is not None else open(os.devnull, "w")  # noqa: SIM115
    err.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as it is, unless it was replaced
    sys.stderr = _Narration(err)


def finish() -> None:
    """Flushes standard output. Raises LayerSkipError if that fails, BrokenPipeError if its reader went away."""
    sys.stdout.flush()


def give_up() -> None:
    """Sends what is still buffered for standard output to /dev/null, so that the interpreter's exit does not fail."""
    _to_null(sys.stdout)


class _Results:
    """Standard output; failures to write become errors that name it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _named(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _named(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Narration:
    """Standard error; failures to write are ignored, because progress messages must not end a command."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _to_null(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_null(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _named(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return error
    reason = "it is closed" if error.errno == errno.EBADF else error.strerror
    return LayerSkipError(f"standard output cannot be written: {reason}")


def _fill_descriptors() -> None:
    """Opens /dev/null on closed descriptors 0 to 2. Otherwise the next file opened would get their number, and C's output."""
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)


def _to_null(stream: Any) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a file
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _take_input() -> None:
    """Keeps standard input for `prompts_stream` and replaces it by an empty stream.

    Its encoding is set here because it cannot change after the first read. Invalid bytes become lone surrogates, as in
    arguments, so that the prompt they are in is refused.
    """
    global _taken
    _taken, sys.stdin = sys.stdin, io.StringIO()
    if isinstance(_taken, io.TextIOWrapper):
        _taken.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def example_prompt() -> str:
    """For a command that was given no prompt, which it says."""
    narrate(f"no PROMPT given; an example: {_EXAMPLE}")
    return _EXAMPLE


def is_piped() -> bool:
    """Whether standard input exists and is not a terminal."""
    return _taken is not None and not _taken.isatty()


def is_terminal() -> bool:
    return _taken is not None and _taken.isatty()


def typed_line(prompt: str) -> str:
    """A line that is typed at a terminal, without its end, and with the usual keys to edit it. Raises EOFError after Ctrl-D."""
    if not sys.stdout.isatty():  # `input` would write the prompt to the results
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = prompts_stream().readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")
    with suppress(ImportError):  # Windows has none; its consoles edit lines themselves
        import readline  # noqa: F401  `input` uses it
    kept, sys.stdin = sys.stdin, prompts_stream()
    try:
        return input(prompt)
    finally:
        sys.stdin = kept


def prompts_stream() -> TextIO:
    """The input that `take` kept, as UTF-8 text; empty if the process was started without one."""
    return io.StringIO() if _taken is None else _taken


class PromptLines(Iterator[str]):
    """The lines of `prompts_stream`, without their ends. Unlike a stream they can be asked whether the next one is there."""

    def __init__(self) -> None:
        self._stream = _taken
        self._encoding = "utf-8-sig"  # of the first line: it may begin with a byte order mark
        self._lines: deque[bytes] = deque()
        self._begun: list[bytes] = []  # parts of the next line
        self._is_over = _taken is None

    def __next__(self) -> str:
        while not self._lines and not self._is_over:
            self._read()
        if not self._lines:
            raise StopIteration
        line = self._lines.popleft().decode(self._encoding, "surrogateescape")
        self._encoding = "utf-8"
        return line.rstrip("\r")

    def is_ready(self) -> bool:
        """Whether the next line, or the end, can be had without waiting for the process that writes it, as far as is known."""
        return bool(self._lines) or self._is_over or _has_data(self._descriptor())

    def _read(self) -> None:
        assert self._stream is not None
        descriptor = self._descriptor()
        new = self._stream.buffer.read() if descriptor is None else os.read(descriptor, 1 << 16)
        self._is_over = not new or descriptor is None
        *ended, rest = new.split(b"\n")
        for part in ended:
            self._lines.append(b"".join((*self._begun, part)))
            self._begun = []
        if rest:
            self._begun.append(rest)
        if self._is_over and self._begun:
            self._lines.append(b"".join(self._begun))

    def _descriptor(self) -> int | None:
        """None for a stream in memory."""
        try:
            return None if self._stream is None else self._stream.fileno()
        except OSError:  # io.UnsupportedOperation is one
            return None


def _has_data(descriptor: int | None) -> bool:
    if descriptor is None or stat.S_ISREG(os.fstat(descriptor).st_mode):
        return True
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    except OSError:  # Windows knows it of sockets only
        return False
