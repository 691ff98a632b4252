"""`layerskip finetune`: the recipe on an existing checkpoint, or from scratch."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from layerskip_core.config.ranges import require_ranges
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.errors import TrainingInterrupted

from . import options
from .config_file import read_config
from .console import narrate, progress_bar, use_threads
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

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output my-model --save-steps 200
    """
    require_ranges(threads=threads)
    use_threads(threads)
    from layerskip_core.training.prepare import prepare
    from layerskip_core.training.run import run_lock

    from .training_text import losses_text, plan_text, report_text, resume_command

    with nullcontext() if dry_run else run_lock(settings.output):
        job = prepare(settings)
        narrate(plan_text(job.config, job.plan))
        if dry_run:
            return
        try:
            with progress_bar(job.plan.steps, "training") as update:
                info = job.run(lambda report: update(report.step, report_text(report)))
        except TrainingInterrupted as interrupted:
            narrate(f"{interrupted}; continue with: {resume_command()}")
            raise typer.Exit(128 + interrupted.signal) from None
    narrate(losses_text(info))
    narrate(f"saved {settings.output}; next: layerskip sweep-exits --model {shlex.quote(settings.output)}")
