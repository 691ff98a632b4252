"""Train a checkpoint and what drafts for it."""

import math
import os
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from layerskip_core.config.model import DataConfig
from layerskip_core.config.options import Flag, Threads
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.errors import ConfigError, TrainingInterrupted, first_line, shown
from layerskip_core.files import read_bytes

from ..console import narrate, show_picture, stage_bars, waiting
from ..loading import use_free_threads
from ..options import FLAGS, command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.info import CheckpointInfo
    from layerskip_core.training.plan import Plan
    from layerskip_core.training.progress import StepReport
    from layerskip_core.training.recipe import Recipe
    from layerskip_core.training.run import Job
    from layerskip_core.training.worth import Worth

_BARS = "▁▂▃▄▅▆▇█"
_MOST_CURVES = 12  # exits with a line of their own
_POINTS = 200  # of a curve, at most
_LEAST = 1e-6  # losses below count as this on the logarithmic scale


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
    dry_run: Annotated[bool, Flag("Print what would be done, and stop.", panel="Run")] = False,
    curves: Annotated[
        bool, Flag("Draw the loss of every exit while training; without a terminal, at its end.", panel="Run")
    ] = False,
    threads: Annotated[Threads, Flag("CPU threads; 0: torch's choice, but none for a busy core.", panel="Machine")] = 0,
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
    """Train a checkpoint for a task, and then what drafts for it, which costs it nothing.

    With --pmax or another flag of the LayerSkip recipe it learns to exit early: layer dropout, early-exit loss through one
    shared head. Then a layer is trained at an exit, which reads it for drafts; with --regime, a preset of the paper, none is.
    Without the recipe a drafter follows. With --frozen the checkpoint stays as it is, and only what drafts for it is trained.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output my-model --save-steps 200
    """
    reading = f"reading {settings.model} and {settings.data.name}"
    with waiting(reading):
        use_free_threads(threads)
        from layerskip_core.training.run import prepare, prepare_following, run_lock

    with nullcontext() if dry_run else run_lock(settings.output):
        with waiting(reading):
            job: Job | None = prepare(settings)
        while job is not None:
            narrate(plan_text(job.plan))
            if dry_run:
                return
            _run(job, curves)
            plan, job = job.plan, None  # the second job needs the memory of the first
            if plan.following is not None:
                narrate(f"{settings.output} has the trained model; now what drafts for it")
            job = prepare_following(plan)
    following = "bench"
    if plan.num_layers == 1:
        following = "generate"  # there is no exit to measure
    elif settings.trains_exits and not settings.exit_blocks.frozen:
        following = "sweep-exits"
    elif plan.recipe is not None and not settings.lora_keep:  # blocks stand beside whole weights
        following = "finetune --frozen"
    after = [*following.split(), "--model", settings.output]
    if "--frozen" in after:  # the others find the data in layerskip.json
        after += ["--output", settings.output]
        for name in ("name", "split", "prompt_column", "completion_column"):
            if (value := getattr(settings.data, name)) != getattr(DataConfig, name):
                after += [FLAGS[name], value]
    narrate(f"saved {settings.output}; next: layerskip {shlex.join(after)}")


def _run(job: "Job", curves: bool) -> None:
    drawn, plan = Curves(), job.plan
    with stage_bars({"training": drawn.picture} if curves else {}) as show:

        def report_step(report: "StepReport") -> None:
            if curves:
                drawn.add(report.exit_losses)
            show("training", report.step, report.total_steps, report_text(report, plan.recipe is None))

        try:
            info = job.run(report_step, lambda stage, done, total: show(stage, done, total, ""))
        except TrainingInterrupted as interrupted:
            again = shlex.join(["layerskip", *(flag for flag in sys.argv[1:] if flag != "--resume"), "--resume"])
            where = " (under torchrun, as before)" if "WORLD_SIZE" in os.environ else ""
            narrate(f"{interrupted}; continue with: {again}{where}")
            raise typer.Exit(128 + interrupted.signal) from None
    if curves:
        show_picture(drawn.picture)
    narrate(result_text(info, plan))


