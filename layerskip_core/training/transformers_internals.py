"""What training needs of transformers' Trainer beyond its public interface; nothing else in training/ touches private names.

tests/training/test_transformers_internals.py fails when a new version of transformers changes any of it.
"""

from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import Trainer, TrainingArguments


class TrainedModule(Protocol):
    """What a run trains: an nn.Module that knows what a checkpoint keeps of it.

    Its forward returns `loss`, `per_exit` and `exit_layers` as RecipeModule's does, and perhaps its `divergence`, or `agreeing`
    (exits,), the counts of targets where an exit's best token is the last layer's.
    """

    @property
    def measured_exits(self) -> tuple[int, ...]:
        """The exits of `per_exit` in evaluation mode."""

    @property
    def vocab_size(self) -> int: ...

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""

    def load(self, folder: Path) -> None:
        """Raises CheckpointError for a folder that does not fit."""


class ResumingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints hold what its TrainedModule keeps, and are resumed from them.

    Trainer offers no public way to do that: `train(resume_from_checkpoint)` always loads the weights by this method, into the
    module that it trains.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # accelerate has written the shards of the whole module
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(model or self.model).load(Path(resume_from_checkpoint))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps Trainer from splitting each batch over all visible GPUs by torch's DataParallel. (torchrun: a process per GPU.)"""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
