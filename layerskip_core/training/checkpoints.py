"""Checkpoints of a run in progress: written to a staging folder, sealed with a digest of every file, then renamed into place.

If a checkpoint is incomplete or damaged, the one before it is used. A run refuses to start beside a folder of such a name that
this program did not write.
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

from ..checkpoint.folder import open_weights
from ..checkpoint.swap import files_below
from ..errors import CheckpointError, ConfigError
from ..files import discard_folder, listed, publish_folder, read_json_object, remove_leftovers

LOSSES = "losses.jsonl"  # the history of a run, in each of its checkpoints
_SEAL = "complete.json"
_PREFIX = "checkpoint-"
KEPT = 2  # if the newest is damaged, there is one before it


@dataclass(frozen=True)
class ResumePoint:
    """The newest intact checkpoint, the settings of the run that wrote it, and the faults of newer checkpoints."""

    folder: Path
    step: int
    settings: dict[str, Any]
    damaged: tuple[str, ...]


def checkpoints_folder(output: str) -> Path:
    """The folder of the checkpoints of a run."""
    return Path(output) / "checkpoints"


def require_own(folder: Path) -> None:
    """Raises ConfigError for files in the way of a run's checkpoints that this program did not write."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"`output`: {folder} is in the way: it must be a folder, for checkpoints")
    for path in _numbered(folder):
        if not _is_own(path):
            raise ConfigError(f"`output`: {path} is in the way: not written by layerskip; move it away, or give another folder")


def publish(written: Path, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Seals a checkpoint in a staging folder, renames it into `folder`, and removes the oldest ones. Returns its new path."""
    _seal(written, settings)
    target = folder / written.name
    if target in _newest_first(folder):  # a damaged checkpoint of the same step
        discard_folder(target)
    publish_folder(written, target)
    for old in _newest_first(folder)[KEPT:]:
        with suppress(OSError):
            discard_folder(old)
    return target


def newest_whole(folder: Path) -> ResumePoint:
    """The checkpoint to resume from. Raises CheckpointError if none is intact, with the fault of each."""
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
    """Whether a run left checkpoints that must not be overwritten without asking."""
    return bool(_newest_first(folder))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, by its name; its files are not checked."""
    return next(iter(_newest_first(folder)), None)


def discard_after(folder: Path, step: int) -> None:
    """Removes checkpoints of later steps than the one that a run resumes from, and staging folders."""
    remove_leftovers(folder)
    for checkpoint in _newest_first(folder):
        if _step(checkpoint) > step:
            discard_folder(checkpoint)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the weights, or a peft model's adapter, of a checkpoint. Raises CheckpointError when any of them is missing."""
    stored = {name: file.mapped(name) for name, file in open_weights(checkpoint).items()}
    if hasattr(model, "get_base_model"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        missing = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - stored.keys())
        unknown = set_peft_model_state_dict(model, stored).unexpected_keys
    else:
        unknown = model.load_state_dict(stored, strict=False).unexpected_keys
        # Tied weights are stored once.
        loaded = {weight.data_ptr() for name, weight in model.state_dict().items() if name in stored}
        missing = [name for name, weight in model.state_dict().items() if weight.data_ptr() not in loaded]
    if unknown or missing:
        raise CheckpointError(f"{checkpoint} does not fit the model: missing {listed(missing)}; unknown {listed(unknown)}")


def _seal(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    files = {name: _digest(checkpoint / name) for name in files_below(checkpoint)}
    (checkpoint / _SEAL).write_text(json.dumps({"files": files, "settings": settings}, indent=2), encoding="utf-8")


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
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
    """Whether it has a seal, or the losses of a run: a checkpoint of transformers' own Trainer has neither."""
    return not checkpoint.is_symlink() and any((checkpoint / name).is_file() for name in (_SEAL, LOSSES))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))
