"""A run in progress: reports, losses and checkpoints, which begin with the run's settings and end
with Trainer's state.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..config.training import TrainingConfig
from ..errors import CheckpointError, ConfigError, plural
from ..files import discard_folder, remove_leftovers

LOSSES = "losses.jsonl"  # the history of a run, in each of its checkpoints
KEPT = 2
SEAL = "run.json"  # written first
_STATE = "trainer_state.json"  # last, by Trainer
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Losses are means over target tokens, in nats; `exit_losses` holds the
    latest loss of every exit.
    """

    step: int
    total_steps: int
    loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    tokens_per_second: float
    # Of every exit at the last validation; empty before the first
    validation_losses: dict[int, float]
    # Of early exits there: share of first drafts accepted
    agreement: dict[int, float] = field(default_factory=dict)


class StepLosses(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step's losses in nats per target token. On held-out rows, by exit: `validation`,
    `agreement` with the last layer.
    """

    step: int
    loss: float
    exits: dict[int, float]
    validation: dict[int, float] = {}
    agreement: dict[int, float] = {}

    @property
    def final(self) -> float:
        """The last layer's loss: the last layer is on in every step."""
        return self.exits[max(self.exits)]


@dataclass
class LossHistory:
    """All steps of a run, the latest loss of every exit (ascending), and the last values measured
    on held-out rows.
    """

    steps: list[StepLosses] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)
    validated: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "LossHistory":
        """The history that a checkpoint holds."""
        history = cls()
        for losses in msgspec.json.Decoder(StepLosses).decode_lines(
            (checkpoint / LOSSES).read_bytes()
        ):
            history.add(losses)
        return history

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))
        if losses.validation:
            self.validated = losses.validation
            self.agreement = losses.agreement

    def report(self, total_steps: int, learning_rate: float, speed: float) -> StepReport:
        """The report of the latest step."""
        step = self.steps[-1]
        rest = (learning_rate, speed, self.validated, self.agreement)
        return StepReport(step.step, total_steps, step.loss, self.latest, *rest)

    def to_jsonl(self) -> bytes:
        """One JSON line per step."""
        return msgspec.json.Encoder().encode_lines(self.steps)


def checkpoints_folder(output: str) -> Path:
    """The folder of the checkpoints of a run."""
    return Path(output) / "checkpoints"


def newest_first(folder: Path) -> list[Path]:
    """A run's complete checkpoints, newest first. Trainer's state, written last, must have
    content.
    """
    states = ((path, path / _STATE) for path in checkpoints(folder))
    return [path for path, state in states if state.is_file() and state.stat().st_size]


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints by name, newest first; some may be incomplete."""
    return sorted(
        (path for path in folder.glob("*") if re.fullmatch(f"{_PREFIX}[0-9]{{1,18}}", path.name)),
        key=_step,
    )[::-1]


def resume_point(config: TrainingConfig) -> Path | None:
    """The checkpoint to resume from; None to train from step 0. Raises CheckpointError, ConfigError
    for what is in the way.
    """
    folder = checkpoints_folder(config.output)
    there = newest_first(folder)
    for path in (
        [folder] if os.path.lexists(folder) and not folder.is_dir() else checkpoints(folder)
    ):
        # Ours have a seal; a process that was killed before it wrote one leaves an empty folder.
        if (
            path.is_symlink()
            or not path.is_dir()
            or (any(path.iterdir()) and not (path / SEAL).is_file())
        ):
            raise ConfigError(
                f"`output`: {path} is in the way: not written by layerskip; move it away, or give another folder"
            )
    if config.resume and there:
        return there[0]
    if config.resume and not any(folder.glob("*.jsonl")):
        again = "a run with `save_steps` N has them until it ends"
        raise CheckpointError(f"`resume`: there is no checkpoint in {folder}; {again}")
    if there and not config.overwrite:
        again = "give `resume` to go on (and `overwrite` if it replaces a model), or `overwrite` alone to start anew"
        raise ConfigError(f"`output` {config.output} holds an unfinished run; {again}")
    return None


def seal(checkpoint: Path, settings: Mapping[str, Any], history: LossHistory) -> None:
    """Begins a checkpoint with the files that Trainer does not write."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / SEAL).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (checkpoint / LOSSES).write_bytes(history.to_jsonl())


def discard_after(folder: Path, kept: Path | None) -> None:
    """Removes checkpoints later than `kept` (None: all), and the folder if it is then empty."""
    discard(
        folder, [each for each in checkpoints(folder) if kept is None or _step(each) > _step(kept)]
    )
    with suppress(OSError):
        folder.rmdir()


def discard(folder: Path, checkpoints: Iterable[Path]) -> None:
    """Removes checkpoints. A process killed meanwhile leaves no partial checkpoint. Needs the run's
    lock.
    """
    remove_leftovers(folder)  # of a killed process
    for checkpoint in checkpoints:
        discard_folder(checkpoint)


def restore(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Overwrites weights in place by the stored ones of a checkpoint. Raises ValueError unless it
    has these and no others.
    """
    require_same_names(stored, weights)
    for name, weight in weights.items():
        if stored[name].shape != weight.shape:
            raise ValueError(
                f"{name} must have the shape {list(weight.shape)}, found {list(stored[name].shape)}"
            )
    copy_into(weights, stored)


def require_same_names(stored: Iterable[str], needed: Iterable[str]) -> None:
    """Raises ValueError if a checkpoint lacks weights that a run trains, or has others."""
    missing = sorted({*needed} - {*stored})
    others = sorted({*stored} - {*needed})
    if missing:
        raise ValueError(f"{plural(len(missing), 'weight')} missing in it, {missing[0]} the first")
    if others:
        raise ValueError(
            f"{plural(len(others), 'weight')} in it unknown to this run, {others[0]} the first"
        )


@torch.no_grad()
def copy_into(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrites the weights that have `values`, in place."""
    for name, value in values.items():
        weights[name].copy_(value)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))
