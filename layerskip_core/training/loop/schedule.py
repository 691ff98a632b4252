"""What the training loop needs to know of a run, whatever it trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

from ...config.training import FinetuneConfig
from ..plan import TrainingPlan, sealed_settings

_VALIDATIONS = 10  # per run, unless `eval_steps` is given


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run. `sealed` are the settings that its checkpoints keep.

    The learning rate rises and falls once in each of `phases` parts of equal length. `sharded_layers`: the classes of the
    layers that FSDP shards one by one; none: it is not used.
    """

    output: str
    steps: int
    lr: float
    batch_size: int
    accumulation: int
    warmup: float  # share of a phase
    weight_decay: float
    seed: int
    autocast: bool
    device: str
    save_steps: int  # 0: no checkpoints
    eval_steps: int  # 0: no validation
    report_to: str
    sealed: Mapping[str, Any]
    phases: int = 1
    sharded_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.steps % self.phases == 0

    @property
    def warmup_steps(self) -> int:
        """Of each phase."""
        return round(self.warmup * self.steps / self.phases)

    def lr_share(self, step: int) -> float:
        """The learning rate of a step, counted from 0, over the initial one: a line upwards, then half a cosine to 0."""
        length = self.steps // self.phases
        place = min(step, self.steps - 1) % length if step < self.steps else length
        if place < self.warmup_steps:
            return place / self.warmup_steps
        return (1 + cos(pi * (place - self.warmup_steps) / max(1, length - self.warmup_steps))) / 2


def schedule_of(
    config: FinetuneConfig, steps: int, lr: float, autocast: bool, device: str, validates: bool, sealed: Mapping[str, Any],
    phases: int = 1, sharded_layers: tuple[str, ...] = (),
) -> Schedule:  # fmt: skip
    """The schedule that a config asks for, with what a plan has resolved. `validates`: there are held-out rows."""
    return Schedule(
        config.output, steps, lr, config.batch_size, config.accumulation, config.warmup, config.weight_decay, config.seed,
        autocast, device, config.save_steps, config.eval_steps or max(1, steps // _VALIDATIONS) if validates else 0,
        config.report_to, sealed, phases, sharded_layers,
    )  # fmt: skip


def recipe_schedule(
    config: FinetuneConfig, plan: TrainingPlan, validates: bool, layer_classes: tuple[str, ...] = ()
) -> Schedule:
    """The schedule of a run of the recipe on layers of these classes."""
    sealed, sharded = sealed_settings(config, plan), layer_classes if config.fsdp else ()
    return schedule_of(
        config, plan.steps, plan.lr, plan.autocast, plan.device, validates, sealed, sharded_layers=sharded
    )  # fmt: skip
