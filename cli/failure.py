"""Whatever ends a command, as the one line that people see."""

import sys
import traceback
import unicodedata

from layerskip_core.errors import LayerSkipError

from .console import stderr_console
from .options import with_flags

_LONGEST = 2_000  # characters of a message
_HIDDEN = ("Cc", "Cs")  # control characters, which a terminal obeys, and halves of surrogate pairs


def tell(error: BaseException, debug: bool) -> None:
    """Prints `error: ...` on stderr; before it, with `debug`, where it was raised."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    stderr_console().print(f"error: {one_line(error)}", style=None, markup=False, highlight=False, soft_wrap=True)


def one_line(error: BaseException) -> str:
    """What is wrong. A bug's exception has its type's name before it, and how to see more of it behind it."""
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
