"""What people read while a command works, all on stderr: stdout carries results only."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .options import with_flags

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

_PLAIN_SECONDS = 10.0  # between two progress lines


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


def show_picture(picture: Callable[[int], Text]) -> None:
    """Draws it for the person who waits, as wide as the terminal."""
    if _is_first_process():
        stderr_console().print(picture(stderr_console().width), end="")


def narrate_notes(loaded: "Decoder") -> None:
    """Prints how the model runs here, if there is something to know about it."""
    for note in loaded.notes:
        narrate(note)


class _Bar(Progress):
    """A progress bar, below a picture if there is one."""

    def __init__(self, *columns: ProgressColumn, console: Console, picture: Callable[[int], Text] | None) -> None:
        self._picture, self._width = picture, console.width
        super().__init__(*columns, console=console, transient=True, refresh_per_second=10 if picture is None else 2)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self._picture is not None:
            yield self._picture(self._width)
        yield from super().get_renderables()


@contextmanager
def progress_bar(total: int, label: str, picture: Callable[[int], Text] | None = None) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, text)`: a bar on a terminal, otherwise a plain line every ten seconds and at the end.

    `picture`: drawn above the bar on a terminal of this width, again and again.
    """
    console = stderr_console()
    if not _is_first_process():
        yield lambda done, text: None
        return
    if not console.is_terminal:
        yield _plain_updates(total, label)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with _Bar(*columns, console=console, picture=picture) as bar:
        task = bar.add_task(label, total=total, text="", start=False)
        begun = False

        def update(done: int, text: str) -> None:
            nonlocal begun
            if not begun:  # a resumed run begins in the middle, which says nothing about its speed
                bar.reset(task, completed=max(done - 1, 0))
                begun = True
            bar.update(task, completed=done, text=text)

        yield update


@contextmanager
def stage_bars(pictures: Mapping[str, Callable[[int], Text]] | None = None) -> Iterator[Callable[[str, int, int, str], None]]:
    """Yields `show(stage, done, total, text)`: a bar for each stage of the work, after the one before.

    `pictures`: of stages that have one, see `progress_bar`.
    """
    stage = ""
    update: Callable[[int, str], None] = lambda done, text: None  # noqa: E731
    with ExitStack() as bars:

        def show(what: str, done: int, total: int, text: str) -> None:
            nonlocal stage, update
            if what != stage:
                bars.close()
                stage, update = what, bars.enter_context(progress_bar(total, what, (pictures or {}).get(what)))
            update(done, text)

        yield show


def _is_first_process() -> bool:
    """Whether this process prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _plain_updates(total: int, label: str) -> Callable[[int, str], None]:
    started = time.monotonic()
    shown = started
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
