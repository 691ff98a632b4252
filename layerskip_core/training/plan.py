"""RunPlan: what a run of training will do, with every default resolved and before anything is
written. Job: a plan, and what it works on.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json
from ..model.spec import AnySpec
from ..prompting import PromptTemplate
from ..splits import HeldOut
from .cost import AnsweredRow, CostBaseline
from .precision import Precision
from .progress import SETTINGS_FILE, LossHistory, WorkReport
from .recipe import Recipe
from .sharding import world_size

VERSIONS = {name: version(name) for name in ("layerskip", "torch", "transformers")}
_VALIDATIONS = 10  # per run, unless `eval_steps` is given

# Settings that may differ between a run and its resumption.
_FREE = (
    "model data output resume overwrite save_steps report_to epochs device "
    "validation validation_samples eval_steps"
)


@dataclass(frozen=True)
class RunPlan:
    """A run with all defaults resolved, of a model under a `recipe` or of a drafter.

    Counts of a stream are those of its first rows.
    """

    config: TrainingConfig  # with what the model and the data decide
    device: str
    precision: Precision
    spec: AnySpec  # of the model
    template: PromptTemplate
    rows: int | None  # None: a stream
    held_out: int  # rows
    left_out: int  # rows whose prompt leaves no room for a completion
    tokens: int  # answers not yet written count at full length
    division: HeldOut | None  # of the data, see splits.py
    steps: int
    checkpoint: Path | None  # to go on from
    notes: tuple[str, ...] = ()  # for the user, before the run
    truncated: int = 0  # rows
    recipe: Recipe | None = None  # None: a drafter beside a frozen model
    # By exit, how many steps train it; the last layer included
    exit_steps: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.spec.layers

    @property
    def eval_steps(self) -> int:
        """Steps between validations; 0: none."""
        if not self.held_out:
            return 0
        if self.config.eval_steps:
            return self.config.eval_steps
        if self.recipe is not None and self.config.validation is None:
            return self.steps
        return max(1, self.steps // _VALIDATIONS)


@dataclass(frozen=True)
class RunResult:
    """What a run gives, besides the files in `output`."""

    info: CheckpointInfo
    example: AnsweredRow | None = None  # a held-out row with the trained model's answer


class Job(Protocol):
    """A planned run, and what it works on. `execute` calls the methods in this order, and trains
    `module` before `save`.
    """

    @property
    def plan(self) -> RunPlan: ...
    @property
    def fixed_settings(self) -> Mapping[str, Any]:
        """What a resumed run must share."""

    @property
    def trainable(self) -> Trainable: ...
    @property
    def module(self) -> Any:
        """A RecipeModule or a DrafterModule."""

    def measure_before(self, report: WorkReport) -> CostBaseline | None:
        """Measures the model before its training, if that changes it."""

    def data_sets(self, report: WorkReport) -> tuple[Any, Any]:
        """(training rows in the run's order, held-out rows or None)."""

    def save(self, history: LossHistory, baseline: CostBaseline | None) -> RunResult:
        """Writes the result to the config's `output`; all processes call it."""


def fixed_settings(plan: RunPlan, digests: Mapping[str, Any]) -> dict[str, Any]:
    """What a run and its resumption must share, as it is read back from JSON. `digests`: of the
    model and of the rows.
    """
    config = {
        name: value for name, value in asdict(plan.config).items() if name not in _FREE.split()
    }
    config |= config.pop("recipe", {})
    is_drafter = isinstance(plan.config, DrafterConfig)
    command = {"command": "train-drafter" if is_drafter else "finetune"}
    run = {
        "steps": plan.steps,
        "rows": plan.rows,
        "dtype": plan.precision.name,
        "processes": world_size(),
    }
    if plan.recipe is not None:
        run |= asdict(plan.recipe)
    settings: dict[str, Any] = json.loads(json.dumps(command | config | run | dict(digests)))
    return settings


def require_same_run(checkpoint: Path | None, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if the run of a checkpoint had other `fixed_settings`."""
    if checkpoint is None:
        return
    before = read_json(checkpoint / SETTINGS_FILE, CheckpointError)
    for name, now in settings.items():
        then = before.get(name)
        if then != now:
            raise ConfigError(
                f"`resume`: {name} was {then} in the run to go on with, and is {now} now; "
                "a run is resumed with the same settings on the same data"
            )
