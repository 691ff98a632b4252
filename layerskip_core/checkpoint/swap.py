"""A folder's files become others in one step, which is a rename; whoever comes next ends what that step began.

The new files are written into a folder of their own beside the old ones, with a plan that names the old files to go. When all
is on disk that folder is renamed to READY: from then on the new files count. Then they are moved to their places. A process
that is killed meanwhile leaves READY, and the next command that reads or writes the folder moves what is left.

A reader without this program sees the old model, then for the time of a few renames a folder without a config, which is no
model, then the new one.
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
from ..storage.writing import discard_folder, synchronise
from .info import CONFIG_FILES, require_inside

READY = ".layerskip-ready"
_PLAN = "plan.json"
_WAIT = 60.0  # seconds for another process to end its renames
_ATTEMPTS = 5  # at reading a model that is being replaced

Found = TypeVar("Found")


def files_below(folder: Path) -> list[str]:
    """Relative names of all files of a folder and its folders, with / between their parts, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def replace_files(folder: Path, staging: Path, old: Iterable[str]) -> None:
    """Puts the files of `staging`, a folder in `folder`, in the place of the `old` ones. Needs the lock of `folder`.

    Raises OSError before anything was changed; CheckpointError when the new files count but could not all be moved.
    """
    plan = {"old": sorted(set(old) - set(files_below(staging)))}
    (staging / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
    for path in (*map(staging.joinpath, files_below(staging)), *(one for one in staging.rglob("*") if one.is_dir()), staging):
        synchronise(path)
    os.rename(staging, folder / READY)
    _finish(folder)


def settle(folder: str | Path) -> None:
    """Ends a replacement that a killed process began; waits for one that another process is in the middle of.

    Raises LayerSkipError when it cannot be ended: the folder is not writable, or a file cannot be moved.
    """
    ends = time.monotonic() + _WAIT
    while (Path(folder) / READY / _PLAN).exists():
        try:
            with hold(folder, "ending an interrupted save"):
                if (Path(folder) / READY / _PLAN).exists():
                    _finish(Path(folder))
        except LockedError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
        except LayerSkipError as error:
            raise CheckpointError(f"a model was being saved to {folder}, which must be ended first: {error}") from None


def read_whole(folder: str | Path, read: Callable[[], Found]) -> Found:
    """What `read` makes of a folder: of its old files or of its new ones, never of some of each.

    Raises what `read` raises of files that nobody replaced meanwhile; CheckpointError when they are replaced again and again.
    """
    for _ in range(_ATTEMPTS):
        settle(folder)
        before = _version(folder)
        try:
            found = read()
        except Exception:
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return found
    raise CheckpointError(f"{folder} is being replaced again and again")


def _version(folder: str | Path) -> list[tuple[int, ...]]:
    """What differs as soon as a replacement has begun, or happened: it makes READY first, and replaces the configs."""
    found: list[tuple[int, ...]] = []
    for name in (f"{READY}/{_PLAN}", *CONFIG_FILES):
        with suppress(OSError):
            state = os.stat(Path(folder) / name)
            found.append((state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size))
    return found


def _finish(folder: Path) -> None:
    """Moves what is ready into place, the configs last; what was done before it was interrupted is skipped."""
    ready = folder / READY
    try:
        synchronise(folder)
        old = [require_inside(name) for name in read_json_object(ready / _PLAN, CheckpointError)["old"]]
        new = sorted(set(files_below(ready)) - {_PLAN}, key=lambda name: (name in CONFIG_FILES, name))
        # Without a config there is no model: better for other programs than the config of one and the weights of another.
        for name in [
            *(config for config in CONFIG_FILES if config in new),
            *sorted(old, key=lambda one: one not in CONFIG_FILES),
        ]:
            _remove(folder, name)
        for name in new:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(ready / name, folder / name)
        synchronise(folder)
        discard_folder(ready)
    except (OSError, KeyError, TypeError, ValueError) as reason:
        told = f"{reason.filename}: {reason.strerror}" if isinstance(reason, OSError) else f"{ready / _PLAN} is not valid"
        raise CheckpointError(f"a new model is whole in {ready}, but cannot be moved to {folder}: {told}") from reason


def _remove(folder: Path, name: str) -> None:
    """Removes a file, and the folder between that it leaves empty."""
    path = folder / name
    path.unlink(missing_ok=True)
    if path.parent != folder:
        with suppress(OSError):
            path.parent.rmdir()
