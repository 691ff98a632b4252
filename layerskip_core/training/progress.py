"""What a run has seen so far: sums over a step's micro-batches, the report of each step, the history of losses."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Losses are means over target tokens, in nats; `exit_losses` holds the latest of every exit so far."""

    step: int
    total_steps: int
    loss: float
    final_loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    tokens_per_second: float
    validation_losses: dict[int, float]  # of every exit at the last validation; empty before the first


@dataclass
class StepSums:
    """Sums over the micro-batches of one optimizer step, kept on the device: reading them would wait for it."""

    loss: Tensor | None = None
    per_exit: Tensor | None = None
    exit_layers: tuple[int, ...] = ()
    tokens: int = 0
    micro_batches: int = 0

    def add(self, output: dict[str, Any], tokens: int) -> None:
        loss, per_exit = output["loss"].detach(), output["per_exit"]
        self.loss = loss if self.loss is None else self.loss + loss
        self.per_exit = per_exit if self.per_exit is None else self.per_exit + per_exit
        self.exit_layers = output["exit_layers"]
        self.tokens += tokens
        self.micro_batches += 1


@dataclass(frozen=True)
class StepLosses:
    """A step's losses in nats a target token: the weighted one, those of the exits that were on, and all on held-out rows."""

    step: int
    loss: float
    exits: dict[int, float]
    validation: dict[int, float] = field(default_factory=dict)


@dataclass
class LossHistory:
    """Every step's losses, from the first step on, over interruptions; a JSON line a step on disk."""

    steps: list[StepLosses] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)  # of every exit seen, by exit layer
    validated: dict[int, float] = field(default_factory=dict)  # of every exit at the last validation

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))
        self.validated = losses.validation or self.validated

    def validate(self, losses: dict[int, float]) -> None:
        """Losses of every exit on held-out rows after the last step."""
        self.steps[-1] = replace(self.steps[-1], validation=losses)
        self.validated = losses

    def to_jsonl(self) -> str:
        return "".join(json.dumps(vars(step)) + "\n" for step in self.steps)

    @classmethod
    def from_jsonl(cls, path: Path) -> "LossHistory":
        history = cls()
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            history.add(StepLosses(row["step"], row["loss"], _by_layer(row["exits"]), _by_layer(row["validation"])))
        return history


def _by_layer(losses: dict[str, float]) -> dict[int, float]:
    return {int(layer): loss for layer, loss in losses.items()}
