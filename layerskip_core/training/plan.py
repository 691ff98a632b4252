"""A run with all defaults resolved, and its time and memory on this machine."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from math import cos, pi
from typing import Any

import psutil
import torch
from torch import nn

from ..checkpoint.loaded import pick_dtype
from ..config.training import DrafterConfig, FinetuneConfig, TrainingConfig
from ..errors import ConfigError
from ..model.native.compiled import multiplies_bf16
from ..model.spec import AnySpec
from .answers import Answers
from .checkpoints import ResumePoint
from .data import collate
from .recipe import Recipe, RunStep
from .sharding import world_size
from .worth import Worth

_VALIDATIONS = 10  # per run, unless `eval_steps` is given
_BRIEF = 2.0  # seconds; a step that takes less is timed again, without what only a first one does

# May differ between a run and its resumption: none of it changes the steps that follow.
_FREE = (
    *("model", "data", "output", "resume", "overwrite", "save_steps", "report_to", "epochs", "device", "push_to_hub"),
    *("validation", "validation_samples", "eval_steps"),
)


@dataclass(frozen=True)
class Plan:
    """A run, all defaults resolved. It trains a model under a `recipe`, or what drafts for a model that stays as it is.

    Of a stream `rows` is None, and `tokens`, `truncated` and `left_out` are those of its first rows. With answers that are
    still to be written, `tokens` is for answers of the full length. `sealed` decides the steps of the run: it is resumed with
    the same or not at all. The learning rate rises and falls once in each of `phases` of `steps` optimizer steps.
    """

    config: TrainingConfig  # with `lr` and `max_length`, and for a drafter the exits
    device: str
    autocast: bool
    steps: int
    rows: int | None
    tokens: int
    left_out: int  # rows whose prompt leaves no room for a token of the completion
    parameters: int
    num_layers: int
    sealed: Mapping[str, Any]
    notes: tuple[str, ...]  # what the user should know before it starts
    held_out: int = 0  # rows
    trained: int = 0  # parameters
    step_seconds: float | None = None  # what one step was measured to take in each process; None under FSDP
    memory_mb: float = 0.0  # at its peak, with the optimizer's moments

    truncated: int = 0
    recipe: Recipe | None = None
    exit_steps: Mapping[int, float] = field(default_factory=dict)  # that train each exit, the last layer included
    adapted_layers: int | None = None  # the first ones, to which LoRA is confined

    answers: Answers | None = None  # that the model writes to its rows and those held out, or texts of a replay
    phases: int = 1
    state_seconds: float = 0.0
    disk_mb: float = 0.0  # of states
    worth: Worth | None = None  # of the first drafter that is trained

    @property
    def dtype(self) -> str:
        return "bf16 autocast" if self.autocast else "fp32"

    @property
    def total_steps(self) -> int:
        return self.steps * self.phases

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.config, FinetuneConfig) and self.config.fsdp

    @property
    def rests_readers(self) -> bool:
        """Whether a step may train no reader of some exit."""
        return self.recipe is not None and self.recipe.exit_reader != "none" and self.recipe.curriculum != "all"

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


def make_plan(
    config: TrainingConfig,
    device: torch.device,
    spec: AnySpec,
    resume: ResumePoint | None,
    notes: tuple[str, ...],
    facts: Mapping[str, Any],
    **fields: Any,
) -> Plan:
    """A plan with the `fields` that are given. The config, as it is resolved, and the `facts` are sealed.

    `dtype` auto is bf16 autocast on a GPU, and on a CPU where that is faster (`multiplies_bf16`). Raises ConfigError where the
    checkpoint to resume from was sealed with other settings.
    """
    chosen = pick_dtype(config.dtype, device, spec.parameters) == torch.bfloat16
    autocast = multiplies_bf16() if config.dtype == "auto" and device.type == "cpu" else chosen
    fields |= {"parameters": spec.parameters, "num_layers": spec.layers}
    plan = Plan(config, str(device), autocast, **fields, sealed={}, notes=())
    sealed = {name: value for name, value in asdict(config).items() if name not in _FREE}
    sealed |= sealed.pop("recipe", {})
    command = {"command": "train-drafter" if isinstance(config, DrafterConfig) else "finetune"}
    run = {"steps": plan.steps, "rows": plan.rows, "dtype": plan.dtype, "processes": world_size()}
    sealed = json.loads(json.dumps(command | sealed | run | dict(facts)))
    if resume is not None:
        for name, value in sealed.items():
            if name in resume.settings and resume.settings[name] != value:
                raise ConfigError(
                    f"`resume`: {name} was {resume.settings[name]} in the run to go on with, and is {value} now; a run is "
                    "resumed with the same settings on the same data"
                )
        notes += (f"going on from {resume.folder}",)
    return replace(plan, sealed=sealed, notes=notes)


def timed(plan: Plan, module: nn.Module, rows: Sequence[dict[str, Any]], mean_tokens: float) -> Plan:
    """A plan with what a step in the middle of its run was measured to take: forward and backward on one batch of `rows`.

    The run's rows have `mean_tokens` each.
    """
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    if plan.is_sharded:
        return replace(plan, trained=trained)
    device = torch.device(plan.device)
    module.to(device).train()
    batch = {name: value.to(device) for name, value in collate(list(islice(cycle(rows), plan.config.batch_size))).items()}
    measured = int(batch.pop("lengths").sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.autocast):
            loss = module(**batch, step=RunStep(plan.steps // 2, plan.steps))["loss"]
        torch.autograd.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        module.zero_grad(set_to_none=True)
        if seconds > _BRIEF:
            break
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_memory()
    share = plan.config.batch_size * plan.config.accumulation * mean_tokens / measured
    return replace(plan, trained=trained, step_seconds=seconds * share, memory_mb=(peak + 8 * trained) / 2**20)


def _peak_memory() -> int:
    """The most bytes that this process had in memory at once."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
