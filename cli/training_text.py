"""The lines that `finetune` prints: the plan, the progress, the losses."""

import os
import shlex
import sys

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.training.plan import TrainingPlan
from layerskip_core.training.progress import StepReport


def plan_text(config: FinetuneConfig, plan: TrainingPlan) -> str:
    recipe = plan.recipe
    return (
        f"{config.regime} of {config.model} ({plan.parameters / 1e6:.1f}M parameters, {plan.num_layers} layers) "
        f"on {config.data.name}: {_rows_text(config, plan)}\n"
        f"{plan.steps} steps of {config.batch_size} x {config.accumulation} rows, lr {plan.lr:g}, "
        f"{plan.dtype} on {plan.device}, about {plan.memory_mb:.0f} MB\n"
        f"recipe: p_max {recipe.p_max}, e_scale {recipe.e_scale}, {recipe.curriculum}"
        f"{' over ' + ','.join(map(str, recipe.exits)) if recipe.exits else ''}"
        f"{f' R={recipe.rotation}' if recipe.rotation else ''}, {plan.exits_per_step:.1f} exits per step; "
        f"a step costs {plan.cost:.2f}x a step without the recipe" + "".join(f"\n{note}" for note in plan.notes)
    )


def _rows_text(config: FinetuneConfig, plan: TrainingPlan) -> str:
    if plan.rows is None:
        return f"a stream, cut at {plan.max_length} tokens"
    return f"{plan.rows} rows, {plan.tokens} tokens, {plan.truncated} truncated at {plan.max_length}"


def report_text(report: StepReport) -> str:
    exits = " ".join(f"{layer}:{loss:.2f}" for layer, loss in spread(report.exit_losses))
    held_out = f"held-out {report.validation_losses[max(report.validation_losses)]:.3f} " if report.validation_losses else ""
    return (
        f"loss {report.loss:.3f} last layer {report.final_loss:.3f} exits {exits} {held_out}"
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


def resume_command() -> str:
    """The command line that resumes the run of this process."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    command = shlex.join(["layerskip", *arguments, "--resume"])
    return command if "WORLD_SIZE" not in os.environ else f"{command} (under torchrun, as before)"


def spread(losses: dict[int, float], count: int = 4) -> list[tuple[int, float]]:
    """At most `count` exits at even distances, so that they fit in one line."""
    items = list(losses.items())
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
