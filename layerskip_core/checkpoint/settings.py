"""Where a model's layerskip.json is: in its folder, beside a GGUF file, or in the cache for what
cannot be written.
"""

import os
from pathlib import Path

from ..errors import CheckpointError
from ..files import write_file
from .info import INFO_FILE, CheckpointInfo, read_info, read_info_file
from .locate import Location, files_digest, present
from .sidecars import cache_folder


def info_of(name: str, location: Location | None = None) -> CheckpointInfo:
    """The saved settings of a model, empty if there are none. Raises CheckpointError for invalid
    ones.
    """
    location = location or present(name)
    if any(cache_folder().glob(f"*.{INFO_FILE}")) and (kept := _in_cache(name)).is_file():
        return read_info_file(kept)
    if location.gguf_file is not None and (own := _own_file(location)).is_file():
        return read_info_file(own)
    return read_info(location.path)


def settings_file(name: str, location: Location) -> Path:
    """The file to save a model's settings in: its own, or one of the cache if its folder cannot be
    written.

    The cache's file is named by the state of the model's files: other files have other settings.
    """
    own = _own_file(location)
    return own if os.access(own.parent, os.W_OK) else _in_cache(name)


def write_settings(path: Path, info: CheckpointInfo) -> None:
    """Replaces a settings file. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    write_file(path, info.to_json().encode(), CheckpointError)


def _own_file(location: Location) -> Path:
    folder = Path(location.path)
    return folder / (
        INFO_FILE
        if location.gguf_file is None
        else Path(location.gguf_file).with_suffix(f".{INFO_FILE}")
    )


def _in_cache(name: str) -> Path:
    return cache_folder() / f"{files_digest(name)}.{INFO_FILE}"
