"""A run with all of its defaults resolved, and what it will take on this machine."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.loaded import pick_dtype
from ..config.training import Answers, BlockLoss, Feature, FinetuneConfig
from ..errors import ConfigError
from ..model.exit_blocks import ExitBlock
from .answers import Replay
from .checkpoints import ResumePoint
from .recipe import Recipe, RunStep, sequence_length

_VALIDATIONS = 10  # per run, unless `eval_steps` is given
_BRIEF = 2.0  # seconds; a step that takes less is timed again, without what only a first one does


@dataclass(frozen=True)
class Blocks:
    """The exit blocks of a run, ExitBlockSettings with all defaults, and what comes before their training."""

    exits: tuple[int, ...]  # ascending
    feature: Feature
    answers: Answers
    answer_tokens: int
    answer_temperature: float
    loss: BlockLoss
    answered: int  # of the rows and those held out, those whose answers an earlier run has left
    answer_seconds: float
    state_seconds: float
    disk_mb: float  # of states

    @property
    def placed(self) -> list[ExitBlock]:
        return [ExitBlock(exit_layer, self.feature) for exit_layer in self.exits]


@dataclass(frozen=True)
class StepCost:
    """What one step was measured to take in each process, and its peak memory with the optimizer's moments, in MB."""

    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Plan:
    """A run, all defaults resolved. It trains a whole model under a `recipe`, or `blocks` at exits of a frozen one.

    Of a stream `rows` is None, and `tokens`, `truncated` and `left_out` are those of its first rows. With answers that are
    still to be written, `tokens` is for answers of the full length. `sealed` decides the steps of the run: it is resumed with
    the same or not at all. The learning rate rises and falls once in each of `phases` of `steps` optimizer steps.
    """

    config: FinetuneConfig
    device: str
    autocast: bool
    lr: float
    max_length: int
    steps: int
    rows: int | None
    tokens: int
    left_out: int  # rows whose prompt leaves no room for a token of the completion
    parameters: int
    num_layers: int
    sealed: Mapping[str, Any]
    trained: int = 0  # parameters
    held_out: int = 0  # rows
    phases: int = 1
    truncated: int = 0
    recipe: Recipe | None = None
    exits_per_step: float = 1.0
    adapted_layers: int | None = None  # the first ones, to which LoRA is confined
    replay: Replay | None = None
    blocks: Blocks | None = None
    step: StepCost | None = None  # None under FSDP
    notes: tuple[str, ...] = ()  # what the user should know before it starts

    @property
    def dtype(self) -> str:
        return dtype_name(self.autocast)

    @property
    def total_steps(self) -> int:
        return self.steps * self.phases

    @property
    def eval_steps(self) -> int:
        """Steps between validations; 0: none."""
        return (self.config.eval_steps or max(1, self.total_steps // _VALIDATIONS)) if self.held_out else 0

    @property
    def warmup_steps(self) -> int:
        """Of each phase."""
        return round(self.config.warmup * self.total_steps / self.phases)

    def lr_share(self, step: int) -> float:
        """The learning rate of a step, counted from 0, over the initial one: a line upwards, then half a cosine to 0."""
        index = min(step, self.total_steps - 1) % self.steps if step < self.total_steps else self.steps
        if index < self.warmup_steps:
            return index / self.warmup_steps
        return (1 + cos(pi * (index - self.warmup_steps) / max(1, self.steps - self.warmup_steps))) / 2


def dtype_name(autocast: bool) -> str:
    return "bf16 autocast" if autocast else "fp32"


def tokens_per_row(config: FinetuneConfig, context: int) -> int:
    """Tokens per row: what was asked for, or the regime's length within the model's context."""
    if config.max_length is None:
        return sequence_length(config.regime, context)
    if config.max_length > context:
        raise ConfigError(f"`max_length` must be at most the model's context of {context} tokens, got {config.max_length}")
    return config.max_length


def autocasts(config: FinetuneConfig, device: torch.device, parameters: int) -> bool:
    """Whether to train in bf16 autocast. `auto` does wherever a model would be loaded in bf16, and also for small models on a
    CPU with bf16 instructions, where it is twice as fast.
    """
    if config.dtype == "auto" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return True
    return pick_dtype(config.dtype, device, parameters) == torch.bfloat16


def resumed_notes(resume: ResumePoint | None, sealed: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say of the checkpoint that a run goes on from. Raises ConfigError where its settings were others."""
    if resume is None:
        return ()
    for name, value in sealed.items():
        if name in resume.settings and resume.settings[name] != value:
            raise ConfigError(
                f"`resume`: {name} was {resume.settings[name]} in the run to go on with, and is {value} now; a run is resumed "
                "with the same settings on the same data"
            )
    return (*(f"{fault}; it is not used" for fault in resume.damaged), f"going on from {resume.folder}")


def timed_step(
    module: nn.Module, batch: Mapping[str, Tensor], device: torch.device, autocast: bool, steps: int, tokens: float
) -> StepCost:
    """Runs forward and backward on one batch in the middle of a run of `steps`. A step has so many `tokens` in this process."""
    module.to(device).train()
    moved = {name: value.to(device) for name, value in batch.items()}
    own = int(moved.pop("lengths").sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = module(**moved, step=RunStep(steps // 2, steps))["loss"]
        torch.autograd.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        module.zero_grad(set_to_none=True)
        if seconds > _BRIEF:
            break
    moments = 8 * sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    return StepCost(seconds * tokens / own, (_peak_bytes(device) + moments) / 2**20)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def repeated(rows: list[Any], count: int) -> list[Any]:
    """So many rows, the same again where there are fewer."""
    return list(islice(cycle(rows), count))
