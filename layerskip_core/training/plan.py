"""RunPlan: what a run of training will do, with every default resolved and before anything is
written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config.training import DrafterConfig, TrainingConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json
from ..prompting import PromptTemplate
from ..splits import HeldOut
from .precision import Precision
from .progress import SETTINGS_FILE
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
    parameters: int
    num_layers: int
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
    def eval_steps(self) -> int:
        """Steps between validations; 0: none."""
        if not self.held_out:
            return 0
        if self.config.eval_steps:
            return self.config.eval_steps
        if self.recipe is not None and self.config.validation is None:
            return self.steps
        return max(1, self.steps // _VALIDATIONS)


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
        if before.get(name, now) != now:
            raise ConfigError(
                f"`resume`: {name} was {before[name]} in the run to go on with, and is {now} now; "
                "a run is resumed with the same settings on the same data"
            )
