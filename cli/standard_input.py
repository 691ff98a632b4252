"""Standard input, which carries prompts and nothing else: no library may read an answer to a question of its own from it."""

import io
import sys
from typing import TextIO

_taken: TextIO | None = None


def take() -> None:
    """Keeps standard input for `prompts_stream` and leaves an empty one in its place. `main` calls it before anything else."""
    global _taken
    _taken, sys.stdin = sys.stdin, io.StringIO()


def is_piped() -> bool:
    """Whether there is an input, and it is not a terminal."""
    return _taken is not None and not _taken.isatty()


def prompts_stream() -> TextIO:
    """The input that `take` kept, as UTF-8 text; empty where the process was started without one.

    Bytes that are none become halves of surrogate pairs, as in arguments: the prompt that they are in is then refused.
    """
    if _taken is None:
        return io.StringIO()
    _taken.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[attr-defined]
    return _taken
