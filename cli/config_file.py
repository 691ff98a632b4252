"""`--config FILE.toml`: any of a command's flags from a file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import typer

from layerskip_core.config.checks import shown
from layerskip_core.errors import ConfigError, first_line
from layerskip_core.files import read_text

_KINDS: tuple[tuple[type, str, tuple[type, ...]], ...] = (
    (bool, "true or false", (bool,)),
    (int, "a whole number", (int,)),
    (float, "a number", (int, float)),
    (str, "a text", (str, int)),  # 8 is a list of one exit
)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a TOML file's values the defaults of the flags, so that a flag on the command line wins."""
    if path is None:
        return None
    try:
        values = tomllib.loads(read_text(path, f"--config {path}", ConfigError))
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply") from None
    except ValueError as error:  # of TOML, or of an int of thousands of digits
        raise ConfigError(f"--config {path} is not valid TOML: {first_line(error)}") from None
    parameters = _parameters(context)
    hints = get_type_hints(context.command.callback)
    defaults = {}
    for key, value in values.items():
        flag = key.replace("_", "-")
        if flag not in parameters:
            names = ", ".join(sorted(parameters))
            raise ConfigError(f"--config {path}: {shown(key)!r} is no flag of finetune; known: {names}")
        hint = hints[parameters[flag]]
        asked = get_args(hint) or (hint,)
        needed, kinds = next((needed, kinds) for kind, needed, kinds in _KINDS if kind in asked)
        if type(value) not in kinds:  # the exact type: true is not a number
            raise ConfigError(f"--config {path}: --{flag} must be {needed}, got {shown(value)}")
        if "\0" in str(value):
            raise ConfigError(f"--config {path}: {key} must be a text without NUL")
        defaults[parameters[flag]] = value
    context.default_map = {**cast(Mapping[str, Any], context.default_map or {}), **defaults}
    return path


def _parameters(context: typer.Context) -> dict[str, str]:
    """The command's parameters by their flags, without the dashes."""
    named = {flag.removeprefix("--"): str(parameter.name) for parameter in context.command.params for flag in parameter.opts}
    return {flag: name for flag, name in named.items() if name not in ("config", "help")}
