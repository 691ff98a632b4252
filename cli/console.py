"""What people read while a command works: all of it on stderr, so that stdout carries results only."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from layerskip_core.config.packing import PackingConfig, Quantization
from layerskip_core.config.ranges import require_ranges

from .flags import with_flags

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str, typer.Option("--dtype", help="auto, fp32 or bf16.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0 is torch's choice, or 1 for a small model.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="int8 or int4 weights, on the CPU. [default: none]")]
DraftWeights = Annotated[
    str | None, typer.Option("--draft-weights", help="Draft with int8 or int4 copies of the weights; the target keeps its own.")
]
DraftVocab = Annotated[int, typer.Option("--draft-vocab", help="Draft only among the N most frequent tokens; 0 is all.")]
Exact = Annotated[bool, typer.Option("--exact", help="Output bit for bit that of plain decoding, in any precision; slower.")]

_SMALL_WIDTH = 256  # of the hidden states
_PLAIN_SECONDS = 10.0  # between two plain lines


@cache
def stderr_console() -> Console:
    return Console(stderr=True, emoji=False)


class ResultsConsole(Console):
    """Prints results on stdout. A reader that went away ends the command as it does elsewhere: rich would exit with 1."""

    def __init__(self) -> None:
        super().__init__(highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def narrate(text: str) -> None:
    """One line for the person who waits, with flags in the place of settings."""
    if _is_first_process():
        stderr_console().print(with_flags(text), markup=False, highlight=False, soft_wrap=True)


def packing(
    quantize: str | None, draft_weights: str | None, draft_vocab: int, exact: bool, draft_layers: int = 0
) -> PackingConfig:
    """The flags about weights as settings."""
    return PackingConfig(
        cast(Quantization | None, quantize), cast(Quantization | None, draft_weights), draft_layers, draft_vocab, exact
    )


def narrate_notes(loaded: "Decoder") -> None:
    """What there is to know of how a model runs here."""
    for note in loaded.notes:
        narrate(note)


def use_threads(threads: int, loaded: "Decoder | None" = None) -> None:
    """Sets torch's CPU threads; with 0 they stay torch's choice, but for decoding with a small model (`loaded`): then one.

    Such a model's products are over in the time that threads take to meet, and where another process holds a core they wait
    for it at every one: measured on two cores with 160 wide layers and torch's kernels, the same speed when quiet, far below
    half when not. Our own kernels gain 1.6 times from a second thread when it is quiet.
    """
    small = loaded is not None and loaded.backend.device.type == "cpu" and loaded.backend.hidden_size < _SMALL_WIDTH
    require_ranges(threads=threads)
    if threads or small:
        import torch

        torch.set_num_threads(threads or 1)


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Gives `update(done, text)`: a bar on a terminal, else a plain line every ten seconds and at the end."""
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
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, text="", start=False)
        begun = False

        def update(done: int, text: str) -> None:
            nonlocal begun
            if not begun:  # a resumed run begins in the middle, which is no measure of its speed
                bar.reset(task, completed=done - 1)
                begun = True
            bar.update(task, completed=done, text=text)

        yield update


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _plain_updates(total: int, label: str) -> Callable[[int, str], None]:
    started = time.monotonic()
    shown = started
    before = -1  # steps done when the first was reported begun: not 0 in a resumed run

    def update(done: int, text: str) -> None:
        nonlocal shown, before
        before = done - 1 if before < 0 else before
        now = time.monotonic()
        if now - shown < _PLAIN_SECONDS and done < total:
            return
        shown = now
        left = (now - started) / max(done - before, 1) * (total - done)
        print(f"{label} {done}/{total} {text} {left:.0f} s left", file=sys.stderr, flush=True)

    return update
