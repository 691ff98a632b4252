"""The progress of a run: the report of each step, and the history of losses."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec


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
    agreement: dict[int, float] = field(default_factory=dict)  # of early exits there: the share of first drafts accepted


@dataclass(frozen=True)
class StepLosses:
    """A step's losses in nats per target token: the weighted loss, the exits that were on, and every exit on held-out rows.

    `agreement`: on held-out rows, the share of targets where the exit's best token is the last layer's.
    """

    step: int
    loss: float
    exits: dict[int, float]
    validation: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)

    @property
    def final(self) -> float:
        """The last layer's loss: the last layer is on in every step."""
        return self.exits[max(self.exits)]


@dataclass
class LossHistory:
    """All steps of a run, the latest loss of every exit (ascending), and the last values measured on held-out rows."""

    steps: list[StepLosses] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)
    validated: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "LossHistory":
        """Reads the lines of `to_jsonl`."""
        history = cls()
        for losses in msgspec.json.Decoder(StepLosses).decode_lines(file.read_bytes()):
            history.add(losses)
        return history

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))
        if losses.validation:
            self.validated, self.agreement = losses.validation, losses.agreement

    def to_jsonl(self) -> str:
        """One JSON line per step; agreement only where it was measured."""
        rows = ({name: value for name, value in vars(step).items() if name != "agreement" or value} for step in self.steps)
        return "".join(json.dumps(row) + "\n" for row in rows)
