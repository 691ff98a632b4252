"""Standard input, which carries prompts only: no library can read it as the answer to a question of its own."""

import io
import sys
from typing import TextIO

_taken: TextIO | None = None


def take() -> None:
    """Keeps standard input for `prompts_stream` and replaces it by an empty stream. `main` calls this first."""
    global _taken
    _taken, sys.stdin = sys.stdin, io.StringIO()


def is_piped() -> bool:
    """Whether standard input exists and is not a terminal."""
    return _taken is not None and not _taken.isatty()


def prompts_stream() -> TextIO:
    """The input that `take` kept, as UTF-8 text; empty if the process was started without one.

    Invalid bytes become lone surrogates, as in arguments, so that the prompt they are in is refused.
    """
    if _taken is None:
        return io.StringIO()
    _taken.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[attr-defined]
    return _taken
