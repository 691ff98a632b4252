"""A run with all defaults resolved, and its time and memory on this machine."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from math import cos, pi
from typing import Any

import psutil
import torch
from torch import nn

from ..checkpoint.loaded import Trainable, pick_dtype
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import ConfigError
from ..model.native.compiled import multiplies_bf16
from .answers import Answers
from .data import collate
from .module import use_fp32_attention
from .progress import ResumePoint
from .recipe import Recipe, RunStep
from .sharding import world_size

_VALIDATIONS = 10  # per run, unless `eval_steps` is given
_BRIEF = 2.0  # seconds; a step that takes less is timed again, without what only a first one does

# May differ between a run and its resumption: none of it changes the steps that follow.
_FREE = (
    *("model", "data", "output", "resume", "overwrite", "save_steps", "report_to", "epochs", "device", "push_to_hub"),
    *("validation", "validation_samples", "eval_steps"),
)


class Plan:
    """A run, all defaults resolved. It trains a model under a `recipe`, or what drafts for a model that stays as it is.

    Of a stream `rows` is None, and `tokens`, `truncated` and `left_out` are those of its first rows. With answers that are
    still to be written, `tokens` is for answers of the full length. `sealed` decides the steps of the run: it is resumed with
    the same or not at all. The learning rate rises and falls once in each of `phases` of `steps` optimizer steps.
    """

    config: TrainingConfig  # with `lr` and `max_length`, and for a drafter the exits
    trainable: Trainable
    module: Any  # a RecipeModule or DrafterModule
    device: str
    autocast: bool
    steps: int
    rows: int | None
    tokens: int
    left_out: int  # rows whose prompt leaves no room for a token of the completion
    parameters: int
    num_layers: int
    sealed: Mapping[str, Any]
    resume: ResumePoint | None
    held_out: int  # rows
    trained: int  # parameters
    notes: tuple[str, ...] = ()  # what the user should know before it starts
    step_seconds: float | None = None  # what one step was measured to take in each process; None under FSDP
    memory_mb: float  # at its peak, with the optimizer's moments

    answers: Answers | None = None  # that the model writes to its rows and those held out, or texts of a replay
    recipe: Recipe | None = None
    exit_steps: Mapping[int, float]  # of a model: that train each exit, the last layer included
    phases: int = 1

    def place(self, config: TrainingConfig, device: torch.device, trainable: Trainable) -> None:
        """`dtype` auto is bf16 autocast on a GPU, and on a CPU where that is faster (`multiplies_bf16`)."""
        spec, self.trainable = trainable.backend.spec, trainable
        self.device, self.parameters, self.num_layers = str(device), spec.parameters, spec.layers
        self.autocast = pick_dtype(config.dtype, device, spec.parameters) == torch.bfloat16
        if config.dtype == "auto" and device.type == "cpu":
            self.autocast = multiplies_bf16()
        if self.autocast and device.type == "cpu":
            use_fp32_attention(trainable.model)

    def seal(self, resume: ResumePoint | None, facts: Mapping[str, Any]) -> None:
        """Seals the config and the `facts`. Raises ConfigError where the checkpoint to resume from was sealed with others."""
        config = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        config |= config.pop("recipe", {})
        command = {"command": "train-drafter" if isinstance(self.config, DrafterConfig) else "finetune"}
        run = {"steps": self.steps, "rows": self.rows, "dtype": self.dtype, "processes": world_size()}
        self.resume = resume
        self.sealed = json.loads(json.dumps(command | config | run | dict(facts)))
        if resume is None:
            return
        self.notes += (f"going on from {resume.folder}",)
        for name, value in self.sealed.items():
            if name in resume.settings and resume.settings[name] != value:
                raise ConfigError(
                    f"`resume`: {name} was {resume.settings[name]} in the run to go on with, and is {value} now; a run is "
                    "resumed with the same settings on the same data"
                )

    def measure(self, rows: Sequence[dict[str, Any]], mean_tokens: float) -> None:
        """Measures a step in the middle of the run: forward and backward on one batch of `rows`.

        The run's rows have `mean_tokens` each.
        """
        module: nn.Module = self.module
        self.trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
        if self.is_sharded:
            return
        device, on_gpu = torch.device(self.device), self.device.startswith("cuda")
        module.to(device).train()
        batch = {name: value.to(device) for name, value in collate(list(islice(cycle(rows), self.config.batch_size))).items()}
        measured = int(batch.pop("lengths").sum())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                loss = module(**batch, step=RunStep(self.steps // 2, self.steps))["loss"]
            torch.autograd.backward(loss)
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            module.zero_grad(set_to_none=True)
            if seconds > _BRIEF:
                break
        peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_memory()
        self.step_seconds = seconds * self.config.batch_size * self.config.accumulation * mean_tokens / measured
        self.memory_mb = (peak + 8 * self.trained) / 2**20

    @property
    def dtype(self) -> str:
        return "bf16 autocast" if self.autocast else "fp32"

    @property
    def total_steps(self) -> int:
        return self.steps * self.phases

    @property
    def is_sharded(self) -> bool:
        return getattr(self.config, "fsdp", False)

    @property
    def eval_steps(self) -> int:
        """Steps between validations; 0: none."""
        if not self.held_out:
            return 0
        once = self.recipe is not None and self.config.validation is None
        return self.config.eval_steps or (self.total_steps if once else max(1, self.total_steps // _VALIDATIONS))

    def lr_share(self, step: int) -> float:
        """The learning rate of a step, counted from 0, over the highest one: a line upwards, then as `scheduler` says to 0."""
        warmup = round(self.config.warmup * self.steps)
        index = step % self.steps if step < self.total_steps else self.steps
        if index < warmup:
            return index / warmup
        done = (index - warmup) / max(1, self.steps - warmup)
        return {"cosine": (1 + cos(pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.config.scheduler]


def _peak_memory() -> int:
    """The most bytes that this process had in memory at once."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