def plan_text(plan: "Plan") -> str:
    from layerskip_core.training.data import replayed_rows, rows_per_step

    lines = _block_lines(plan) if plan.recipe is None else _recipe_lines(plan, plan.recipe)
    if plan.step_seconds is not None:
        training, memory = _minutes(plan.step_seconds * plan.total_steps), plan.memory_mb
        lines.append(f"a timed step: {plan.step_seconds:.2g} s, so training in about {training}; about {memory:.0f} MB")
    config, asked, texts = plan.config, plan.config.retention, plan.answers
    if asked.anchor:
        beside = "the model without its adapters" if config.lora_rank else f"a copy in {asked.anchor_weights or 'bf16'}"
        lines.append(f"anchor: {asked.anchor:g} x the divergence from the original, {beside}")
    if asked.replay and texts is not None:
        there = f"{len(texts.known)} are there, the others" if texts.known else "written"
        longest = max(len(start) + texts.how.room(len(start)) for start in texts.prompts)
        lines.append(
            f"replay: {replayed_rows(config)} of the {rows_per_step(config)} rows of a step, of {len(texts.prompts)} texts of "
            f"at most {longest} tokens by the original, {there} in about {_minutes(texts.seconds)}"
        )
    return "\n".join((*lines, *plan.notes))


def _recipe_lines(plan: "Plan", recipe: "Recipe") -> list[str]:
    from layerskip_core.training.sharding import world_size

    config, processes = plan.config, world_size()
    rows = f"a stream, cut at {config.max_length} tokens"
    if plan.rows is not None:
        left_out = f", {plan.left_out} left out, whose prompts leave no room" if plan.left_out else ""
        rows = f"{plan.rows} rows, {plan.tokens} tokens, {plan.truncated} truncated at {config.max_length}{left_out}"
    adapted = "" if plan.adapted_layers is None else f"adapters on layers 1 to {plan.adapted_layers}, "
    sharded = ", weights and optimizer sharded (FSDP2)" if config.fsdp else ""
    shared = "" if processes == 1 else f" in each of {processes} processes{sharded}"
    lines = [
        f"{config.regime or 'finetune'} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {rows}",
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{adapted}{plan.dtype} on {plan.device}{shared}",
    ]
    if not config.trains_exits:
        then = "; then a drafter beside the result" if plan.following else ""
        return [*lines, f"trained at full depth alone, as any model{then}"]
    dropout = f"p_max {recipe.p_max}{' constant over depth' if recipe.dropout_profile == 'constant' else ''}"
    named = f" over {','.join(map(str, recipe.exits))}" if recipe.exits else ""
    then = "; then a block at each" if recipe.exits else "; then a block at an exit"
    rotation = f" R={recipe.rotation}" if recipe.rotation else ""
    return [
        *lines,
        f"recipe: {dropout}, e_scale {recipe.e_scale}, {recipe.curriculum}{named}{rotation}, "
        f"{plan.exits_per_step:.1f} exits per step{then if plan.following else ''}",
    ]


def _block_lines(plan: "Plan") -> list[str]:
    config, blocks, rows = plan.config, plan.config.exit_blocks, plan.rows or 0
    most, writing = "", ""
    left_out = f", {plan.left_out} left out" if plan.left_out else ""
    if plan.answers is not None and plan.answers.prompts:
        known = len(plan.answers.known)
        most = "at most " if known < len(plan.answers.prompts) else ""
        writing = f"{known} answers are there, the others in {most}{_minutes(plan.answers.seconds)}; "
    what = f"blocks at exits {','.join(map(str, config.recipe.exits or ()))}"
    reads, steps = f"feature {blocks.feature}", "steps per exit"
    if blocks.layout == "eagle3":
        what, reads, steps = "a drafter in the EAGLE-3 layout", f"at most {blocks.draft_vocab} tokens", "steps"
    return [
        f"{what} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers), which stays as it is; "
        f"{plan.trained / 1e6:.1f}M parameters, {reads}, loss {blocks.loss}",
        f"on {config.data.name}: {rows} rows and {plan.held_out} held out{left_out}, answers of the {blocks.answers}, "
        f"{most}{plan.tokens} tokens",
        f"{writing}states in {most}{_minutes(plan.state_seconds)} and {plan.disk_mb:.0f} MB of disk",
        f"{plan.steps} {steps} of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{plan.dtype} on {plan.device}",
        *(() if plan.worth is None else (_worth_line(plan.worth, config.model),)),
    ]


def _worth_line(worth: "Worth", model: str) -> str:
    speeds = ", ".join(f"{speed:.2f}x at {share:.0%}" for share, speed in worth.speeds.items())
    return (
        f"drafts here would take {worth.draft:.2f} of a step ({worth.step * 1e3:.3g} ms) each, so by drafts accepted about "
        f"{speeds} of plain decoding; without training, low-bit copies and lookups draft: "
        f"layerskip bench --model {shlex.quote(model)}"
    )


