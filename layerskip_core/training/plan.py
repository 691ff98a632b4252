"""What a run is about to do: steps, cost of a step, memory. Nothing is trained or written here."""

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any, cast

from ..checkpoint.loaded import Trainable
from ..config.checks import require_exit_layer
from ..config.training import FinetuneConfig, RecipeConfig
from .curriculum import mean_exits, rotation_of
from .dropout import dropout_rates, time_scale
from .encoding import EncodedData

COMMANDS_STEPS = 300  # of a run on `commands` without `steps`: sized for five minutes on two cores

_PACKED = "documents are packed into whole rows; none sees another"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"

# What may differ between a run and its resumption: none of it changes the steps that follow.
_FREE = {
    "model",
    "data",
    "output",
    "resume",
    "overwrite",
    "save_steps",
    "validation",
    "validation_samples",
    "eval_steps",
    "report_to",
    "epochs",
    "device",
}


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is about to do. `cost` is a step's computation as a multiple of one without the recipe; memory in MB.

    Of a stream `rows` is None, and `tokens` and `truncated` are those of its first rows.
    """

    rows: int | None
    tokens: int
    truncated: int
    steps: int
    parameters: int
    num_layers: int
    rotation: int | None  # R, of the rotational curriculum
    exits_per_step: float
    cost: float
    memory_mb: float
    device: str
    dtype: str
    resumed_step: int = 0
    notes: tuple[str, ...] = ()  # what the user should know before it starts


def make_plan(
    config: FinetuneConfig, loaded: Trainable, data: EncodedData, device: str, autocast: bool, packed: bool
) -> TrainingPlan:
    """Raises ConfigError when the recipe is undefined for this model or number of steps."""
    recipe, backend = config.recipe, loaded.backend
    assert recipe is not None
    for exit_layer in recipe.exits:
        require_exit_layer(exit_layer, backend.num_layers, field="exits")
    rows = None if data.streamed else len(data.rows)
    steps = _steps(config, rows or 0)
    rotational = recipe.curriculum == "rotational"
    exits = mean_exits(recipe, steps, backend.num_layers, backend.vocab_size)
    return TrainingPlan(
        rows=rows,
        tokens=data.tokens,
        truncated=data.truncated,
        steps=steps,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        num_layers=backend.num_layers,
        rotation=rotation_of(recipe, backend.num_layers, backend.vocab_size) if rotational else None,
        exits_per_step=exits,
        cost=_cost(loaded, recipe, steps, config.regime == "scratch", exits, data),
        memory_mb=_memory_mb(loaded, config, data),
        device=device,
        dtype="bf16 autocast" if autocast else "fp32",
        notes=(_PACKED,) * packed + (_STREAMED,) * data.streamed,
    )


def rows_per_step(config: FinetuneConfig) -> int:
    """Rows of an optimizer step, over all processes that torchrun started."""
    return config.batch_size * config.accumulation * _world_size()


def run_settings(config: FinetuneConfig, plan: TrainingPlan) -> dict[str, Any]:
    """What decides a run's steps: a run is resumed with the same or not at all."""
    settings = {name: value for name, value in in_json(config).items() if name not in _FREE}
    recipe = settings.pop("recipe")
    facts = {"steps": plan.steps, "rows": plan.rows, "tokens": plan.tokens, "dtype": plan.dtype, "processes": _world_size()}
    return {**settings, **recipe, **facts}


def in_json(config: FinetuneConfig) -> dict[str, Any]:
    """Its fields as a JSON file gives them back."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(config))))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _steps(config: FinetuneConfig, rows: int) -> int:
    if config.steps is not None:
        return config.steps
    if config.data.name == "commands" and not config.data.limit:
        return COMMANDS_STEPS
    return max(1, math.ceil(rows / rows_per_step(config) * config.epochs))


def _cost(loaded: Trainable, recipe: RecipeConfig, steps: int, from_scratch: bool, exits: float, data: EncodedData) -> float:
    """Multiply-adds of a step over those of one without the recipe: dropout saves layers, every exit adds a head.

    Distillation adds to each early exit the last layer's head once more, forward only: a third. Training from scratch is judged
    by the dropout in the middle of its schedule.
    """
    backend = loaded.backend
    layers = float(sum(parameter.numel() for parameter in backend.layers.parameters()))
    head = float(backend.hidden_size * backend.vocab_size) * data.target_tokens / data.tokens
    scale = time_scale(steps // 2, steps, from_scratch) if recipe.p_max else 1.0
    rates = dropout_rates(recipe.p_max, backend.num_layers, scale)
    kept = 1 - sum(rates) / len(rates)
    heads = exits + (exits - 1) / 3 * (recipe.distill > 0)
    return (layers * kept + head * heads) / (layers + head)


def _memory_mb(loaded: Trainable, config: FinetuneConfig, data: EncodedData) -> float:
    """Weights, gradients and two moments in fp32, and the activations of one batch of the longest rows: an estimate.

    Of LoRA only the weights count, for its own are few; with gradient checkpointing one layer's activations and every layer's
    input.
    """
    backend = loaded.backend
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    state = (4 if config.lora_rank else 16) * parameters
    layer = 14 * backend.hidden_size + 4 * backend.spec.inner
    layers = backend.num_layers * backend.hidden_size + layer if config.gradient_checkpointing else backend.num_layers * layer
    tokens = config.batch_size * data.longest
    logits = min(tokens * backend.vocab_size, 1 << 24) * 3
    return float((state + 4 * (tokens * layers + logits)) / 2**20)
