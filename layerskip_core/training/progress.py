"""The progress of a run: sums over the micro-batches of a step, the report of each step, the history of losses."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Losses are means over target tokens, in nats; `exit_losses` holds the latest loss of every exit."""

    step: int
    total_steps: int
    loss: float
    final_loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    tokens_per_second: float
    validation_losses: dict[int, float]  # of every exit at the last validation; empty before the first
    agreement: dict[int, float] = field(default_factory=dict)  # of frozen exits there: the share of first drafts accepted
    divergence: float | None = None  # from the original, with an anchor


@dataclass(frozen=True)
class StageProgress:
    """What is done of a stage before the training, such as `answers`."""

    stage: str
    done: int
    total: int


@dataclass
class StepSums:
    """Sums over the micro-batches of one optimizer step. They stay on the device: reading them would wait for it."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    per_exit: Tensor = field(default_factory=lambda: torch.zeros(()))  # (exits,) from the first micro-batch on
    exit_layers: tuple[int, ...] = ()
    divergence: Tensor | None = None  # from the original, with an anchor
    tokens: Tensor | int = 0  # without padding
    micro_batches: int = 0
    targets: Tensor | int = 1  # target tokens of the whole step, over all micro-batches and processes

    def add(self, output: dict[str, Any], tokens: Tensor, targets: Tensor | int) -> None:
        self.loss = self.loss + output["loss"].detach()
        self.per_exit = self.per_exit + output["per_exit"]
        self.exit_layers = output["exit_layers"]
        if "divergence" in output:
            self.divergence = output["divergence"] + (0 if self.divergence is None else self.divergence)
        self.tokens = self.tokens + tokens
        self.micro_batches += 1
        self.targets = targets


@dataclass
class RunState:
    """Shared by the trainer and its callback: the sums of the current step, and what the run is doing, to explain errors."""

    sums: StepSums = field(default_factory=StepSums)
    phase: Literal["loading", "training", "saving"] = "loading"


@dataclass(frozen=True)
class StepLosses:
    """A step's losses in nats per target token: the weighted loss, the exits that were on, and every exit on held-out rows.

    `agreement`: of frozen exits, on held-out rows, the share of targets where the exit's best token is the last layer's.
    `divergence`: KL(original || trained model) at full depth, with an anchor.
    """

    step: int
    loss: float
    exits: dict[int, float]
    validation: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)
    divergence: float | None = None

    @property
    def final(self) -> float:
        """The last layer's loss: the last layer is on in every step."""
        return self.exits[max(self.exits)]


@dataclass
class LossHistory:
    """The losses of every step since the first, across interruptions."""

    steps: list[StepLosses] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)  # of every exit seen, by exit layer
    validated: dict[int, float] = field(default_factory=dict)  # of every exit at the last validation
    agreement: dict[int, float] = field(default_factory=dict)  # likewise

    @classmethod
    def of_log(cls, log: Iterable[Mapping[str, float]]) -> "LossHistory":
        """The history in `TrainerState.log_history`, which each checkpoint keeps; see `step_log` and `validation_log`."""
        history = cls()
        for entry in log:
            if "loss" in entry:
                exits, divergence = exits_in(entry, _EXIT), entry.get(_DIVERGENCE)
                history.add(StepLosses(int(entry["step"]), entry["loss"], exits, divergence=divergence))
            elif "eval_loss" in entry:
                history.validate(validation_in(entry), agreement_in(entry))
        return history

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))

    def validate(self, losses: dict[int, float], agreement: dict[int, float]) -> None:
        """Adds the losses and the agreement of every exit on held-out rows, measured after the last step."""
        self.steps[-1] = replace(self.steps[-1], validation=losses, agreement=agreement)
        self.validated, self.agreement = losses, agreement

    def to_jsonl(self) -> str:
        """One JSON line per step, without what the run does not measure."""
        rows = ({name: value for name, value in vars(step).items() if value not in _RARE.get(name, ())} for step in self.steps)
        return "".join(json.dumps(row) + "\n" for row in rows)


_EXIT = "exit_"
_VALIDATION = "eval_exit_"
_LOSS = "_loss"
_AGREEMENT = "_agreement"
_DIVERGENCE = "divergence"
_RARE: dict[str, tuple[Any, ...]] = {"agreement": ({},), _DIVERGENCE: (None,)}  # what stands there if nothing is measured


def step_log(losses: StepLosses, learning_rate: float, grad_norm: float) -> dict[str, float]:
    """A step as Trainer logs it: the entry of `log_history` and what the trackers of `report_to` receive."""
    exits = {f"{_EXIT}{layer}{_LOSS}": loss for layer, loss in losses.exits.items()}
    exits |= {} if losses.divergence is None else {_DIVERGENCE: losses.divergence}
    return {"loss": losses.loss, "grad_norm": grad_norm, "learning_rate": learning_rate, **exits}


def validation_log(losses: dict[int, float], agreement: Mapping[int, float]) -> dict[str, float]:
    """A validation as Trainer logs it; `eval_loss` is that of the deepest exit."""
    exits = {f"{_VALIDATION}{layer}{_LOSS}": loss for layer, loss in losses.items()}
    exits |= {f"{_VALIDATION}{layer}{_AGREEMENT}": share for layer, share in agreement.items()}
    return {**exits, "eval_loss": losses[max(losses)]}


def validation_in(log: Mapping[str, float]) -> dict[int, float]:
    """The losses of every exit in an entry of `validation_log`."""
    return exits_in(log, _VALIDATION)


def agreement_in(log: Mapping[str, float]) -> dict[int, float]:
    """The agreement of every exit in an entry of `validation_log`."""
    return exits_in(log, _VALIDATION, _AGREEMENT)


def exits_in(log: Mapping[str, float], prefix: str, suffix: str = _LOSS) -> dict[int, float]:
    """Exit layer -> value, of the names PREFIX<layer>SUFFIX in a log entry."""
    named = {name: name.removeprefix(prefix) for name in log if name.startswith(prefix) and name.endswith(suffix)}
    return {int(layer.removesuffix(suffix)): log[name] for name, layer in named.items()}
