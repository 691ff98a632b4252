"""The lines that `finetune` prints: the plan, the progress, the losses."""

import os
import shlex
import sys

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.training.data import replayed_rows, rows_per_step
from layerskip_core.training.plan import Plan
from layerskip_core.training.progress import StepReport
from layerskip_core.training.recipe import Recipe
from layerskip_core.training.sharding import world_size


def plan_text(plan: Plan) -> str:
    lines = _block_lines(plan) if plan.recipe is None else _recipe_lines(plan, plan.recipe)
    if plan.step_seconds is not None:
        training, memory = _minutes(plan.step_seconds * plan.total_steps), plan.memory_mb
        lines.append(f"a timed step: {plan.step_seconds:.2g} s, so training in about {training}; about {memory:.0f} MB")
    return "\n".join((*lines, *_retention_lines(plan), *plan.notes))


def _recipe_lines(plan: Plan, recipe: Recipe) -> list[str]:
    config, processes = plan.config, world_size()
    rows = f"a stream, cut at {config.max_length} tokens"
    if plan.rows is not None:
        left_out = f", {plan.left_out} left out, whose prompts leave no room" if plan.left_out else ""
        rows = f"{plan.rows} rows, {plan.tokens} tokens, {plan.truncated} truncated at {config.max_length}{left_out}"
    adapted = "" if plan.adapted_layers is None else f"adapters on layers 1 to {plan.adapted_layers}, "
    sharded = ", weights and optimizer sharded (FSDP2)" if config.fsdp else ""
    shared = "" if processes == 1 else f" in each of {processes} processes{sharded}"
    dropout = f"p_max {recipe.p_max}{' constant over depth' if recipe.dropout_profile == 'constant' else ''}"
    named = f" over {','.join(map(str, recipe.exits))}" if recipe.exits else ""
    rotation = f" R={recipe.rotation}" if recipe.rotation else ""
    return [
        f"{config.regime} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {rows}",
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{adapted}{plan.dtype} on {plan.device}{shared}",
        f"recipe: {dropout}, e_scale {recipe.e_scale}, {recipe.curriculum}{named}{rotation}, "
        f"{plan.exits_per_step:.1f} exits per step",
    ]


def _block_lines(plan: Plan) -> list[str]:
    config, blocks, rows = plan.config, plan.config.exit_blocks, plan.rows or 0
    exits, most, writing = ",".join(map(str, config.recipe.exits or ())), "", ""
    left_out = f", {plan.left_out} left out" if plan.left_out else ""
    if plan.answers is not None and plan.answers.prompts:
        known = len(plan.answers.known)
        most = "at most " if known < len(plan.answers.prompts) else ""
        writing = f"{known} answers are there, the others in {most}{_minutes(plan.answers.seconds)}; "
    return [
        f"blocks at exits {exits} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, "
        f"{plan.num_layers} layers), which stays as it is; {plan.trained / 1e6:.1f}M parameters, feature {blocks.feature}, "
        f"loss {blocks.loss}",
        f"on {config.data.name}: {rows} rows and {plan.held_out} held out{left_out}, answers of the {blocks.answers}, "
        f"{most}{plan.tokens} tokens",
        f"{writing}states in {most}{_minutes(plan.state_seconds)} and {plan.disk_mb:.0f} MB of disk",
        f"{plan.steps} steps per exit of {config.batch_size} x {config.accumulation} rows, lr {config.lr:g}, "
        f"{plan.dtype} on {plan.device}",
    ]


def _retention_lines(plan: Plan) -> list[str]:
    """A line each for the anchor, replay and other ties to the original model."""
    config, asked, texts, lines = plan.config, plan.config.retention, plan.answers, []
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
    return lines


def report_text(report: StepReport, frozen: bool) -> str:
    """How a step is shown; `frozen`: of a run that trains exit blocks."""
    speed = f"lr {report.learning_rate:.1e} {report.tokens_per_second:.0f} tokens/s"
    exits = " ".join(f"{layer}:{loss:.{3 if frozen else 2}f}" for layer, loss in spread(report.exit_losses))
    if frozen:
        agreement = " ".join(f"{layer}:{share:.1%}" for layer, share in spread(report.agreement))
        return f"divergence {exits} {f'first drafts agree {agreement} ' if agreement else ''}{speed}"
    held_out = f"held-out {report.validation_losses[max(report.validation_losses)]:.3f} " if report.validation_losses else ""
    anchor = "" if report.divergence is None else f"divergence {report.divergence:.3f} "
    return f"loss {report.loss:.3f} last layer {report.final_loss:.3f} exits {exits} {held_out}{anchor}{speed}"


def result_text(info: CheckpointInfo, plan: Plan) -> str:
    """The last loss of every exit, held-out losses included, or the last figures of each block."""
    if plan.recipe is None:
        trained = {exit_layer: info.details["exit_blocks"][str(exit_layer)] for exit_layer in plan.config.recipe.exits or ()}
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
