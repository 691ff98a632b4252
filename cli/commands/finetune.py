"""Convert a checkpoint by the LayerSkip recipe, or train it without."""

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
from layerskip_core.config.training import DrafterConfig, FinetuneConfig, TrainingConfig
from layerskip_core.data import spread
from layerskip_core.errors import ConfigError, TrainingInterrupted, first_line, plural, shown
from layerskip_core.files import read_bytes

from ..console import narrate, stage_bars, waiting
from ..loading import FreeThreads
from ..options import FLAGS, command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.info import CheckpointInfo
    from layerskip_core.training.plan import Plan, Verdict
    from layerskip_core.training.progress import StepReport
    from layerskip_core.training.recipe import Recipe
    from layerskip_core.training.run import FrozenModel, WholeModel
    from layerskip_core.training.verdict import Speedup

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
    named = {
        flag.removeprefix("--"): str(each.name)
        for each in context.command.params
        for flag in each.opts
    }
    known = {flag: name for flag, name in named.items() if flag not in ("config", "help")}
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


@command
def finetune(
    settings: FinetuneConfig,
    dry_run: DryRun = False,
    threads: TrainingThreads = 0,
    config: ConfigFile = None,
) -> None:
    """Convert a checkpoint by the LayerSkip recipe: layer dropout, and an early-exit loss through
    the shared head.

    --recipe auto trains a few exits, each with a reader, and reports at the end how fast they draft
    on this machine and how much quality the training cost. The paper's own recipes are finetune,
    continual, scratch and code; --recipe none is ordinary training. To train a drafter and leave
    the model as it is: layerskip train-drafter.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output
    my-model --save-steps 200
    """
    run_training(settings, dry_run, threads)


def run_training(settings: TrainingConfig, dry_run: bool, threads: int) -> None:
    reading = f"reading {settings.model} and {settings.data.name}"
    with waiting(reading):
        free_threads = FreeThreads(threads)
        free_threads.start()
        from layerskip_core.training.plan import run_lock
        from layerskip_core.training.run import prepare

    with nullcontext() if dry_run else run_lock(settings.output):
        with waiting(reading):
            plan = prepare(settings, dry_run)
        narrate(plan_text(plan))
        if dry_run:
            return
        info = _run(plan, free_threads)
        with waiting("timing passes"):
            verdicts = plan.verdicts(info)
    narrate(
        "\n".join(
            (result_text(info, plan, verdicts), f"saved {settings.output}; {_next(plan, verdicts)}")
        )
    )


def _run(plan: "Plan", free_threads: FreeThreads) -> "CheckpointInfo":
    with stage_bars() as show:

        def on_step(report: "StepReport") -> None:
            show("training", report.step, report.total_steps, report_text(report))
            free_threads.look()

        def on_progress(stage: str, done: int, total: int) -> None:
            show(stage, done, total, "")
            free_threads.look()

        try:
            return plan.run(on_step, on_progress)
        except TrainingInterrupted as interrupted:
            again = shlex.join(
                ["layerskip", *(flag for flag in sys.argv[1:] if flag != "--resume"), "--resume"]
            )
            where = " (under torchrun, as before)" if "WORLD_SIZE" in os.environ else ""
            narrate(f"{interrupted}; continue with: {again}{where}")
            raise typer.Exit(128 + interrupted.signal) from None


def _next(plan: "Plan", verdicts: "list[Verdict]") -> str:
    """What to do next, with the whole command."""
    config = plan.config
    pays = any(_pays(verdict.speedup) is not False for verdict in verdicts)
    if plan.num_layers == 1:
        return f"next: {_command('generate', config)}"
    if isinstance(config, DrafterConfig):
        if verdicts and not pays:
            return "it does not pay: train it on more rows or for more --steps"
        return f"next: {_command('bench', config)}"
    if pays or (plan.exit_steps.keys() - {plan.num_layers} and not verdicts):
        return f"next: {_command('sweep-exits', config)} --save"
    longer = (
        "no exit pays: train for more --steps, or leave the model as it is now: "
        if verdicts
        else "next: "
    )
    # Drafters need whole weights
    return longer + _command("generate" if config.lora_keep else "train-drafter", config)


def _command(name: str, config: TrainingConfig) -> str:
    after = ["layerskip", name, "--model", config.output]
    if name == "train-drafter":  # the others find the data in layerskip.json
        after += ["--output", config.output]
        for field in ("name", "split", "prompt_column", "completion_column"):
            if (value := getattr(config.data, field)) != getattr(DataConfig, field):
                after += [FLAGS[field], value]
    return shlex.join(after)


