"""What training needs of transformers' Trainer beyond its public interface; nothing else in training/ touches private names.

tests/training/test_transformers_internals.py fails when a new version of transformers changes any of it.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .sharding import read_shard, use_fsdp, write_shard

_SCHEDULER = "scheduler.pt"


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
    """A Trainer whose checkpoints hold what its TrainedModule keeps, and are resumed from them. With `sharded_layers` (names of
    classes) it trains by FSDP2; a checkpoint then has a file of each process.

    Trainer offers no public way to do that: `train(resume_from_checkpoint)` always loads the weights by these methods, into the
    module that it trains.
    """

    accelerator: Any
    sharded_layers: tuple[str, ...] = ()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.sharded_layers:
            use_fsdp(self.accelerator, self.sharded_layers)
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # otherwise they are read with the optimizer's state
            self.accelerator.unwrap_model(model or self.model).load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write_shard(self.model, self.optimizer, Path(output_dir), self.args.process_index)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read_shard(self.model, self.optimizer, Path(checkpoint), self.args.process_index)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps Trainer from splitting each batch over all visible GPUs by torch's DataParallel. (torchrun: a process per GPU.)"""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
