"""Shared by the commands that train: the course of a run, and what it tells on stderr."""

import json
import os
import shlex
import sys
import tomllib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from layerskip_core.config.model import DataConfig
from layerskip_core.config.options import Flag, Threads
from layerskip_core.config.training import DrafterConfig, TrainingConfig
from layerskip_core.data import spread
from layerskip_core.errors import ConfigError, TrainingInterrupted, first_line, plural, shown
from layerskip_core.files import read_bytes

from .console import narrate, stage_bars, waiting
from .loading import FreeThreads
from .options import FLAGS

if TYPE_CHECKING:
    from layerskip_core.checkpoint.info import Cost
    from layerskip_core.training.cost import AnsweredRow
    from layerskip_core.training.drafter_run import DrafterJob
    from layerskip_core.training.finetune_run import FinetuneJob
    from layerskip_core.training.plan import RunPlan, RunResult
    from layerskip_core.training.progress import StepReport
    from layerskip_core.training.speedup import Speedup, Verdict

_PAYS = 1.05  # least speedup over plain decoding
_LOST = 0.05  # share of changed next tokens above which advice follows
_NO_GAIN = "dropout gained nothing in runs of 100 steps (SmolLM2); --pmax 0 leaves it out"


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the values of a TOML file the defaults of flags, so that a flag on the command line
    wins.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(
            read_bytes(path, f"--config {path}", ConfigError).decode("utf-8-sig")
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {first_line(error)}") from None
    known = {}
    for parameter in context.command.params:
        for flag in parameter.opts:
            known[flag.removeprefix("--")] = str(parameter.name)
    for other in ("config", "help"):
        known.pop(other, None)
    defaults: dict[str, str] = {}
    for key, value in values.items():
        flag = key.replace("_", "-")
        if flag not in known:
            raise ConfigError(
                f"--config {path}: {shown(key)!r} is no flag of {context.info_name}; known: {', '.join(sorted(known))}"
            )
        # As typed in a shell
        defaults[known[flag]] = value if isinstance(value, str) else json.dumps(value, default=str)
    context.default_map = {**cast(dict[str, Any], context.default_map or {}), **defaults}
    return path


DryRun = Annotated[bool, Flag("Print what would be done, and stop.", panel="Run")]
TrainingThreads = Annotated[
    Threads, Flag("CPU threads; 0: as many as other processes leave free.", panel="Machine")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="TOML file with any of these flags; a flag on the command line wins.",
        rich_help_panel="Run",
    ),
]


def run_training(settings: TrainingConfig, dry_run: bool, threads: int) -> None:
    reading = f"reading {settings.model} and {settings.data.name}"
    with waiting(reading):
        free_threads = FreeThreads(threads)
        free_threads.start()
        from layerskip_core.training.run import prepare, run_lock
        from layerskip_core.training.speedup import verdicts

    # The lock is taken before the output is looked at; `execute`, which anybody may call, takes it
    # again
    with nullcontext() if dry_run else run_lock(settings.output):
        with waiting(reading):
            job = prepare(settings, dry_run)
        narrate(plan_text(job))
        if dry_run:
            return
        result = _execute(job, free_threads)
        with waiting("timing passes"):
            found = verdicts(job.plan, job.module, result.info)
    narrate(result_text(job, result, found))
    narrate(f"saved {settings.output}; {_next_step(job.plan, found)}")


def _execute(job: "FinetuneJob | DrafterJob", free_threads: FreeThreads) -> "RunResult":
    from layerskip_core.training.run import execute

    with stage_bars() as show:

        def on_step(report: "StepReport") -> None:
            show("training", report.step, report.total_steps, report_text(report))
            free_threads.look()

        def on_progress(stage: str, done: int, total: int) -> None:
            show(stage, done, total, "")
            free_threads.look()

        try:
            return execute(job, on_step, on_progress)
        except TrainingInterrupted as interrupted:
            flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
            again = shlex.join(["layerskip", *flags, "--resume"])
            where = " (under torchrun, as before)" if "WORLD_SIZE" in os.environ else ""
            narrate(f"{interrupted}; continue with: {again}{where}")
            raise typer.Exit(128 + interrupted.signal) from None


def _next_step(plan: "RunPlan", verdicts: "list[Verdict]") -> str:
    """What to do next, with the whole command."""
    config = plan.config
    may_pay = any(_pays(verdict.speedup) is not False for verdict in verdicts)
    if plan.num_layers == 1:
        return f"next: {_command('generate', config)}"
    if isinstance(config, DrafterConfig):
        if verdicts and not may_pay:
            return "it does not pay: train it on more rows or for more --steps"
        return f"next: {_command('bench', config)}"
    has_exits = len(plan.exit_steps) > 1
    if may_pay or (has_exits and not verdicts):
        return f"next: {_command('sweep-exits', config)} --save"
    # Drafters need whole weights
    other = _command("generate" if config.lora_keep else "train-drafter", config)
    if verdicts:
        return f"no exit pays: train for more --steps, or leave the model as it is now: {other}"
    return f"next: {other}"


