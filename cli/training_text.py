"""The lines that `finetune` prints: the plan, the progress, the losses."""

import os
import shlex
import sys
from collections.abc import Callable

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.training.data import rows_per_step
from layerskip_core.training.plan import Blocks, Plan
from layerskip_core.training.progress import StepReport
from layerskip_core.training.recipe import Recipe
from layerskip_core.training.sharding import world_size


def plan_text(plan: Plan) -> str:
    if plan.recipe is not None:
        lines = _recipe_lines(plan, plan.recipe)
    else:
        assert plan.blocks is not None
        lines = _block_lines(plan, plan.blocks)
    return "\n".join((*lines, *plan.notes))


def _recipe_lines(plan: Plan, recipe: Recipe) -> list[str]:
    config = plan.config
    adapted = "" if plan.adapted_layers is None else f"adapters on layers 1 to {plan.adapted_layers}, "
    dropout = f"p_max {recipe.p_max}{' constant over depth' if recipe.dropout_profile == 'constant' else ''}"
    named = f" over {','.join(map(str, recipe.exits))}" if recipe.exits else ""
    rotation = f" R={recipe.rotation}" if recipe.rotation else ""
    return [
        f"{config.regime} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {_rows_text(plan)}",
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {plan.lr:g}, "
        f"{adapted}{plan.dtype} on {plan.device}{_processes_text(config)}",
        f"recipe: {dropout}, e_scale {recipe.e_scale}, {recipe.curriculum}{named}{rotation}, "
        f"{plan.exits_per_step:.1f} exits per step",
        *_step_lines(plan),
        *_retention_lines(plan),
    ]


def _step_lines(plan: Plan) -> list[str]:
    """What a step was measured to take."""
    if plan.step_seconds is None:
        return []
    training = _minutes(plan.step_seconds * plan.total_steps)
    return [f"a timed step: {plan.step_seconds:.2g} s, so training in about {training}; about {plan.memory_mb:.0f} MB"]


def _block_lines(plan: Plan, blocks: Blocks) -> list[str]:
    config, written, rows = plan.config, blocks.answers == "model", plan.rows or 0
    most = "at most " if written and blocks.answered < rows + plan.held_out else ""
    left_out = f", {plan.left_out} left out" if plan.left_out else ""
    writing = f"{blocks.answered} answers are there, the others in {most}{_minutes(blocks.answer_seconds)}; " if written else ""
    return [
        f"blocks at exits {','.join(map(str, blocks.exits))} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, "
        f"{plan.num_layers} layers), which stays as it is; {plan.trained / 1e6:.1f}M parameters, feature {blocks.feature}, "
        f"loss {blocks.loss}",
        f"on {config.data.name}: {rows} rows and {plan.held_out} held out{left_out}, answers of the {blocks.answers}, "
        f"{most}{plan.tokens} tokens",
        f"{writing}states in {most}{_minutes(blocks.state_seconds)} and {blocks.disk_mb:.0f} MB of disk",
        f"{plan.steps} steps per exit of {config.batch_size} x {config.accumulation} rows, lr {plan.lr:g}, "
        f"{plan.dtype} on {plan.device}",
        *_step_lines(plan),
    ]


def _processes_text(config: FinetuneConfig) -> str:
    processes = world_size()
    if processes == 1:
        return ""
    return f" in each of {processes} processes" + (", weights and optimizer sharded (FSDP2)" if config.fsdp else "")


def _retention_lines(plan: Plan) -> list[str]:
    """What holds the model to the original, one line each."""
    config, asked, replay, lines = plan.config, plan.config.retention, plan.replay, []
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


def _rows_text(plan: Plan) -> str:
    if plan.rows is None:
        return f"a stream, cut at {plan.max_length} tokens"
    left_out = f", {plan.left_out} left out, whose prompts leave no room" if plan.left_out else ""
    return f"{plan.rows} rows, {plan.tokens} tokens, {plan.truncated} truncated at {plan.max_length}{left_out}"


def report_text(frozen: bool) -> Callable[[StepReport], str]:
    """How a step is shown; `frozen`: of a run that trains exit blocks."""
    return _block_report if frozen else _recipe_report


def _recipe_report(report: StepReport) -> str:
    exits = " ".join(f"{layer}:{loss:.2f}" for layer, loss in spread(report.exit_losses))
    held_out = f"held-out {report.validation_losses[max(report.validation_losses)]:.3f} " if report.validation_losses else ""
    anchor = "" if report.divergence is None else f"divergence {report.divergence:.3f} "
    return (
        f"loss {report.loss:.3f} last layer {report.final_loss:.3f} exits {exits} {held_out}{anchor}"
        f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"
    )


def _block_report(report: StepReport) -> str:
    exits = " ".join(f"{layer}:{loss:.3f}" for layer, loss in spread(report.exit_losses))
    agreement = " ".join(f"{layer}:{share:.1%}" for layer, share in spread(report.agreement))
    held_out = f"first drafts agree {agreement} " if agreement else ""
    return f"divergence {exits} {held_out}lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"


def result_text(info: CheckpointInfo, plan: Plan) -> str:
    """The last loss of every exit, and of those on held-out rows if there are any; or what each block ended with."""
    if plan.blocks is not None:
        trained = {exit_layer: info.details["exit_blocks"][str(exit_layer)] for exit_layer in plan.blocks.exits}
        return "\n".join(
            f"exit {exit_layer}: divergence {block['divergence']:.3f}"
            + (f", first drafts agree {block['agreement']:.1%} on held-out rows" if "agreement" in block else "")
            for exit_layer, block in trained.items()
        )
    kinds = (("final_losses", "loss by exit"), ("validation_losses", "on held-out rows"))
    return "\n".join(
        f"{what}: " + "  ".join(f"{layer}: {loss:.3f}" for layer, loss in info.details[name].items())
        for name, what in kinds
        if info.details[name]
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
