"""Which files of a folder belong to its model, and how they are replaced in one step.

The new files are first written to a staging folder inside the folder, with a plan that lists the old files to remove. When
everything is on disk, one rename makes the staging folder READY: from then on the new files are in effect. Then they are moved
to their places. If the process is killed meanwhile, READY remains, and the next command that reads or writes the folder moves
the rest.

Other programs see the old model, then for a few renames a folder without a config, which is not a model, then the new model.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, LayerSkipError, LockedError
from ..files import discard_folder, hold, publish_folder, read_json_object, synchronise
from ..model.drafting import ORDER_FILE
from .info import ADAPTER_FILE, CONFIG_FILES, INFO_FILE, read_info, require_inside

RUN_FILES = ("losses.jsonl", "losses.png", ORDER_FILE)  # finetune writes them with a model
READY = ".layerskip-ready"
_PLAN = "plan.json"
_WAIT = 60.0  # seconds to wait for another process to finish its renames
_ATTEMPTS = 5  # to read a model that is being replaced
_CONFIG_KEYS = {"config.json": "model_type", ADAPTER_FILE: "peft_type"}  # a key that tells them from other files of that name
_USUAL = (  # the files of a checkpoint of transformers
    *(*_CONFIG_KEYS, "generation_config.json", INFO_FILE, ORDER_FILE, "chat_template.jinja", "chat_template.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    "additional_chat_templates/*.jinja",
)
_READ_BY_LOADERS = (*_USUAL, "*.safetensors", "*.safetensors.index.json")

Result = TypeVar("Result")


def model_files(folder: Path) -> set[str]:
    """Relative names of the model's files in a folder: those that layerskip.json lists, else those with the usual names.

    A folder without a model has none. Raises CheckpointError if layerskip.json is not valid.
    """
    info = read_info(folder)
    names = {INFO_FILE, *info.files}
    if not info.files:
        if not any(_has_key(folder / name, key) for name, key in _CONFIG_KEYS.items()):
            return set()
        names |= {*_matching(folder, _USUAL), *(RUN_FILES if "final_losses" in info.details else ())}
    return {name for name in names if (folder / name).is_file()}


def loaded_files(folder: Path) -> list[str]:
    """Relative names of the files that loaders read, and of those that layerskip.json lists."""
    names = {*_matching(folder, _READ_BY_LOADERS), *read_info(folder).files}
    return sorted(name for name in names if (folder / name).is_file())


def obstacles(folder: Path, written: Collection[str] = ()) -> list[str]:
    """Files of others that a new model would overwrite (`written`), or that loaders would take for part of it, sorted."""
    return in_the_way(folder, {*written, *_matching(folder, _READ_BY_LOADERS)})


def in_the_way(folder: Path, names: Collection[str]) -> list[str]:
    """Those of the names that something in the folder has which does not belong to its model, sorted."""
    return sorted(name for name in {*names} - model_files(folder) if os.path.lexists(folder / name))


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
    if not _is_ready(folder):
        return
    try:
        with hold(folder, "ending an interrupted save", _WAIT):
            if _is_ready(folder):
                _finish(Path(folder))
    except LockedError:
        raise
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


def _is_ready(folder: str | Path) -> bool:
    return (Path(folder) / READY / _PLAN).exists()


def _finish(folder: Path) -> None:
    """Moves the files of READY into place, the configs last. Moves that were done before an interruption are skipped."""
    ready = folder / READY
    try:
        synchronise(folder)
        old = [require_inside(name) for name in read_json_object(ready / _PLAN, CheckpointError)["old"]]
        new = sorted(set(files_below(ready)) - {_PLAN}, key=lambda name: (name in CONFIG_FILES, name))
        # Configs go first: other programs then see no model, rather than one model's config with another's weights.
        for name in sorted({*old, *(name for name in CONFIG_FILES if name in new)}, key=lambda name: name not in CONFIG_FILES):
            _remove(folder / name, folder)
        for name in new:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(ready / name, folder / name)
        synchronise(folder)
        discard_folder(ready)
    except (OSError, KeyError, TypeError, ValueError) as reason:
        cause = f"{reason.filename}: {reason.strerror}" if isinstance(reason, OSError) else f"{ready / _PLAN} is not valid"
        raise CheckpointError(f"a new model is complete in {ready}, but cannot be moved to {folder}: {cause}") from reason


def _remove(path: Path, folder: Path) -> None:
    """Removes a file, and its sub-folder if that is then empty."""
    path.unlink(missing_ok=True)
    if path.parent != folder:
        with suppress(OSError):
            path.parent.rmdir()


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Relative names in a folder and its sub-folders; a pattern with / is for a sub-folder."""
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return [path.relative_to(folder).as_posix() for path in paths]


def _has_key(file: Path, key: str) -> bool:
    with suppress(LayerSkipError):
        return key in read_json_object(file, CheckpointError)
    return False