def _command(name: str, config: TrainingConfig) -> str:
    words = ["layerskip", name, "--model", config.output]
    if name == "train-drafter":  # the others find the data in layerskip.json
        words += ["--output", config.output]
        for field in ("name", "split", "prompt_column", "completion_column"):
            value = getattr(config.data, field)
            if value != getattr(DataConfig, field):
                words += [FLAGS[field], value]
    return shlex.join(words)


def plan_text(job: "FinetuneJob | DrafterJob") -> str:
    from layerskip_core.training.finetune_run import FinetuneJob

    plan = job.plan
    config = plan.config
    why = f" ({plan.precision.reason})" if plan.precision.reason else ""
    lines = [
        f"{config.model} ({plan.spec.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {_rows_text(plan)}",
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{plan.precision.name} on {plan.device}{why}",
    ]
    if isinstance(job, FinetuneJob):
        lines += _finetune_lines(plan)
        answers = job.replay
        what = "replayed texts"
    else:
        lines += _drafter_lines(job)
        answers = job.answers
        what = "answers"
    if answers is not None and answers.prompts:
        lines.append(
            f"{len(answers.prompts)} {what} by the model, at most {answers.how.tokens} tokens; "
            f"{len(answers.known)} exist already"
        )
    lines += plan.notes
    if plan.checkpoint is not None:
        lines.append(f"going on from {plan.checkpoint}")
    return "\n".join(lines)


def _rows_text(plan: "RunPlan") -> str:
    if plan.rows is None:
        return f"a stream, cut at {plan.config.max_length} tokens"
    held_out = plan.held_out
    if plan.division is not None:  # some of its rows are for `bench`
        held_out = max(held_out, plan.division.rows)
    text = f"{plan.rows} rows and {held_out} held out, {plan.tokens} tokens at most"
    if plan.left_out:
        text += f", {plan.left_out} left out, prompt too long"
    return text


def _finetune_lines(plan: "RunPlan") -> list[str]:
    from layerskip_core.training.data import step_rows
    from layerskip_core.training.recipe import SHORT_RUN_STEPS
    from layerskip_core.training.sharding import world_size

    config = plan.config
    recipe = plan.recipe
    assert recipe is not None
    lines = []
    if plan.truncated:
        lines.append(f"{plan.truncated} rows are truncated at {config.max_length}")
    if world_size() > 1:
        shards = ", weights and optimizer sharded (FSDP2)" if config.fsdp else ""
        lines.append(f"{world_size()} processes{shards}")
    lines.append(_recipe_text(plan))
    if recipe.preset == "auto" and recipe.p_max and plan.steps <= SHORT_RUN_STEPS:
        lines.append(_NO_GAIN)
    own, replayed = step_rows(config)
    if replayed:
        lines.append(f"replay: {replayed} of the {own + replayed} rows of a step")
    return lines


def _recipe_text(plan: "RunPlan") -> str:
    recipe = plan.recipe
    assert recipe is not None
    early = {layer: steps for layer, steps in plan.exit_steps.items() if layer < plan.num_layers}
    if not early and not recipe.p_max:
        return "trained at full depth only, as in ordinary training"
    text = (
        f"recipe {recipe.preset}: {_dropout_text(plan)}, e_scale {recipe.e_scale:g} "
        f"{recipe.exit_weights}, {recipe.curriculum}"
    )
    if recipe.rotation:
        text += f" R={recipe.rotation}"
    if not early:
        return text
    chosen = ", ".join(f"{layer} on {steps}" for layer, steps in _some(early))
    text += f", exits {chosen} of {plan.steps} steps"
    if recipe.exit_reader == "block":
        text += ", each read by a block"
    if recipe.exit_gradient == 0:
        text += "; their losses train no other layer"
    elif recipe.exit_gradient < 1:
        text += f"; {recipe.exit_gradient:.2g} of their gradient trains the layers below"
    if recipe.exit_vocab:
        text += f"; their losses score the {recipe.exit_vocab} most frequent tokens and a sample"
    return text


def _dropout_text(plan: "RunPlan") -> str:
    """The layer dropout of a run: the highest rate of the last layer, and when it applies."""
    from layerskip_core.training.recipe import dropout_steps

    recipe = plan.recipe
    assert recipe is not None
    if not recipe.p_max:
        return "no dropout"
    ending = plural(dropout_steps(plan.steps), "step")
    when = {
        "constant": f"{recipe.p_max:g} in all steps",
        "rising": f"rising to {recipe.p_max:g}",
        "falling": f"up to {recipe.p_max:g}, ending after {ending}",
    }
    profile = ", constant over depth" if recipe.dropout_profile == "constant" else ""
    return f"dropout {when[recipe.dropout_schedule]}{profile}"


