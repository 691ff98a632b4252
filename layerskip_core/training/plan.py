"""A run with all defaults resolved: its settings, its course and its verdict."""

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.open import for_decoding
from ..checkpoint.save import claim_repository, push
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import CheckpointError, ConfigError, TrainingInterrupted
from ..files import hold, read_json
from ..interruption import Interruption
from ..splits import HeldOut
from .answers import Answers
from .module import use_fp32_attention
from .precision import Precision, choose_precision
from .progress import SEAL, LossHistory, StepReport, checkpoints_folder, discard_after
from .recipe import Recipe
from .sharding import process_index, world_size
from .verdict import AnsweredRow, Speedup

_VALIDATIONS = 10  # per run, unless `eval_steps` is given

# May differ between a run and its resumption.
_FREE = (
    *(
        "model",
        "data",
        "output",
        "resume",
        "overwrite",
        "save_steps",
        "report_to",
        "epochs",
        "device",
        "push_to_hub",
    ),
    *("validation", "validation_samples", "eval_steps"),
)
# Of glibc's mallopt
_MMAP_MAX = -4
_TRIM_THRESHOLD = -1


@dataclass(frozen=True)
class Verdict:
    """The estimated speedup by an exit or a drafter."""

    name: str
    accepted: float  # share of first drafts accepted on held-out rows
    speedup: Speedup  # over plain decoding, at the best draft length


class Plan:
    """A run with all defaults resolved, of a model under a `recipe` or of a drafter. Counts of a
    stream: its first rows.
    """

    config: TrainingConfig
    trainable: Trainable
    module: Any  # a RecipeModule or DrafterModule
    device: str
    precision: Precision
    steps: int
    rows: int | None  # None: a stream
    tokens: int  # answers not yet written count at full length
    left_out: int  # rows whose prompt leaves no room for a completion
    parameters: int
    num_layers: int
    sealed: Mapping[str, Any]  # values that a resumed run must share
    resume: Path | None  # the checkpoint to resume from
    held_out: int  # rows
    division: HeldOut | None  # of the data, see splits.py
    notes: tuple[str, ...] = ()  # for the user, before the run
    answers: Answers | None = None  # written by the model, or texts to replay
    recipe: Recipe | None = None
    exit_steps: Mapping[int, int]  # `finetune`: steps that train each exit, the last layer included

    def place(
        self,
        config: TrainingConfig,
        device: torch.device,
        trainable: Trainable,
        resume: Path | None,
    ) -> None:
        """Sets the model, the device and the precision of the run; `resume` is the checkpoint to go
        on from, if any.
        """
        spec = trainable.backend.spec
        self.trainable = trainable
        self.device = str(device)
        self.parameters = spec.parameters
        self.num_layers = spec.layers
        self.precision = choose_precision(config, device, trainable.backend, resume)
        if self.precision.autocast and device.type == "cpu":
            use_fp32_attention(trainable.model)

    def seal(self, resume: Path | None, facts: Mapping[str, Any]) -> None:
        """Records config and `facts` in `sealed`. Raises ConfigError if the checkpoint `resume` was
        sealed with others.
        """
        config = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        config |= config.pop("recipe", {})
        command = {
            "command": "train-drafter" if isinstance(self.config, DrafterConfig) else "finetune"
        }
        run = {
            "steps": self.steps,
            "rows": self.rows,
            "dtype": self.precision.name,
            "processes": world_size(),
        }
        self.resume = resume
        self.sealed = json.loads(json.dumps(command | config | run | dict(facts)))
        if resume is None:
            return
        self.notes += (f"going on from {resume}",)
        before = read_json(resume / SEAL, CheckpointError)
        for name, now in self.sealed.items():
            if before.get(name, now) != now:
                again = "a run is resumed with the same settings on the same data"
                raise ConfigError(
                    f"`resume`: {name} was {before[name]} in the run to go on with, and is {now} now; {again}"
                )

    def run(
        self,
        on_step: Callable[[StepReport], None],
        on_progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> CheckpointInfo:
        """Trains to the end, and writes the result to the config's `output`. Returns the info of
        the saved model.

        `on_progress` gets (stage, done, total) of work before the training, such as "answers".
        Raises CheckpointError, TrainingError for a loss that is not finite or explodes,
        TrainingInterrupted, and LockedError.
        """
        from .trainer import RunTrainer  # imports transformers' Trainer, which a plan does not need

        repository = self.config.push_to_hub
        is_first = process_index() == 0
        if repository is not None and is_first:
            claim_repository(repository)
        _keep_memory()
        with run_lock(self.config.output), Interruption() as interruption, quiet_transformers():

            def progress(stage: str, total: int, done: int, begun: int = 0) -> None:
                if interruption.signal is not None:
                    kept = f"interrupted after {done} of {total} {stage}, which are kept"
                    raise TrainingInterrupted(kept, interruption.signal, 0)
                on_progress(stage, done + begun, total)

            history = RunTrainer(self, *self.data_sets(progress), on_step, interruption).run()
            info = self.save(history)
            if is_first:
                discard_after(checkpoints_folder(self.config.output), None)
                if repository is not None:
                    push(self.config.output, repository)
        return info

    def data_sets(self, progress: Callable[..., None]) -> tuple[Any, Any]:
        """(training rows in the run's order, held-out rows). `progress` gets (stage, total, done,
        begun) of texts.
        """
        raise NotImplementedError

    def save(self, history: LossHistory) -> CheckpointInfo:
        """Writes the result in the first process, and returns its info."""
        raise NotImplementedError

    @property
    def example(self) -> AnsweredRow | None:
        """A held-out row with the trained model's answer, after the run."""
        return None

    def verdicts(self, info: CheckpointInfo) -> list[Verdict]:
        """Verdicts on exits or the drafter, on this machine. Empty without held-out rows, and in
        processes but the first.
        """
        names = self.module.names
        measured = info.agreement
        gains = list[Verdict]()
        known = {
            exit_layer: measured[name] for exit_layer, name in names.items() if name in measured
        }
        if not known or process_index() > 0:
            return []
        backend = for_decoding(self.config.output, self.device, self.config.dtype).backend
        for exit_layer, share in known.items():
            speedup = self.module.estimated_speedup(backend, exit_layer).speed(share)
            gains.append(
                Verdict(f"exit {exit_layer}" if exit_layer else "the drafter", share, speedup)
            )
        return gains

    @property
    def eval_steps(self) -> int:
        """Steps between validations; 0: none."""
        if not self.held_out:
            return 0
        once = self.recipe is not None and self.config.validation is None
        return self.config.eval_steps or (
            self.steps if once else max(1, self.steps // _VALIDATIONS)
        )


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output` for a whole run; under torchrun the first process holds it for all."""
    return hold(output, "a training") if process_index() == 0 else nullcontext()


def _keep_memory() -> None:
    """Makes glibc keep the memory that a step frees: clearing new pages takes 5 to 10% of a step on
    a CPU.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", lambda option, value: 0)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
