"""What training needs of transformers' Trainer beyond its public interface; nothing else in training/ touches private names.

tests/training/test_transformers_internals.py fails when a new version of transformers changes any of it.
"""

from pathlib import Path

from torch import nn
from transformers import Trainer, TrainingArguments

from .checkpoints import load_weights


class ResumingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints hold the model inside RecipeModule, under its own names, and are resumed from them.

    Trainer offers no public way to do that: `train(resume_from_checkpoint)` always loads the weights by this method, into the
    module that it trains.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # accelerate has written the shards of the whole module
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.accelerator.unwrap_model(model or self.model).model, Path(resume_from_checkpoint))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps Trainer from splitting each batch over all visible GPUs by torch's DataParallel. (torchrun: a process per GPU.)"""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
