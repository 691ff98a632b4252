"""LoRA: adapters on linear layers, trained instead of the model's own weights."""

import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.adapters import adapters_of
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line


def with_lora(model: Any, config: FinetuneConfig) -> Any:
    """A peft model with adapters on the linear layers that `lora_targets` names; `all-linear` is all but the head."""
    from peft import LoraConfig, get_peft_model

    rank, targets = config.lora_rank, [name.strip() for name in config.lora_targets.split(",")]
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
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
