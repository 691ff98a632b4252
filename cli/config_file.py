"""`--config FILE.toml`: any of a command's flags from a file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import typer

from layerskip_core.config.checks import shown
from layerskip_core.errors import ConfigError, first_line
from layerskip_core.storage.reading import read_text

_KINDS: tuple[tuple[type, str, tuple[type, ...]], ...] = (
    (bool, "true or false", (bool,)),
    (int, "a whole number", (int,)),
    (float, "a number", (int, float)),
    (str, "a text", (str, int)),  # 8 is a list of one exit
)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes a TOML file's values as the defaults of the flags, so that a flag given beside it wins."""
    if path is None:
        return None
    try:
        values = tomllib.loads(read_text(path, f"--config {path}", ConfigError))
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply") from None
    except ValueError as error:  # of TOML, or of an int of thousands of digits
        raise ConfigError(f"--config {path} is not valid TOML: {first_line(error)}") from None
    known = get_type_hints(context.command.callback)
    del known["config"], known["return"]
    given = {key.replace("-", "_"): value for key, value in values.items()}
    for key, value in given.items():
        if key not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise ConfigError(f"--config {path}: {shown(key)!r} is no flag of finetune; known: {names}")
        asked = get_args(known[key]) or (known[key],)
        needed, kinds = next((needed, kinds) for kind, needed, kinds in _KINDS if kind in asked)
        if type(value) not in kinds:  # an exact type: true is no number
            flag = "--" + key.replace("_", "-")
            raise ConfigError(f"--config {path}: {flag} must be {needed}, got {shown(value)}")
        if "\0" in str(value):
            raise ConfigError(f"--config {path}: {key} must be a text without NUL")
    context.default_map = {**cast(Mapping[str, Any], context.default_map or {}), **given}
    return path
