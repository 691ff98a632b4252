"""The standard streams, usable in any state that the shell left them in: closed, full, or with a reader that went away."""

import errno
import os
import sys
from typing import Any, TextIO

from layerskip_core.errors import LayerSkipError

from . import standard_input


def take() -> None:
    """Makes all three usable. `main` calls this first."""
    _fill_descriptors()
    standard_input.take()
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
