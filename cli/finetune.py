"""`layerskip finetune`: the recipe on an existing checkpoint, or from scratch."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from layerskip_core.config.ranges import require_ranges
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.errors import TrainingInterrupted

from . import options
from .config_file import read_config
from .console import narrate, stage_bars, use_threads
from .signature import command


@command
def finetune(
    *,
    settings: FinetuneConfig,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and stop.", rich_help_panel=options.RUN)
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", rich_help_panel=options.MACHINE)] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=read_config,
            is_eager=True,
            help="TOML file with any of these flags; a flag on the command line wins.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
) -> None:
    """Convert a checkpoint by the LayerSkip recipe: layer dropout and early-exit loss through one shared head.

    With --frozen the checkpoint stays as it is, and blocks that draft for it are trained at its exits.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output my-model --save-steps 200
    """
    require_ranges(threads=threads)
    use_threads(threads)
    if settings.exit_blocks.frozen:
        train_blocks(settings, dry_run)
    else:
        train_recipe(settings, dry_run)


def train_recipe(settings: FinetuneConfig, dry_run: bool) -> None:
    """The recipe, on all weights."""
    from layerskip_core.training.prepare import prepare
    from layerskip_core.training.session import run_lock

    from .training_text import losses_text, plan_text, report_text

    with nullcontext() if dry_run else run_lock(settings.output):
        job = prepare(settings)
        narrate(plan_text(job.config, job.plan))
        if dry_run:
            return
        with resumable(), stage_bars() as show:
            info = job.run(
                lambda report: show("training", report.step, report.total_steps, report_text(report)),
                lambda progress: show(progress.stage, progress.done, progress.total, ""),
            )
    narrate(losses_text(info))
    narrate(f"saved {settings.output}; next: layerskip sweep-exits --model {shlex.quote(settings.output)}")


def train_blocks(settings: FinetuneConfig, dry_run: bool) -> None:
    """Exit blocks beside a model that stays as it is."""
    from layerskip_core.training.frozen.prepare import prepare_frozen
    from layerskip_core.training.session import run_lock

    from .training_text import block_report_text, blocks_text, frozen_plan_text

    with nullcontext() if dry_run else run_lock(settings.output):
        job = prepare_frozen(settings)
        narrate(frozen_plan_text(job.config, job.plan))
        if dry_run:
            return
        with resumable(), stage_bars() as show:
            trained = job.run(
                lambda report: show("training", report.step, report.total_steps, block_report_text(report)),
                lambda progress: show(progress.stage, progress.done, progress.total, ""),
            )
    narrate(blocks_text(trained))
    narrate(f"saved {settings.output}; next: layerskip bench --model {shlex.quote(settings.output)}")


@contextmanager
def resumable() -> Iterator[None]:
    """Ends the command when a signal ends the training, with the command that goes on."""
    from .training_text import resume_command

    try:
        yield
    except TrainingInterrupted as interrupted:
        narrate(f"{interrupted}; continue with: {resume_command()}")
        raise typer.Exit(128 + interrupted.signal) from None