def _drafter_lines(job: "DrafterJob") -> list[str]:
    config = job.config
    kinds = {
        "exit": f"blocks at exits {','.join(map(str, job.module.layers))}",
        "eagle3": f"a drafter in the EAGLE-3 layout, at most {config.draft_vocab} tokens",
        "mtp": "a drafter as Qwen3.5 ships it",
    }
    what = kinds[config.layout or "exit"]
    if config.layout == "mtp" and config.start_from:
        what = "the drafter that the checkpoint ships"
    trained = sum(each.numel() for each in job.module.parameters() if each.requires_grad)

    estimate = job.estimate
    speedups = {share: estimate.speed(share) for share in (0.5, 0.6, 0.7, 0.8)}
    speeds = "not known, because times differ as on a busy machine"
    if all(speedup.is_known for speedup in speedups.values()):
        speeds = ", ".join(f"{each.value:.2f}x at {share:.0%}" for share, each in speedups.items())
    return [
        f"{what}, {trained / 1e6:.1f}M parameters; the model stays as it is; answers of the {config.answers}",
        f"a draft takes about {estimate.draft:.2f} of a step ({estimate.step * 1e3:.3g} ms) on this machine; estimated speedup "
        f"by acceptance rate: {speeds}; for drafts without training (low-bit copies, lookups): "
        f"layerskip bench --model {shlex.quote(config.model)}",
    ]


def report_text(report: "StepReport") -> str:
    """A step's losses, or a drafter's divergences, as text; a drafter in the EAGLE-3 layout is exit
    0.
    """
    parts = [f"loss {report.loss:.3f}"]
    for what, values in (("exits", report.exit_losses), ("held-out", report.validation_losses)):
        if values:
            parts += [what, *(f"{layer}:{loss:.3f}" for layer, loss in _some(values))]
    if report.agreement:
        shares = _some(report.agreement)
        parts += ["first drafts agree", *(f"{layer}:{share:.0%}" for layer, share in shares)]
    parts.append(f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s")
    return " ".join(parts)


def result_text(
    job: "FinetuneJob | DrafterJob", result: "RunResult", verdicts: "list[Verdict]"
) -> str:
    """The last losses or divergences, the speedup by drafts, and what the training cost in
    quality.
    """
    plan = job.plan
    details = result.info.details
    if plan.recipe is None:
        blocks = details["exit_blocks"]
        names = job.module.names.values()
        losses = {"divergence": {name: blocks[name]["divergence"] for name in names}}
    else:
        losses = {
            "loss by exit": details["final_losses"],
            "on held-out rows": details["validation_losses"],
        }
    lines = []
    for what, by_exit in losses.items():
        if by_exit:
            values = "  ".join(f"{name}: {loss:.3f}" for name, loss in by_exit.items())
            lines.append(f"{what}: {values}")
    lines += [_verdict_text(verdict) for verdict in verdicts]
    if not plan.held_out and plan.rows is not None:
        lines.append(
            f"held-out rows: not measured: {plan.rows} rows are too few to hold some out; --validation FILE"
        )
    cost = result.info.cost
    if cost is not None:
        lines.append(_cost_text(cost))
        if result.example is not None:
            lines += _example_lines(result.example)
        if cost.agreement < 1 - _LOST:
            lines.append(
                "to keep more of the model: --replay 0.5, --lora-rank 16, a lower --lr, or layerskip train-drafter"
            )
    return "\n".join(lines)


def _cost_text(cost: "Cost") -> str:
    parts = [
        f"cost: on {cost.tokens} tokens of the model's own text {cost.agreement:.1%} of next tokens as before, "
        f"perplexity {cost.before:.2f} -> {cost.after:.2f}"
    ]
    if cost.task is not None:
        before, after = cost.task
        parts.append(f"held-out loss {before:.3f} -> {after:.3f}")
    if cost.exact_match is not None:
        before, after = cost.exact_match
        parts.append(
            f"exact match of {cost.answered} held-out rows {100 * before:.1f} -> {after:.1%}"
        )
    return "; ".join(parts)


def _pays(speedup: "Speedup") -> bool | None:
    """Whether drafts pay; None: the measurement does not tell."""
    if speedup.most < _PAYS:
        return False
    if not speedup.is_known:
        return None
    return speedup.value >= _PAYS


def _verdict_text(verdict: "Verdict") -> str:
    speedup = verdict.speedup
    bound = f"by arithmetic at most {speedup.most:.2f}x"
    found = f"the speed here is not known, because times differ as on a busy machine ({bound})"
    if speedup.is_known:
        drafts = plural(speedup.drafts, "draft")
        found = (
            f"with {drafts} about {speedup.value:.2f}x of plain decoding here "
            f"({speedup.low:.2f} to {speedup.high:.2f}, {bound})"
        )
    if _pays(speedup) is False:
        found += ": does not pay"
    return f"{verdict.name}: {verdict.accepted:.1%} of first drafts agree on held-out rows; {found}"


def _example_lines(example: "AnsweredRow") -> list[str]:
    """A held-out row, with the reference and the answer of the trained model."""
    lines = ["the first held-out row:"]
    for name, text in example._asdict().items():
        lines.append(f"  {name:9} {shown(repr(text.strip()))}")
    return lines


def _some(losses: Mapping[int, float]) -> list[tuple[int, float]]:
    """At most four evenly spaced exits, the last included, which fit in one line."""
    return spread(list(losses.items())[::-1], 4)[::-1]