def plan_text(plan: "WholeModel | FrozenModel") -> str:
    from layerskip_core.training.run import WholeModel

    config = plan.config
    is_whole = isinstance(plan, WholeModel)
    rows = f"a stream, cut at {config.max_length} tokens"
    if plan.rows is not None:
        left_out = f", {plan.left_out} left out, prompt too long" if plan.left_out else ""
        # A part is for `bench`
        held_out = max(plan.held_out, 0 if plan.division is None else plan.division.rows)
        rows = f"{plan.rows} rows and {held_out} held out, {plan.tokens} tokens at most{left_out}"
    why = f" ({plan.precision.reason})" if plan.precision.reason else ""
    lines = [
        f"{config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) on {config.data.name}: {rows}",
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{plan.precision.name} on {plan.device}{why}",
        *(_recipe_lines(plan) if isinstance(plan, WholeModel) else _drafter_lines(plan)),
    ]
    if (texts := plan.answers) is not None and texts.prompts:
        what = "replayed texts" if is_whole else "answers"
        lines.append(
            f"{len(texts.prompts)} {what} by the model, at most {texts.how.tokens} tokens; {len(texts.known)} exist already"
        )
    return "\n".join((*lines, *plan.notes))


def _recipe_lines(plan: "WholeModel") -> list[str]:
    from layerskip_core.training.data import step_rows
    from layerskip_core.training.recipe import SHORT
    from layerskip_core.training.sharding import world_size

    config, recipe, processes, (own, replayed) = (
        plan.config,
        plan.recipe,
        world_size(),
        step_rows(plan.config),
    )
    lines = (
        [f"{plan.truncated} rows are truncated at {config.max_length}"] if plan.truncated else []
    )
    if processes > 1:
        lines.append(
            f"{processes} processes"
            + (", weights and optimizer sharded (FSDP2)" if config.fsdp else "")
        )
    early = {layer: steps for layer, steps in plan.exit_steps.items() if layer < plan.num_layers}
    if not early and not recipe.p_max:
        lines.append("trained at full depth only, as in ordinary training")
    else:
        rotation = f" R={recipe.rotation}" if recipe.rotation else ""
        chosen = ", ".join(f"{layer} on {steps}" for layer, steps in _some(early))
        reader = ", each read by a block" if recipe.exit_reader == "block" else ""
        exits = f", exits {chosen} of {plan.steps} steps{reader}" if early else ""
        if early and recipe.exit_gradient == 0:
            exits += "; their losses train no other layer"
        elif early and recipe.exit_gradient < 1:
            exits += f"; {recipe.exit_gradient:.2g} of their gradient trains the layers below"
        lines.append(
            f"recipe {recipe.preset}: {_dropout_text(recipe, plan.steps)}, e_scale {recipe.e_scale:g} "
            f"{recipe.exit_weights}, {recipe.curriculum}{rotation}{exits}"
        )
        if recipe.preset == "auto" and recipe.p_max and plan.steps <= SHORT:
            lines.append(_NO_GAIN)
    return (
        [*lines, f"replay: {replayed} of the {own + replayed} rows of a step"]
        if replayed
        else lines
    )


def _dropout_text(recipe: "Recipe", steps: int) -> str:
    """The layer dropout of a run: the highest rate of the last layer, and when it applies."""
    from layerskip_core.training.recipe import dropout_steps

    if not recipe.p_max:
        return "no dropout"
    when = {
        "constant": f"{recipe.p_max:g} in all steps",
        "rising": f"rising to {recipe.p_max:g}",
        "falling": f"up to {recipe.p_max:g}, ending after {plural(dropout_steps(steps), 'step')}",
    }
    profile = ", constant over depth" if recipe.dropout_profile == "constant" else ""
    return f"dropout {when[recipe.dropout_schedule]}{profile}"


def _drafter_lines(plan: "FrozenModel") -> list[str]:
    config = plan.config
    estimate = plan.estimate
    speedups = {share: estimate.speed(share) for share in (0.5, 0.6, 0.7, 0.8)}
    speeds = ", ".join(
        f"{speedup.value:.2f}x at {share:.0%}" for share, speedup in speedups.items()
    )
    if not all(speedup.is_known for speedup in speedups.values()):
        speeds = "not known, because times differ as on a busy machine"
    kinds = {
        "exit": f"blocks at exits {','.join(map(str, plan.module.layers))}",
        "eagle3": f"a drafter in the EAGLE-3 layout, at most {config.draft_vocab} tokens",
        "mtp": "the drafter that the checkpoint ships"
        if config.start_from
        else "a drafter as Qwen3.5 ships it",
    }
    what = kinds[config.layout or "exit"]
    trained = sum(each.numel() for each in plan.module.parameters() if each.requires_grad)
    return [
        f"{what}, {trained / 1e6:.1f}M parameters; the model stays as it is; answers of the {config.answers}",
        f"a draft takes about {estimate.draft:.2f} of a step ({estimate.step * 1e3:.3g} ms) on this machine; estimated speedup "
        f"by acceptance rate: {speeds}; for drafts without training (low-bit copies, lookups): "
        f"layerskip bench --model {shlex.quote(config.model)}",
    ]


