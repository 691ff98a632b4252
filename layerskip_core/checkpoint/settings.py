"""Where a model's layerskip.json is: in its folder, beside a GGUF file, or in the cache for what
cannot be written.
"""

import os
from pathlib import Path

from ..errors import CheckpointError
from ..files import write_file
from .info import INFO_FILE, CheckpointInfo, read_info_file
from .locate import ModelRef, files_digest
from .sidecars import cache_folder


def info_of(model: ModelRef) -> CheckpointInfo:
    """The saved settings of a model, empty if there are none. Raises CheckpointError for invalid
    ones.
    """
    # Without a cached file the digest, which looks at all files of the model, is not needed
    if any(cache_folder().glob(f"*.{INFO_FILE}")):
        cached = _in_cache(model)
        if cached.is_file():
            return read_info_file(cached)
    for file in (_own_file(model), Path(model.path) / INFO_FILE):
        if file.is_file():
            return read_info_file(file)
    return CheckpointInfo()


def settings_file(model: ModelRef) -> Path:
    """The file to save a model's settings in: its own, or one of the cache if its folder cannot be
    written.

    The cache's file is named by the state of the model's files: other files have other settings.
    """
    own = _own_file(model)
    return own if os.access(own.parent, os.W_OK) else _in_cache(model)


def write_settings(path: Path, info: CheckpointInfo) -> None:
    """Replaces a settings file. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    write_file(path, info.to_json().encode(), CheckpointError)


def _own_file(model: ModelRef) -> Path:
    if model.gguf is not None and model.sidecar_folder is None:
        return model.gguf.with_suffix(f".{INFO_FILE}")
    return Path(model.path) / INFO_FILE


def _in_cache(model: ModelRef) -> Path:
    return cache_folder() / f"{files_digest(model.name)}.{INFO_FILE}"
