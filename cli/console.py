"""Prompts on stdin, progress on stderr, results on stdout; any of them may be closed, full or
without a reader.
"""

import io
import os
import select
import stat
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from layerskip_core.errors import LayerSkipError

from .options import with_flags

_PLAIN_SECONDS = 10.0  # between two progress lines
_LONGEST = 2_000  # most characters of an error
_EXAMPLE = "remind me to call mom at 5"
_UNSHOWN = ("Cc", "Cs")  # control characters, which terminals act on, and lone surrogates
_stdin: TextIO | None = None  # standard input


@cache
def stderr_console() -> Console:
    return Console(stderr=True, emoji=False)


class ResultsConsole(Console):
    """Prints results on stdout. A closed pipe ends the command quietly; rich alone would exit with
    status 1.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def narrate(text: str) -> None:
    """Prints a line on stderr, with flags in place of settings in backquotes."""
    if _is_first_process():
        stderr_console().print(with_flags(text), markup=False, highlight=False, soft_wrap=True)


def print_error(error: BaseException, debug: bool) -> None:
    """Prints `error: ...`; with `debug`, the traceback before it."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    stderr_console().print(
        f"error: {one_line(error)}", style=None, markup=False, highlight=False, soft_wrap=True
    )


def one_line(error: BaseException) -> str:
    """The error message. An unexpected exception comes with its type and a hint at --debug."""
    line = " ".join(part for part in map(str.strip, with_flags(str(error)).splitlines()) if part)
    text = "".join(
        ascii(each)[1:-1] if unicodedata.category(each) in _UNSHOWN else each
        for each in line[: _LONGEST + 1]
    )
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    kind = type(error).__name__
    if isinstance(error, LayerSkipError | OSError):
        return text or kind
    if (
        isinstance(error, MemoryError)
        or kind == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
    ):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {text}; --debug shows where"
    return f"{kind}: {text}; --debug shows where" if text else f"{kind}; --debug shows where"


def waiting(text: str) -> AbstractContextManager[object]:
    """On a terminal, a status line while libraries and a model load."""
    return stderr_console().status(text) if _is_first_process() else nullcontext()


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yields `show(stage, done, total, text)`: bars on a terminal, elsewhere lines every ten
    seconds.
    """
    if not _is_first_process():
        yield lambda *_: None
    elif not stderr_console().is_terminal:
        yield _plain_lines()
    else:
        description = TextColumn("{task.description}")
        text = TextColumn("{task.fields[text]}")
        columns = (
            SpinnerColumn(),
            description,
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            text,
        )
        with Progress(*columns, console=stderr_console(), transient=True) as bar:
            task = bar.add_task("", visible=False, text="")

            def show(stage: str, done: int, total: int, text: str) -> None:
                # Steps done before a resume must not count as speed
                if bar.tasks[0].description != stage:
                    bar.reset(
                        task,
                        total=total,
                        completed=max(done - 1, 0),
                        visible=True,
                        description=stage,
                        text=text,
                    )
                bar.update(task, completed=done, text=text)

            yield show


def _plain_lines() -> Callable[[str, int, int, str], None]:
    # A resumed run starts in the middle
    stage = ""
    first = 0
    started = 0.0
    shown = 0.0

    def show(name: str, done: int, total: int, text: str) -> None:
        nonlocal stage, first, started, shown
        now = time.monotonic()
        if name != stage:
            stage = name
            first = done
            started = now
            shown = now
            if done == 0:  # the first answers of a large model take minutes
                print(f"{name} 0/{total}", file=sys.stderr, flush=True)
        if done < total and now - shown < _PLAIN_SECONDS:
            return
        shown = now
        left = (now - started) / max(done - first, 1) * (total - done)
        print(
            f"{name} {done}/{total}{text and f' {text}'} {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return show


def _is_first_process() -> bool:
    """True for rank 0 of torchrun, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


class _Narration(io.TextIOWrapper):
    """Standard error; failures to write are ignored: progress messages must not end a command."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)


def open_streams() -> None:
    """Makes the three streams usable, and standard input unreadable for libraries. `main` calls
    this first.

    Closed descriptors become /dev/null, opened read-only, so that writing results fails. Invalid
    bytes in prompts become lone surrogates, as in arguments; such prompts are refused.
    """
    global _stdin
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    _stdin = sys.stdin
    sys.stdin = io.StringIO()
    if isinstance(_stdin, io.TextIOWrapper):
        _stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # before the first read
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        raw = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115  a buffer would fail at exit
        sys.stderr = _Narration(raw, errors="backslashreplace", write_through=True)


def discard_output() -> None:
    """Sends buffered standard output to /dev/null, so that the interpreter's exit does not fail."""
    with suppress(OSError):  # not a file
        descriptor = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def is_piped() -> bool:
    """True if standard input is open and not a terminal."""
    return _stdin is not None and not _stdin.isatty()


def is_terminal() -> bool:
    return _stdin is not None and _stdin.isatty()


def given_prompt(prompt: str | None, may_be_empty: bool) -> str:
    """The argument, else all of standard input, else an example, announced on stderr."""
    if prompt is None and is_piped():
        prompt = prompts_stream().read().removesuffix("\n")
        prompt = prompt if prompt or may_be_empty else None
    if prompt is None:
        narrate(f"no PROMPT given; an example: {_EXAMPLE}")
    return _EXAMPLE if prompt is None else prompt


def typed_line(prompt: str) -> str:
    """A line typed at a terminal, without its newline, with the usual editing keys. Raises EOFError
    after Ctrl-D.
    """
    if not sys.stdout.isatty():  # `input` would write the prompt to the results
        sys.stderr.write(prompt)
        prompt = ""
    with suppress(ImportError):  # Windows has none; its consoles edit lines themselves
        import readline  # noqa: F401  `input` uses it
    kept = sys.stdin
    sys.stdin = prompts_stream()
    try:
        return input(prompt)
    finally:
        sys.stdin = kept


def prompts_stream() -> TextIO:
    """The standard input that `open_streams` keeps, as UTF-8 text; empty if the process was started without
    one.
    """
    return io.StringIO() if _stdin is None else _stdin


class PromptLines(Iterator[str]):
    """Iterates over the lines of standard input, without newlines."""

    def __init__(self) -> None:
        self._read = bytearray()
        self._is_over = _stdin is None
        self._encoding = "utf-8-sig"
        self._descriptor = -1 if _stdin is None else _stdin.fileno()

    def __next__(self) -> str:
        while b"\n" not in self._read and not self._is_over:
            part = os.read(self._descriptor, 1 << 16)
            self._is_over = not part
            self._read += part
        if not self._read:
            raise StopIteration
        line, end, _ = self._read.partition(b"\n")
        del self._read[: len(line) + len(end)]
        # The first may begin with a BOM
        text = line.decode(self._encoding, "surrogateescape")
        self._encoding = "utf-8"
        return text.rstrip("\r")

    def is_ready(self) -> bool:
        """True if the next line, or the end, can probably be read without waiting."""
        if self._is_over or b"\n" in self._read or stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            return True
        try:
            return bool(select.select([self._descriptor], [], [], 0)[0])
        except OSError:  # on Windows select takes sockets only
            return False
