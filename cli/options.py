"""The flags of settings that are declared in layerskip_core/config, and settings that only the command line has."""

import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, is_typeddict

import typer

from layerskip_core.config.calibration import CalibrationConfig
from layerskip_core.config.data import DataConfig
from layerskip_core.config.decoding import DecodingOptions
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.options import OUTPUT, Flag, Text, flag_of, hints_of
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.serving import ServeConfig
from layerskip_core.config.training import ExitBlockSettings, FinetuneConfig, RecipeSettings, RetentionSettings
from layerskip_core.config.verification import VerifyConfig

FORMATS = ("table", "json", "csv", "markdown")
_FORMAT_HELP = "Format of standard output: table, json, csv or markdown."
Format = Annotated[str, typer.Option("--format", help=_FORMAT_HELP, rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class Report:
    """Where the result of a measurement goes; `saved` is a results.json to render again."""

    format: Annotated[Literal["table", "json", "csv", "markdown"], Flag(OUTPUT, _FORMAT_HELP)] = "table"
    output: Annotated[
        Text | None, Flag(OUTPUT, "Folder for report.html, answers.html, results.json, results.csv and plots.")
    ] = None
    saved: Annotated[Text | None, Flag(OUTPUT, "Measure nothing: render this results.json again.", "--from")] = None


_KINDS = (
    DecodingOptions, PromptingConfig, PackingConfig, MachineConfig, TaskConfig, BenchConfig, SweepConfig, VerifyConfig,
    ServeConfig, CalibrationConfig, Report, DataConfig, RecipeSettings, RetentionSettings, ExitBlockSettings, FinetuneConfig,
)  # fmt: skip
# Flags of settings within other settings that a command does not have, because it says this itself.
HIDDEN: dict[type, tuple[str, ...]] = {
    BenchConfig: ("strategy", "policy", "exits"),
    SweepConfig: ("strategy", "exit_layer", "num_draft_tokens", "exit_confidence", "policy", "exits"),
    ServeConfig: ("seed",),
    VerifyConfig: ("dtype",),
}


def is_settings(kind: Any) -> bool:
    return is_dataclass(kind) or is_typeddict(kind)


@cache
def flags_in(kind: Any) -> dict[str, Flag]:
    """The flags of a kind's own fields, in their order; none of what is no kind of settings."""
    if not is_settings(kind):
        return {}
    order = [field.name for field in fields(kind)] if is_dataclass(kind) else list(hints_of(kind))
    named = {field: flag_of(hints_of(kind)[field]) for field in order}
    return {field: flag for field, flag in named.items() if flag is not None}


def flags_of(field: str, option: Flag) -> tuple[str, ...]:
    """The flags of a field, --max-new-tokens for `max_new_tokens` unless its Flag names others. Errors show the first."""
    return tuple((option.flag or "--" + field.replace("_", "-")).split("/"))


_NAMED = {field: flags_of(field, option)[0] for kind in _KINDS for field, option in flags_in(kind).items()}
_OF_COMMANDS = ("layers", "save", "engine", "only")
FLAGS = _NAMED | {name: "--" + name.replace("_", "-") for name in _OF_COMMANDS}
ALONE = {
    flag for kind in _KINDS for field, option in flags_in(kind).items() if option.optional for flag in flags_of(field, option)
}  # flags that need no value


def with_flags(message: str) -> str:
    """A message of the core, with flags in place of the settings that it names in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: FLAGS.get(match[1], match[0]), message)
