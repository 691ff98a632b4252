"""Standard input, which carries prompts only: no library can read it as the answer to a question of its own."""

import io
import sys
from contextlib import suppress
from typing import TextIO

_taken: TextIO | None = None


def take() -> None:
    """Keeps standard input for `prompts_stream` and replaces it by an empty stream. `main` calls this first."""
    global _taken
    _taken, sys.stdin = sys.stdin, io.StringIO()


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
    """The input that `take` kept, as UTF-8 text; empty if the process was started without one.

    Invalid bytes become lone surrogates, as in arguments, so that the prompt they are in is refused.
    """
    if _taken is None:
        return io.StringIO()
    _taken.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[attr-defined]
    return _taken
