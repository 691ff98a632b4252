"""Any exception that ends a command, as one line on stderr."""

import sys
import traceback
import unicodedata

from layerskip_core.errors import LayerSkipError

from .console import stderr_console
from .options import with_flags

_LONGEST = 2_000  # characters of a message
_HIDDEN = ("Cc", "Cs")  # control characters, which terminals act on, and lone surrogates


def tell(error: BaseException, debug: bool) -> None:
    """Prints `error: ...` on stderr; with `debug`, the traceback before it."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    stderr_console().print(f"error: {one_line(error)}", style=None, markup=False, highlight=False, soft_wrap=True)


def one_line(error: BaseException) -> str:
    """What is wrong. An unexpected exception is shown with its type, and with how to see its traceback."""
    text = _folded(with_flags(str(error)))
    kind = type(error).__name__
    if isinstance(error, LayerSkipError | OSError):
        return text or kind
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {text}; --debug shows where"
    return f"{kind}: {text}; --debug shows where" if text else f"{kind}; --debug shows where"


def _folded(text: str) -> str:
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    line = "".join(
        character if unicodedata.category(character) not in _HIDDEN else ascii(character)[1:-1] for character in line
    )
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
