"""`--config FILE.toml`: any of a command's flags from a file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import typer

from layerskip_core.errors import ConfigError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes a TOML file's values as the defaults of the flags, so that a flag given beside it wins."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}") from None
    known = {parameter.name for parameter in context.command.params} - {"config"}
    given = {key.replace("-", "_"): value for key, value in values.items()}
    for key in given:
        if key not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known if name))
            raise ConfigError(f"--config {path}: {key!r} is no flag of finetune; known: {names}")
    context.default_map = {**cast(Mapping[str, Any], context.default_map or {}), **given}
    return path
