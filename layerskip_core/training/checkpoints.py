"""Checkpoints of a run in progress: written aside, sealed with the digest of every file, then renamed into place.

A folder that was cut short or damaged since fails its seal, and the one before it is used. A folder of that name without any
sign of this program is somebody else's: a run does not begin beside it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.stored import open_weights
from ..checkpoint.swap import files_below
from ..errors import CheckpointError, ConfigError
from ..storage.json_reading import read_json_object
from ..storage.writing import discard_folder, remove_leftovers, synchronise

LOSSES = "losses.jsonl"  # the history of a run, in each of its checkpoints
_SEAL = "complete.json"
_PREFIX = "checkpoint-"
_KEPT = 2  # should the newest be damaged, there is one before it


@dataclass(frozen=True)
class ResumePoint:
    """The newest whole checkpoint, the settings of the run that wrote it, and what is wrong with newer ones."""

    folder: Path
    step: int
    settings: dict[str, Any]
    damaged: tuple[str, ...]


def checkpoints_folder(output: str) -> Path:
    """Where a run keeps what it can be resumed from."""
    return Path(output) / "checkpoints"


def require_own(folder: Path) -> None:
    """Raises ConfigError for what is in the way of a run's checkpoints and is not of this program."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"`output`: {folder} is in the way: it must be a folder, for checkpoints")
    for path in _numbered(folder):
        if not _is_own(path):
            raise ConfigError(f"`output`: {path} is in the way: not written by layerskip; move it away, or give another folder")


def publish(written: Path, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Seals a checkpoint written aside, moves it into `folder` by one rename, and drops the oldest. Returns its place."""
    _seal(written, settings)
    target = folder / written.name
    if target in _newest_first(folder):  # a damaged one of the same step
        discard_folder(target)
    os.rename(written, target)
    synchronise(folder)
    for old in _newest_first(folder)[_KEPT:]:
        with suppress(OSError):
            discard_folder(old)
    return target


def newest_whole(folder: Path) -> ResumePoint:
    """The checkpoint to resume from. Raises CheckpointError when there is none, saying what is wrong with those there are."""
    damaged: list[str] = []
    for checkpoint in _newest_first(folder):
        fault = _fault(checkpoint)
        if fault is None:
            settings = read_json_object(checkpoint / _SEAL, CheckpointError)["settings"]
            return ResumePoint(checkpoint, _step(checkpoint), settings, tuple(damaged))
        damaged.append(f"{checkpoint.name}: {fault}")
    if damaged:
        raise CheckpointError(f"`resume`: no checkpoint in {folder} is whole: {'; '.join(damaged)}")
    raise CheckpointError(f"`resume`: there is no checkpoint in {folder}; a run writes them with `save_steps` N")


def has_checkpoints(folder: Path) -> bool:
    """Whether a run left anything there that must not be lost unasked."""
    return bool(_newest_first(folder))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in place; its files are not read."""
    return next(iter(_newest_first(folder)), None)


def discard_after(folder: Path, step: int) -> None:
    """Removes what lies beyond a step that a run goes on from: damaged checkpoints, and one that was being written."""
    remove_leftovers(folder)
    for checkpoint in _newest_first(folder):
        if _step(checkpoint) > step:
            discard_folder(checkpoint)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the weights, or a peft model's adapter, of a checkpoint. Raises CheckpointError when any of them is missing."""
    stored = {name: file.get_tensor(name) for name, file in open_weights(checkpoint).items()}
    if hasattr(model, "get_base_model"):
        from peft import set_peft_model_state_dict

        unknown = set_peft_model_state_dict(model, stored).unexpected_keys
        missing: list[str] = []
    else:
        unknown = model.load_state_dict(stored, strict=False).unexpected_keys
        # Tied weights are stored once.
        loaded = {weight.data_ptr() for name, weight in model.state_dict().items() if name in stored}
        missing = [name for name, weight in model.state_dict().items() if weight.data_ptr() not in loaded]
    if unknown or missing:
        raise CheckpointError(f"{checkpoint} does not fit the model: missing weights {missing[:3]}, unknown ones {unknown[:3]}")


def _seal(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    names = files_below(checkpoint)
    files = {name: _digest(checkpoint / name) for name in names}
    seal = checkpoint / _SEAL
    seal.write_text(json.dumps({"files": files, "settings": settings}, indent=2), encoding="utf-8")
    for name in (*names, _SEAL):
        synchronise(checkpoint / name)
    synchronise(checkpoint)


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint in one phrase; None when every file is as it was written."""
    if not (checkpoint / _SEAL).is_file():
        return "it was cut short"
    try:
        sealed = read_json_object(checkpoint / _SEAL, CheckpointError)
        if not (isinstance(sealed["settings"], dict) and sealed["files"]):
            return f"{_SEAL} is damaged"
        for name, digest in sealed["files"].items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if _digest(file) != digest:
                return f"{name} is damaged"
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_SEAL} is damaged"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(filter(_is_own, _numbered(folder)), key=_step, reverse=True)


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if re.fullmatch("[0-9]{1,18}", path.name.removeprefix(_PREFIX))]


def _is_own(checkpoint: Path) -> bool:
    """Whether it has a seal, or what is sealed with all else: a folder of transformers' own Trainer has neither."""
    return not checkpoint.is_symlink() and any((checkpoint / name).is_file() for name in (_SEAL, LOSSES))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))
