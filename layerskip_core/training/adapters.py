"""LoRA: adapters on linear layers, trained instead of the model's own weights."""

import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.locate import adapters_of
from ..checkpoint.transformers_read import quiet_transformers
from ..config.checks import require
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line
from .recipe.resolved import Recipe


def adapted_layers(config: FinetuneConfig, recipe: Recipe, num_layers: int) -> int | None:
    """How many of the first layers have adapters: those that the highest early exit runs; None for the whole model.

    Raises ConfigError where no early exit is trained.
    """
    if config.lora_layers == "all":
        return None
    require(recipe.curriculum != "none", "lora_layers", "all with `curriculum` none, which trains no exit", config.lora_layers)
    return max(recipe.exits, default=num_layers - 1)


@quiet_transformers()
def with_lora(model: Any, config: FinetuneConfig, layers: int | None = None) -> Any:
    """A peft model with adapters on the linear layers that `lora_targets` names; `all-linear` is all but the head.

    With `layers`, only those in so many of the first layers.
    """
    from peft import LoraConfig, get_peft_model

    rank, targets = config.lora_rank, [name.strip() for name in config.lora_targets.split(",")]
    if layers is not None:
        modules = dict(model.named_modules())  # peft adapts what is named in full whatever its layer
        whole = [name for name in targets if name in modules]
        require(not whole, "lora_targets", "names within a layer with `lora_layers` below-exit", ", ".join(whole))
        if targets == ["all-linear"]:  # which peft does not take together with layers
            linear = (name for name, part in model.model.layers[0].named_modules() if isinstance(part, torch.nn.Linear))
            targets = sorted({name.rpartition(".")[2] for name in linear})
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        layers_to_transform=None if layers is None else list(range(layers)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model,
    )
    torch.manual_seed(config.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"`lora_targets` {config.lora_targets}: {first_line(error)}") from error


def require_base_kept(config: FinetuneConfig) -> None:
    """Raises ConfigError when an adapter would replace the model that it belongs to."""
    if not config.lora_keep:
        return
    adapters, below = adapters_of(config.model)
    for base in (*adapters, below):
        if Path(base).is_dir() and Path(config.output).is_dir() and os.path.samefile(base, config.output):
            raise ConfigError(f"`lora_keep`: the adapter needs its base {base}, which `output` {config.output} would replace")
