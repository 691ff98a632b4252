"""Settings as flags: the core's errors name fields of the configs, people who type a command know them as flags."""

import re
from dataclasses import fields

from layerskip_core.config.data import DataConfig
from layerskip_core.config.decoding import DecodingConfig, SamplingConfig
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.training import FinetuneConfig, RecipeConfig

_OTHER_NAMES = {
    "exit_layer": "--exit",
    "num_draft_tokens": "--spec",
    "p_max": "--pmax",
    "e_scale": "--escale",
    "limit": "--samples",
    "name": "--data",
    "saved": "--from",
}
_CONFIGS = (
    *(DataConfig, DecodingConfig, SamplingConfig, PackingConfig),
    *(BenchConfig, SweepConfig, TaskConfig, FinetuneConfig, RecipeConfig),
)
_OF_COMMANDS = ("raw", "layers", "save", "format")
_NAMES = {field.name for config in _CONFIGS for field in fields(config)} | _OTHER_NAMES.keys() | set(_OF_COMMANDS)


def flag_of(name: str) -> str:
    """The flag of a setting: `max_new_tokens` is --max-new-tokens, `exit_layer` is --exit."""
    return _OTHER_NAMES.get(name, "--" + name.replace("_", "-"))


def with_flags(message: str) -> str:
    """A message of the core, with flags in the place of the settings that it names in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: flag_of(match[1]) if match[1] in _NAMES else match[0], message)