def report_text(report: "StepReport") -> str:
    """A step's loss, or a drafter's divergence, as text; a drafter in the EAGLE-3 layout is exit
    0.
    """
    shown = (
        ("exits", report.exit_losses, ".3f"),
        ("held-out", report.validation_losses, ".3f"),
        ("first drafts agree", report.agreement, ".0%"),
    )
    parts = [
        f"{what} " + " ".join(f"{at}:{value:{form}}" for at, value in _some(each))
        for what, each, form in shown
        if each
    ]
    speed = f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"
    return " ".join((f"loss {report.loss:.3f}", *parts, speed))


def result_text(info: "CheckpointInfo", plan: "Plan", verdicts: "list[Verdict]") -> str:
    """The last losses or divergences, the speedup by drafts, and what the training cost in
    quality.
    """
    details = info.details
    kinds = {
        "loss by exit": details.get("final_losses"),
        "on held-out rows": details.get("validation_losses"),
    }
    if plan.recipe is None:
        kinds = {
            "divergence": {
                name: details["exit_blocks"][name]["divergence"]
                for name in plan.module.names.values()
            }
        }
    lines = [
        f"{what}: " + "  ".join(f"{name}: {loss:.3f}" for name, loss in losses.items())
        for what, losses in kinds.items()
        if losses
    ]
    lines += [_verdict_text(verdict) for verdict in verdicts]
    if not plan.held_out and plan.rows is not None:
        lines.append(
            f"held-out rows: not measured: {plan.rows} rows are too few to hold some out; --validation FILE"
        )
    if (cost := info.cost) is not None:
        costs = [
            f"cost: on {cost.tokens} tokens of the model's own text {cost.agreement:.1%} of next tokens as before, "
            f"perplexity {cost.before:.2f} -> {cost.after:.2f}"
        ]
        if cost.task is not None:
            costs.append("held-out loss {:.3f} -> {:.3f}".format(*cost.task))
        if cost.exact_match is not None:
            before, after = cost.exact_match
            costs.append(
                f"exact match of {cost.answered} held-out rows {100 * before:.1f} -> {after:.1%}"
            )
        lines.append("; ".join(costs))
        lines += _example_lines(plan)
        if cost.agreement < 1 - _LOST:
            lines.append(
                "to keep more of the model: --replay 0.5, --lora-rank 16, a lower --lr, or layerskip train-drafter"
            )
    return "\n".join(lines)


def _pays(speedup: "Speedup") -> bool | None:
    """Whether drafts pay; None: the measurement does not tell."""
    if speedup.most < _PAYS:
        return False
    return speedup.value >= _PAYS if speedup.is_known else None


def _verdict_text(verdict: "Verdict") -> str:
    speedup = verdict.speedup
    bound = f"by arithmetic at most {speedup.most:.2f}x"
    if speedup.is_known:
        interval = f"{speedup.low:.2f} to {speedup.high:.2f}"
        drafts = plural(speedup.drafts, "draft")
        found = (
            f"with {drafts} about {speedup.value:.2f}x of plain decoding here ({interval}, {bound})"
        )
    else:
        found = f"the speed here is not known, because times differ as on a busy machine ({bound})"
    ends = ": does not pay" if _pays(speedup) is False else ""
    return f"{verdict.name}: {verdict.accepted:.1%} of first drafts agree on held-out rows; {found}{ends}"


def _example_lines(plan: "Plan") -> list[str]:
    """A held-out row, with the reference and the answer of the trained model."""
    if plan.example is None:
        return []
    width = max(map(len, plan.example._fields))
    named = plan.example._asdict().items()
    return [
        "the first held-out row:",
        *(f"  {name:{width}} {shown(repr(text.strip()))}" for name, text in named),
    ]


def _some(losses: Mapping[int, float]) -> list[tuple[int, float]]:
    """At most four evenly spaced exits, the last included, which fit in one line."""
    return spread(list(losses.items())[::-1], 4)[::-1]
