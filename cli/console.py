"""Narration and progress, all on stderr: stdout carries results only."""

import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from layerskip_core.errors import LayerSkipError

from .options import with_flags

_PLAIN_SECONDS = 10.0  # between two progress lines
_LONGEST = 2_000  # characters of an error
_UNSHOWN = ("Cc", "Cs")  # control characters, which terminals act on, and lone surrogates


@cache
def stderr_console() -> Console:
    return Console(stderr=True, emoji=False)


class ResultsConsole(Console):
    """Prints results on stdout. A closed pipe ends the command quietly, as elsewhere; rich alone would exit with status 1."""

    def __init__(self) -> None:
        super().__init__(highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def narrate(text: str) -> None:
    """One line for the person who waits, with flags in the place of settings."""
    if _is_first_process():
        stderr_console().print(with_flags(text), markup=False, highlight=False, soft_wrap=True)


def tell_error(error: BaseException, debug: bool) -> None:
    """Prints `error: ...`; with `debug`, the traceback before it."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    stderr_console().print(f"error: {one_line(error)}", style=None, markup=False, highlight=False, soft_wrap=True)


def one_line(error: BaseException) -> str:
    """The error message. An unexpected exception comes with its type and a hint at --debug."""
    line = " ".join(part for part in map(str.strip, with_flags(str(error)).splitlines()) if part)
    text = "".join(ascii(each)[1:-1] if unicodedata.category(each) in _UNSHOWN else each for each in line[: _LONGEST + 1])
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    kind = type(error).__name__
    if isinstance(error, LayerSkipError | OSError):
        return text or kind
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {text}; --debug shows where"
    return f"{kind}: {text}; --debug shows where" if text else f"{kind}; --debug shows where"


def waiting(text: str) -> AbstractContextManager[object]:
    """On a terminal, a line while libraries are imported and a model is read."""
    return stderr_console().status(text) if _is_first_process() else nullcontext()


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yields `show(stage, done, total, text)`: on a terminal a bar for each stage of the work, after the one before.

    Elsewhere a plain line every ten seconds and at the end of a stage.
    """
    if not _is_first_process():
        yield lambda *_: None
    elif not stderr_console().is_terminal:
        yield _plain_lines()
    else:
        description, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
        columns = (SpinnerColumn(), description, BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), text)
        with Progress(*columns, console=stderr_console(), transient=True) as bar:

            def show(stage: str, done: int, total: int, text: str) -> None:
                if not bar.tasks or bar.tasks[0].description != stage:
                    for task in bar.task_ids:
                        bar.remove_task(task)
                    # A resumed run begins in the middle, which says nothing about its speed.
                    bar.add_task(stage, total=total, completed=max(done - 1, 0), text=text)
                bar.update(bar.task_ids[0], completed=done, text=text)

            yield show


def _plain_lines() -> Callable[[str, int, int, str], None]:
    stage, first, started, shown = "", 0, 0.0, 0.0  # the first report of a resumed run comes in its middle

    def show(name: str, done: int, total: int, text: str) -> None:
        nonlocal stage, first, started, shown
        now = time.monotonic()
        if name != stage:
            stage, first, started, shown = name, done, now, now
        if done < total and now - shown < _PLAIN_SECONDS:
            return
        shown = now
        left = (now - started) / max(done - first, 1) * (total - done)
        print(f"{name} {done}/{total}{text and f' {text}'} {left:.0f} s left", file=sys.stderr, flush=True)

    return show


def _is_first_process() -> bool:
    """True for the one of torchrun's processes that prints."""
    return os.environ.get("RANK", "0") == "0"
