"""The lines that `finetune` prints: the plan, the progress, the losses."""

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.training.frozen.plan import FrozenPlan
from layerskip_core.training.plan import TrainingPlan
from layerskip_core.training.progress import StepReport
from layerskip_core.training.rows.step_rows import rows_per_step, world_size


def plan_text(config: FinetuneConfig, plan: TrainingPlan) -> str:
    recipe, kept = plan.recipe, _retention_text(config, plan)
    dropout = f"p_max {recipe.p_max}{' constant over depth' if recipe.dropout_profile == 'constant' else ''}"
    adapted = "" if plan.adapted_layers is None else f"adapters on layers 1 to {plan.adapted_layers}, "
    return (
        f"{config.regime} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {_rows_text(plan)}\n"
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {plan.lr:g}, "
        f"{adapted}{plan.dtype} on {plan.device}, about {plan.memory_mb:.0f} MB{_processes_text(config)}\n"
        f"recipe: {dropout}, e_scale {recipe.e_scale}, {recipe.curriculum}"
        f"{' over ' + ','.join(map(str, recipe.exits)) if recipe.exits else ''}"
        f"{f' R={recipe.rotation}' if recipe.rotation else ''}, {plan.exits_per_step:.1f} exits per step; "
        f"a step costs {plan.cost:.2f}x a step without the recipe, {plan.flops:.1e} FLOP"
        + "".join(f"\n{line}" for line in (*kept, *plan.notes))
    )


def _processes_text(config: FinetuneConfig) -> str:
    processes = world_size()
    if processes == 1:
        return ""
    return f" in each of {processes} processes" + (", weights and optimizer sharded (FSDP2)" if config.fsdp else "")


def _retention_text(config: FinetuneConfig, plan: TrainingPlan) -> list[str]:
    """What holds the model to the original, one line each."""
    asked, replay, lines = config.retention, plan.replay, []
    if asked.anchor:
        beside = "the model without its adapters" if config.lora_rank else f"a copy in {asked.anchor_weights or 'bf16'}"
        lines.append(f"anchor: {asked.anchor:g} x the divergence from the original, {beside}")
    if replay is not None:
        there = f"{replay.written} are there, the others" if replay.written else "written"
        lines.append(
            f"replay: {replay.rows} of the {rows_per_step(config)} rows of a step, of {len(replay.starts)} texts of at most "
            f"{replay.longest} tokens by the original, {there} in about {_minutes(replay.seconds)}"
        )
    return lines


def _rows_text(plan: TrainingPlan) -> str:
    if plan.rows is None:
        return f"a stream, cut at {plan.max_length} tokens"
    left_out = f", {plan.left_out} left out, whose prompts leave no room" if plan.left_out else ""
    return f"{plan.rows} rows, {plan.tokens} tokens, {plan.truncated} truncated at {plan.max_length}{left_out}"


def report_text(report: StepReport) -> str:
    exits = " ".join(f"{layer}:{loss:.2f}" for layer, loss in spread(report.exit_losses))
    held_out = f"held-out {report.validation_losses[max(report.validation_losses)]:.3f} " if report.validation_losses else ""
    anchor = "" if report.divergence is None else f"divergence {report.divergence:.3f} "
    return (
        f"loss {report.loss:.3f} last layer {report.final_loss:.3f} exits {exits} {held_out}{anchor}"
        f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"
    )


def losses_text(info: CheckpointInfo) -> str:
    """The last loss of every exit, and in a second line the losses on held-out rows if there are any."""
    kinds = (("final_losses", "loss by exit"), ("validation_losses", "on held-out rows"))
    return "\n".join(
        f"{what}: " + "  ".join(f"{layer}: {loss:.3f}" for layer, loss in info.details[name].items())
        for name, what in kinds
        if info.details[name]
    )


def frozen_plan_text(config: FinetuneConfig, plan: FrozenPlan) -> str:
    settings = plan.settings
    exits = ",".join(map(str, settings.exits))
    written = settings.answers == "model"
    most = "at most " if written and plan.answered < plan.texts + plan.held_out else ""
    left_out = f", {plan.left_out} left out" if plan.left_out else ""
    answers = f"{plan.answered} answers are there, the others in {most}{_minutes(plan.answer_seconds)}; " if written else ""
    return (
        f"blocks at exits {exits} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers), which "
        f"stays as it is; {plan.trained / 1e6:.1f}M parameters, feature {settings.feature}, loss {settings.loss}\n"
        f"on {config.data.name}: {plan.texts} rows and {plan.held_out} held out{left_out}, answers of the {settings.answers}, "
        f"{most}{plan.tokens} tokens\n"
        f"{answers}states in {most}{_minutes(plan.state_seconds)} and {plan.disk_mb:.0f} MB of disk, "
        f"training in about {_minutes(plan.train_seconds)}\n"
        f"{plan.steps} steps per exit of {config.batch_size} x {config.accumulation} rows, lr {plan.lr:g}, "
        f"{plan.dtype} on {plan.device}" + "".join(f"\n{note}" for note in plan.notes)
    )


def block_report_text(report: StepReport) -> str:
    exits = " ".join(f"{layer}:{loss:.3f}" for layer, loss in spread(report.exit_losses))
    agreement = " ".join(f"{layer}:{share:.1%}" for layer, share in spread(report.agreement))
    held_out = f"first drafts agree {agreement} " if agreement else ""
    return f"divergence {exits} {held_out}lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"


def blocks_text(trained: Mapping[str, Any]) -> str:
    """What the training of each exit's block ended with."""
    return "\n".join(
        f"exit {exit_layer}: divergence {block['divergence']:.3f}"
        + (f", first drafts agree {block['agreement']:.1%} on held-out rows" if "agreement" in block else "")
        for exit_layer, block in trained.items()
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def resume_command() -> str:
    """The command line that resumes the run of this process."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    command = shlex.join(["layerskip", *arguments, "--resume"])
    return command if "WORLD_SIZE" not in os.environ else f"{command} (under torchrun, as before)"


def spread(losses: dict[int, float], count: int = 4) -> list[tuple[int, float]]:
    """At most `count` exits at even distances, the last one among them, so that they fit in one line."""
    items = list(losses.items())
    count = min(count, len(items))
    return [items[index * len(items) // count - 1] for index in range(1, count + 1)]