def report_text(report: "StepReport", frozen: bool) -> str:
    """How a step is shown; `frozen`: of a run that trains exit blocks."""
    speed = f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"
    exits = _by_exit(report.exit_losses, ".3f" if frozen else ".2f")
    if frozen:
        agreement = _by_exit(report.agreement, ".1%")
        return f"divergence {exits} {f'first drafts agree {agreement} ' if agreement else ''}{speed}"
    held_out = f"held-out {report.validation_losses[max(report.validation_losses)]:.3f} " if report.validation_losses else ""
    anchor = "" if report.divergence is None else f"divergence {report.divergence:.3f} "
    return f"loss {report.loss:.3f} last layer {report.final_loss:.3f} exits {exits} {held_out}{anchor}{speed}"


def _by_exit(values: dict[int, float], form: str) -> str:
    """A few of the exits; a drafter in the EAGLE-3 layout, whose key is 0, stands at none."""
    return " ".join(f"{layer}:{value:{form}}" if layer else f"{value:{form}}" for layer, value in spread(values))


def result_text(info: "CheckpointInfo", plan: "Plan") -> str:
    """The last loss of every exit, held-out losses included, or the last figures of each block."""
    if plan.recipe is None:
        names = map(str, plan.config.recipe.exits or ("eagle3",))
        trained = {name: info.details["exit_blocks"][name] for name in names}
        return "\n".join(
            f"{f'exit {name}' if name.isdigit() else name}: divergence {block['divergence']:.3f}"
            + (f", first drafts agree {block['agreement']:.1%} on held-out rows" if "agreement" in block else "")
            for name, block in trained.items()
        )
    kinds = (("final_losses", "loss by exit"), ("validation_losses", "on held-out rows"))
    return "\n".join(
        f"{what}: " + "  ".join(f"{layer}: {loss:.3f}" for layer, loss in info.details[name].items())
        for name, what in kinds
        if info.details[name]
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def spread(losses: dict[int, float], count: int = 4) -> list[tuple[int, float]]:
    """At most `count` exits at even distances, the last one among them, so that they fit in one line."""
    items = list(losses.items())
    count = min(count, len(items))
    return [items[index * len(items) // count - 1] for index in range(1, count + 1)]


class Curves:
    """The loss of every exit over the steps of a training, kept of at most `_POINTS` steps at even distances."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._kept: list[dict[int, float]] = []
        self._steps, self._distance = 0, 1

    def add(self, losses: Mapping[int, float]) -> None:
        """The latest loss of every exit, after a step."""
        self._latest = dict(losses)
        self._first = self._latest | self._first
        if self._steps % self._distance == 0:
            self._kept.append(self._latest)
        self._steps += 1
        if len(self._kept) == _POINTS:
            self._kept, self._distance = self._kept[::2], self._distance * 2

    def picture(self, width: int) -> Text:
        """A line per exit: its loss at first, over the steps and now. One logarithmic scale for all lines, so they compare.

        `width`: characters of a line. Of more than twelve exits every second, third, ... is shown, and always the last.
        """
        text, layers = Text(), sorted(self._latest)
        text.append("loss: at first, over the steps, now\n", style="dim")
        apart = -(-len(layers) // _MOST_CURVES) or 1
        steps = [*self._kept, self._latest]
        together = max(1, -(-len(steps) // max(width - 24, 10)))
        means = [_mean(steps[start : start + together]) for start in range(0, len(steps), together)]
        seen = [math.log(max(loss, _LEAST)) for point in means for loss in point.values()]
        for layer in layers[(len(layers) - 1) % apart :: apart]:
            name = f"exit {layer:>3}" if layer else "drafter "
            text.append(f"{name} {self._first[layer]:>6.3f} ")
            bars = (_bar(point[layer], min(seen), max(seen)) if layer in point else " " for point in means)
            text.append("".join(bars), style="bold" if layer == layers[-1] else "green")
            text.append(f" {self._latest[layer]:.3f}\n")
        return text


def _mean(points: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean loss of each exit, over the points that have it."""
    layers = dict.fromkeys(layer for point in points for layer in point)
    return {layer: fmean(point[layer] for point in points if layer in point) for layer in layers}


def _bar(loss: float, lowest: float, highest: float) -> str:
    """`lowest`, `highest`: logarithms of losses."""
    share = (math.log(max(loss, _LEAST)) - lowest) / (highest - lowest) if highest > lowest else 0.0
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]
