"""What a run is about to do: its resolved settings, the cost of a step, memory. Nothing is trained or written here."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from ..checkpoint.loaded import Trainable
from ..config.checks import require_exit_layer
from ..config.training import FinetuneConfig
from .adapters import adapted_layers
from .cost import memory_mb, relative_cost, step_flops
from .recipe.curriculum import mean_exits
from .recipe.presets import learning_rate, recipe_preset
from .recipe.resolved import Recipe, resolve_recipe
from .rows.encoded_data import EncodedData
from .rows.encoder import Encoder
from .rows.replay import Replay
from .rows.step_rows import data_rows, world_size

COMMANDS_STEPS = 300  # of a run on `commands` without `steps`: about five minutes on two cores

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"

# May differ between a run and its resumption: none of it changes the steps that follow.
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
    "exit_blocks",  # of a run of the recipe always the default
}


@dataclass(frozen=True)
class TrainingPlan:
    """The settings and estimates of a run, all defaults resolved. `cost` is the computation of a step as a multiple of a step
    without the recipe, `flops` its floating-point operations over all processes; memory is in MB, of each process.
    `original`: the fingerprint of the model as it came, where the run needs it; `data_digest`: of the encoded rows.

    Of a stream `rows` is None, and `tokens`, `truncated` and `left_out` are those of its first rows.
    """

    recipe: Recipe
    lr: float
    max_length: int
    steps: int
    rows: int | None
    tokens: int
    truncated: int
    left_out: int  # rows whose prompt leaves no room for a token of the completion
    parameters: int
    num_layers: int
    exits_per_step: float
    cost: float
    flops: float
    memory_mb: float
    device: str
    autocast: bool
    adapted_layers: int | None = None  # the first ones, to which LoRA is confined
    original: str | None = None
    data_digest: str | None = None
    replay: Replay | None = None
    notes: tuple[str, ...] = ()  # what the user should know before it starts

    @property
    def dtype(self) -> str:
        return "bf16 autocast" if self.autocast else "fp32"


def make_plan(
    config: FinetuneConfig,
    trainable: Trainable,
    data: EncodedData,
    encoder: Encoder,
    device: str,
    autocast: bool,
    sealed: Mapping[str, Any] = MappingProxyType({}),
    original: str | None = None,
    replay: Replay | None = None,
) -> TrainingPlan:
    """`sealed`: the settings of the run that is resumed; they decide R where it is not asked for. `original`: see TrainingPlan.

    Raises ConfigError when the recipe is undefined for this model or number of steps.
    """
    backend = trainable.backend
    parameters = sum(parameter.numel() for parameter in trainable.model.parameters())
    asked = config.recipe.over(recipe_preset(config.regime, parameters))
    for exit_layer in asked.exits:
        require_exit_layer(exit_layer, backend.num_layers, field="exits")
    if asked.rotation is None and sealed.get("rotation"):
        asked = replace(asked, rotation=sealed["rotation"])
    recipe = resolve_recipe(asked, backend.num_layers, backend.vocab_size)
    steps = steps_of(config, data)
    exits = mean_exits(recipe, steps, backend.num_layers)
    cost = relative_cost(backend, recipe, steps, config, exits, data)
    longest = data.longest if replay is None else max(data.longest, replay.longest)
    return TrainingPlan(
        recipe=recipe,
        lr=config.lr or learning_rate(config.regime, parameters),
        max_length=encoder.max_length,
        steps=steps,
        rows=None if data.streamed else len(data.rows),
        tokens=data.tokens,
        truncated=data.truncated,
        left_out=data.left_out,
        parameters=parameters,
        num_layers=backend.num_layers,
        exits_per_step=exits,
        cost=cost,
        flops=step_flops(backend, recipe, steps, config, exits, cost, data),
        memory_mb=memory_mb(backend, config, parameters, longest, autocast),
        device=device,
        autocast=autocast,
        adapted_layers=adapted_layers(config, recipe, backend.num_layers),
        original=original,
        data_digest=data.digest,
        replay=replay,
        notes=(_PACKED,) * encoder.pack + (_STREAMED,) * data.streamed,
    )


def sealed_settings(config: FinetuneConfig, plan: TrainingPlan) -> dict[str, Any]:
    """What decides a run's steps, all of it resolved: a run is resumed with the same or not at all."""
    settings = {name: value for name, value in resolved_config(config, plan).items() if name not in _FREE}
    recipe, retention = settings.pop("recipe"), settings.pop("retention")
    facts = {
        "steps": plan.steps, "rows": plan.rows, "tokens": plan.tokens, "dtype": plan.dtype, "processes": world_size(),
        "original": plan.original, "data_digest": plan.data_digest,
        "replayed": None if plan.replay is None else plan.replay.journal.name,
    }  # fmt: skip
    return {**settings, **recipe, **retention, **facts}


def resolved_config(config: FinetuneConfig, plan: TrainingPlan) -> dict[str, Any]:
    """The fields of a config with the plan's values where none was asked for, as a JSON file gives them back."""
    found: dict[str, Any] = {"recipe": asdict(plan.recipe), "lr": plan.lr, "max_length": plan.max_length}
    if plan.replay is not None:
        found["retention"] = asdict(replace(config.retention, replay_tokens=plan.replay.how.tokens))
    fields = asdict(config) | {"epochs": config.epochs or 1.0} | found
    resolved: dict[str, Any] = json.loads(json.dumps(fields))
    return resolved


def steps_of(config: FinetuneConfig, data: EncodedData) -> int:
    """Optimizer steps. An epoch sees each row of the data once; rows of a replay come on top."""
    if config.steps is not None:
        return config.steps
    if config.data.name == "commands" and not config.data.limit:
        return COMMANDS_STEPS
    return max(1, math.ceil(len(data.rows) / data_rows(config) * (config.epochs or 1.0)))
