"""`layerskip finetune`: the recipe on an existing checkpoint, or from scratch."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.options import MACHINE, RUN, Threads, check
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.errors import TrainingInterrupted

from ..config_file import read_config
from ..console import narrate, show_picture, stage_bars
from ..loading import use_free_threads
from ..pictures import Curves
from ..signature import command

if TYPE_CHECKING:
    from layerskip_core.training.progress import StepReport


@command
def finetune(
    *,
    settings: FinetuneConfig,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and stop.", rich_help_panel=RUN)
    ] = False,
    curves: Annotated[
        bool,
        typer.Option(
            "--curves",
            help="Draw the loss of every exit while training; without a terminal, at its end.",
            rich_help_panel=RUN,
        ),
    ] = False,
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0: torch's choice, but none for a busy core.", rich_help_panel=MACHINE)
    ] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=read_config,
            is_eager=True,
            help="TOML file with any of these flags; a flag on the command line wins.",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Convert a checkpoint by the LayerSkip recipe: layer dropout and early-exit loss through one shared head.

    With --frozen the checkpoint stays as it is, and blocks that draft for it are trained at its exits.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output my-model --save-steps 200
    """
    check("threads", Threads, threads)
    use_free_threads(threads)
    from layerskip_core.training.run import prepare, run_lock

    from ..training_text import plan_text, report_text, result_text

    frozen, drawn = settings.exit_blocks.frozen, Curves() if curves else None
    with nullcontext() if dry_run else run_lock(settings.output):
        job = prepare(settings)
        narrate(plan_text(job.plan))
        if dry_run:
            return
        with reported(drawn, report_text(frozen)) as (report_step, show):
            info = job.run(report_step, lambda stage, done, total: show(stage, done, total, ""))
    narrate(result_text(info, job.plan))
    following = "bench" if frozen else "sweep-exits"
    narrate(f"saved {settings.output}; next: layerskip {following} --model {shlex.quote(settings.output)}")


@contextmanager
def reported(
    curves: Curves | None, text: "Callable[[StepReport], str]"
) -> "Iterator[tuple[Callable[[StepReport], None], Callable[[str, int, int, str], None]]]":
    """Yields what is called after each step of the training, and after each of what comes before it."""
    with resumable(), stage_bars({} if curves is None else {"training": curves.picture}) as show:

        def report_step(report: "StepReport") -> None:
            if curves is not None:
                curves.add(report.exit_losses)
            show("training", report.step, report.total_steps, text(report))

        yield report_step, show
    if curves is not None:
        show_picture(curves.picture)


@contextmanager
def resumable() -> Iterator[None]:
    """Ends the command when a signal ends the training, with the command that goes on."""
    from ..training_text import resume_command

    try:
        yield
    except TrainingInterrupted as interrupted:
        narrate(f"{interrupted}; continue with: {resume_command()}")
        raise typer.Exit(128 + interrupted.signal) from None
