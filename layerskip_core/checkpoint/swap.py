"""Replaces the files of a folder in one step. A replacement that was interrupted is finished by the next command.

The new files are first written to a staging folder inside the folder, with a plan that lists the old files to remove. When
everything is on disk, one rename makes the staging folder READY: from then on the new files are in effect. Then they are moved
to their places. If the process is killed meanwhile, READY remains, and the next command that reads or writes the folder moves
the rest.

Other programs see the old model, then for a few renames a folder without a config, which is not a model, then the new model.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, LayerSkipError, LockedError
from ..storage.json_reading import read_json_object
from ..storage.locks import hold
from ..storage.writing import discard_folder, publish_folder, synchronise
from .info import CONFIG_FILES, require_inside

READY = ".layerskip-ready"
_PLAN = "plan.json"
_WAIT = 60.0  # seconds to wait for another process to finish its renames
_ATTEMPTS = 5  # to read a model that is being replaced

Result = TypeVar("Result")


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, with / between the parts, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def replace_files(folder: Path, staging: Path, old: Iterable[str]) -> None:
    """Replaces the `old` files by those of `staging`, a folder in `folder`. The caller holds the lock of `folder`.

    Raises OSError before anything was changed, and CheckpointError if the new files are in effect but could not all be moved.
    """
    plan = {"old": sorted(set(old) - set(files_below(staging)))}
    (staging / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
    publish_folder(staging, folder / READY)
    _finish(folder)


def settle(folder: str | Path) -> None:
    """Finishes a replacement that a killed process began, or waits while another process does it.

    Raises LayerSkipError if that fails: the folder is not writable, or a file cannot be moved.
    """
    deadline = time.monotonic() + _WAIT
    while (Path(folder) / READY / _PLAN).exists():
        try:
            with hold(folder, "ending an interrupted save"):
                if (Path(folder) / READY / _PLAN).exists():
                    _finish(Path(folder))
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        except LayerSkipError as error:
            raise CheckpointError(f"an interrupted save to {folder} must be finished first: {error}") from None


def read_whole(folder: str | Path, read: Callable[[], Result]) -> Result:
    """Calls `read` until no file of the folder was replaced during the call, so that it never mixes two models.

    Raises what `read` raises when no file was replaced, and CheckpointError if the files are replaced again and again.
    """
    for _ in range(_ATTEMPTS):
        settle(folder)
        before = _version(folder)
        try:
            result = read()
        except Exception:
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return result
    raise CheckpointError(f"{folder} is being replaced again and again")


def _version(folder: str | Path) -> list[tuple[int, ...]]:
    """Changes as soon as a replacement begins, which makes READY, and when it has finished, because configs are replaced."""
    version: list[tuple[int, ...]] = []
    for name in (f"{READY}/{_PLAN}", *CONFIG_FILES):
        with suppress(OSError):
            state = os.stat(Path(folder) / name)
            version.append((state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size))
    return version


def _finish(folder: Path) -> None:
    """Moves the files of READY into place, the configs last. Moves that were done before an interruption are skipped."""
    ready = folder / READY
    try:
        synchronise(folder)
        old = [require_inside(name) for name in read_json_object(ready / _PLAN, CheckpointError)["old"]]
        new = sorted(set(files_below(ready)) - {_PLAN}, key=lambda name: (name in CONFIG_FILES, name))
        # Configs go first: other programs then see no model, rather than one model's config with another's weights.
        for name in [
            *(config for config in CONFIG_FILES if config in new),
            *sorted(old, key=lambda name: name not in CONFIG_FILES),
        ]:
            _remove(folder, name)
        for name in new:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(ready / name, folder / name)
        synchronise(folder)
        discard_folder(ready)
    except (OSError, KeyError, TypeError, ValueError) as reason:
        cause = f"{reason.filename}: {reason.strerror}" if isinstance(reason, OSError) else f"{ready / _PLAN} is not valid"
        raise CheckpointError(f"a new model is complete in {ready}, but cannot be moved to {folder}: {cause}") from reason


def _remove(folder: Path, name: str) -> None:
    """Removes a file, and its sub-folder if that is then empty."""
    path = folder / name
    path.unlink(missing_ok=True)
    if path.parent != folder:
        with suppress(OSError):
            path.parent.rmdir()
