"""Narration and progress, all on stderr: stdout carries results only."""

import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from layerskip_core.errors import LayerSkipError

from .options import with_flags

_PLAIN_SECONDS = 10.0  # between two progress lines
_LONGEST = 2_000  # characters of an error
_UNSHOWN = ("Cc", "Cs")  # control characters, which terminals act on, and lone surrogates
Picture = Callable[[int], Text]  # by the width of the terminal
_Update = Callable[[int, str], None]


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


def show_picture(picture: Picture) -> None:
    """Draws it for the person who waits, as wide as the terminal."""
    if _is_first_process():
        stderr_console().print(picture(stderr_console().width), end="")


@contextmanager
def stage_bars(pictures: Mapping[str, Picture] | None = None) -> Iterator[Callable[[str, int, int, str], None]]:
    """Yields `show(stage, done, total, text)`: on a terminal a bar for each stage of the work, after the one before.

    Elsewhere a plain line every ten seconds and at the end of a stage. `pictures`: of stages that have one, drawn above the bar
    again and again.
    """
    stage = ""
    update: _Update = lambda done, text: None  # noqa: E731
    with ExitStack() as bars:

        def show(name: str, done: int, total: int, text: str) -> None:
            nonlocal stage, update
            if not _is_first_process():
                return
            if name != stage:
                bars.close()
                if stderr_console().is_terminal:
                    update = bars.enter_context(_bar(name, total, (pictures or {}).get(name)))
                else:
                    update = _plain_updates(name, total)
                stage = name
            update(done, text)

        yield show


class _Bar(Progress):
    """A progress bar, below a picture if there is one."""

    picture: Picture | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.picture is not None:
            yield self.picture(self.console.width)
        yield from super().get_renderables()


@contextmanager
def _bar(label: str, total: int, picture: Picture | None) -> Iterator[_Update]:
    described, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
    columns = (SpinnerColumn(), described, BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), text)
    bar = _Bar(*columns, console=stderr_console(), transient=True, refresh_per_second=10 if picture is None else 2)
    bar.picture = picture
    with bar:
        task = bar.add_task(label, total=total, text="", start=False)

        def update(done: int, text: str) -> None:
            if not bar.tasks[0].started:  # a resumed run begins in the middle, which says nothing about its speed
                bar.reset(task, completed=max(done - 1, 0))
            bar.update(task, completed=done, text=text)

        yield update


def _plain_updates(label: str, total: int) -> _Update:
    started = shown = time.monotonic()
    before: int | None = None  # steps done before the first report: not 0 in a resumed run

    def update(done: int, text: str) -> None:
        nonlocal shown, before
        before = max(done - 1, 0) if before is None else before
        now = time.monotonic()
        if now - shown < _PLAIN_SECONDS and done < total:
            return
        shown = now
        left = (now - started) / max(done - before, 1) * (total - done)
        print(f"{label} {done}/{total}{text and f' {text}'} {left:.0f} s left", file=sys.stderr, flush=True)

    return update


def _is_first_process() -> bool:
    """True for the one of torchrun's processes that prints."""
    return os.environ.get("RANK", "0") == "0"
