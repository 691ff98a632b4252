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
from typing import Any, Protocol

import msgspec
from torch import Tensor

from ..checkpoint.model_weights import copy_into
from ..config.training import TrainingConfig
from ..errors import CheckpointError, ConfigError, plural
from ..files import discard_folder, remove_leftovers

LOSSES = "losses.jsonl"  # the history of a run, in each of its checkpoints
KEPT_CHECKPOINTS = 2
SETTINGS_FILE = "run.json"  # of the run; written first
_STATE = "trainer_state.json"  # last, by Trainer
_PREFIX = "checkpoint-"
_NAME = re.compile(f"{_PREFIX}[0-9]{{1,18}}")


class WorkReport(Protocol):
    """Called during work before the training, such as "answers". An interruption now keeps `done`
    of the `total`, and loses what more is `begun`, an estimate. May raise.
    """

    def __call__(self, stage: str, done: int, total: int, begun: int = 0) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Losses are means over target tokens, in nats, by exit.

    `exit_losses` are the latest of every exit. `validation_losses` are those of the last
    validation, empty before the first; so is `agreement`, the share of first drafts of early exits
    that the last layer accepts.
    """

    step: int
    total_steps: int
    loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    tokens_per_second: float
    validation_losses: dict[int, float]
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
        lines = (checkpoint / LOSSES).read_bytes()
        for losses in msgspec.json.Decoder(StepLosses).decode_lines(lines):
            history.add(losses)
        return history

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))
        if losses.validation:
            self.validated = losses.validation
            self.agreement = losses.agreement

    def add_validation(self, losses: dict[int, float], agreement: dict[int, float]) -> None:
        """Adds what was measured after the latest step."""
        step = self.steps.pop()
        self.add(msgspec.structs.replace(step, validation=losses, agreement=agreement))

    def report(
        self, total_steps: int, learning_rate: float, tokens_per_second: float
    ) -> StepReport:
        """The report of the latest step."""
        step = self.steps[-1]
        return StepReport(
            step=step.step,
            total_steps=total_steps,
            loss=step.loss,
            exit_losses=self.latest,
            learning_rate=learning_rate,
            tokens_per_second=tokens_per_second,
            validation_losses=self.validated,
            agreement=self.agreement,
        )

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
    complete = []
    for checkpoint in checkpoints(folder):
        state = checkpoint / _STATE
        if state.is_file() and state.stat().st_size:
            complete.append(checkpoint)
    return complete


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints by name, newest first; some may be incomplete."""
    found = [path for path in folder.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def resume_point(config: TrainingConfig) -> Path | None:
    """The checkpoint to resume from; None to train from step 0. Raises CheckpointError, ConfigError
    for what is in the way.
    """
    folder = checkpoints_folder(config.output)
    _refuse_foreign(folder)
    there = newest_first(folder)
    if config.resume and there:
        return there[0]
    # Before its first checkpoint a run has the journal of its answers to go on with
    if config.resume and not any(folder.glob("*.jsonl")):
        again = "a run with `save_steps` N has them until it ends"
        raise CheckpointError(f"`resume`: there is no checkpoint in {folder}; {again}")
    if there and not config.overwrite:
        again = "give `resume` to go on (and `overwrite` if it replaces a model), or `overwrite` alone to start anew"
        raise ConfigError(f"`output` {config.output} holds an unfinished run; {again}")
    return None


def _refuse_foreign(folder: Path) -> None:
    """Raises ConfigError for a file, a link or a folder of another program in place of ours."""
    found = checkpoints(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        found = [folder]
    for path in found:
        ours = path.is_dir() and not path.is_symlink()
        # A process that was killed before it wrote the settings leaves an empty folder
        if ours and any(path.iterdir()):
            ours = (path / SETTINGS_FILE).is_file()
        if not ours:
            raise ConfigError(
                f"`output`: {path} is in the way: not written by layerskip; move it away, or give another folder"
            )


def begin_checkpoint(checkpoint: Path, settings: Mapping[str, Any], history: LossHistory) -> None:
    """Begins a checkpoint with the files that Trainer does not write."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / SETTINGS_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (checkpoint / LOSSES).write_bytes(history.to_jsonl())


def discard_after(folder: Path, kept: Path | None) -> None:
    """Removes checkpoints later than `kept` (None: all), and the folder if it is then empty."""
    later = checkpoints(folder)
    if kept is not None:
        later = [checkpoint for checkpoint in later if _step(checkpoint) > _step(kept)]
    discard(folder, later)
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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))
