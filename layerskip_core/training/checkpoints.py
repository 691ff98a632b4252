"""Checkpoints of a run in progress: written to a staging folder with the settings of the run, then renamed into place.

So each is whole. A run refuses to start beside a folder of such a name that this program did not write.
"""

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
from ..errors import CheckpointError, ConfigError, listed
from ..files import discard_folder, publish_folder, read_json, remove_leftovers

LOSSES = "losses.jsonl"  # the history of a run, in each of its checkpoints
KEPT = 2
_SEAL = "run.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class ResumePoint:
    """The newest checkpoint, and the settings of the run that wrote it."""

    folder: Path
    settings: dict[str, Any]

    @property
    def step(self) -> int:
        return _step(self.folder)


def checkpoints_folder(output: str) -> Path:
    """The folder of the checkpoints of a run."""
    return Path(output) / "checkpoints"


def newest_first(folder: Path) -> list[Path]:
    """A run's checkpoints by their names; their files are not checked."""
    return sorted((path for path in folder.glob("*") if re.fullmatch(f"{_PREFIX}[0-9]{{1,18}}", path.name)), key=_step)[::-1]


def require_own(folder: Path) -> None:
    """Raises ConfigError for files in the way of a run's checkpoints that this program did not write.

    Its own have a seal, or the losses of a run: a checkpoint of transformers' own Trainer has neither.
    """
    found = [folder] if os.path.lexists(folder) and not folder.is_dir() else newest_first(folder)
    for path in found:
        if path.is_symlink() or not any((path / name).is_file() for name in (_SEAL, LOSSES)):
            raise ConfigError(f"`output`: {path} is in the way: not written by layerskip; move it away, or give another folder")


def publish(written: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Adds the settings to a checkpoint in a staging folder, renames it into `folder`, and removes the oldest ones."""
    (written / _SEAL).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    publish_folder(written, folder / written.name)
    for old in newest_first(folder)[KEPT:]:
        with suppress(OSError):
            discard_folder(old)


def newest(folder: Path) -> ResumePoint:
    """Raises CheckpointError if there is none."""
    for checkpoint in newest_first(folder)[:1]:
        return ResumePoint(checkpoint, read_json(checkpoint / _SEAL, CheckpointError))
    raise CheckpointError(f"`resume`: there is no checkpoint in {folder}; a run with `save_steps` N has them until it ends")


def discard_after(folder: Path, step: int) -> None:
    """Removes checkpoints of later steps than this one, staging folders, and the folder if nothing else is there."""
    remove_leftovers(folder)
    for checkpoint in newest_first(folder):
        if _step(checkpoint) > step:
            discard_folder(checkpoint)
    with suppress(OSError):
        folder.rmdir()


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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))
