"""Train a checkpoint with layer dropout and early-exit loss."""

import shlex
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from layerskip_core.config.options import Flag, Threads
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.errors import ConfigError, TrainingInterrupted, first_line, shown
from layerskip_core.files import read_bytes

from ..console import narrate, show_picture, stage_bars
from ..loading import use_free_threads
from ..options import command
from ..pictures import Curves

if TYPE_CHECKING:
    from layerskip_core.training.progress import StepReport


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a TOML file's values the defaults of the flags, so that a flag on the command line wins."""
    if path is None:
        return None
    try:
        values = tomllib.loads(read_bytes(path, f"--config {path}", ConfigError).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {first_line(error)}") from None
    named = {flag.removeprefix("--"): each for each in context.command.params for flag in each.opts}
    known = {flag: parameter for flag, parameter in named.items() if flag not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            raise ConfigError(f"--config {path}: {shown(key)!r} is no flag of finetune; known: {', '.join(sorted(known))}")
        is_switch = bool(getattr(parameter, "is_flag", False))
        if is_switch != isinstance(value, bool) or not isinstance(value, str | int | float) or "\0" in str(value):
            needed = "true or false" if is_switch else "a text or a number"
            raise ConfigError(f"--config {path}: {parameter.opts[0]} must be {needed}, got {shown(value)}")
        defaults[str(parameter.name)] = value if is_switch else str(value)  # 2.5 is no whole number
    context.default_map = {**cast(dict[str, Any], context.default_map or {}), **defaults}
    return path


@command
def finetune(
    settings: FinetuneConfig,
    dry_run: Annotated[bool, Flag("Run", "Print what would be done, and stop.")] = False,
    curves: Annotated[bool, Flag("Run", "Draw the loss of every exit while training; without a terminal, at its end.")] = False,
    threads: Annotated[Threads, Flag("Machine", "CPU threads; 0: torch's choice, but none for a busy core.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=read_config,
            is_eager=True,
            help="TOML file with any of these flags; a flag on the command line wins.",
            rich_help_panel="Run",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint by the LayerSkip recipe: layer dropout and early-exit loss through one shared head.

    With --frozen the checkpoint stays as it is, and blocks that draft for it are trained at its exits.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output my-model --save-steps 200
    """
    use_free_threads(threads)
    from layerskip_core.training.run import prepare, run_lock

    from ..training_text import plan_text, report_text, result_text, resume_command

    frozen, drawn = settings.exit_blocks.frozen, Curves()
    with nullcontext() if dry_run else run_lock(settings.output):
        job = prepare(settings)
        narrate(plan_text(job.plan))
        if dry_run:
            return
        with stage_bars({"training": drawn.picture} if curves else {}) as show:

            def report_step(report: "StepReport") -> None:
                if curves:
                    drawn.add(report.exit_losses)
                show("training", report.step, report.total_steps, report_text(report, frozen))

            try:
                info = job.run(report_step, lambda stage, done, total: show(stage, done, total, ""))
            except TrainingInterrupted as interrupted:
                narrate(f"{interrupted}; continue with: {resume_command()}")
                raise typer.Exit(128 + interrupted.signal) from None
        if curves:
            show_picture(drawn.picture)
    narrate(result_text(info, job.plan))
    following = "bench" if frozen else "sweep-exits"
    narrate(f"saved {settings.output}; next: layerskip {following} --model {shlex.quote(settings.output)}")
