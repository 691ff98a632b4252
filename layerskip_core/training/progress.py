"""The progress of a run: the report of each step, the history of losses, and its plot."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

_RARE: dict[str, Any] = {"agreement": {}, "divergence": None}  # what stands there if it is not measured
_POINTS = 200  # per curve: a long run is drawn as means over segments of its steps


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
        """One JSON line per step, with the figures that the run measures."""
        rows = (
            {name: value for name, value in vars(step).items() if name not in _RARE or value != _RARE[name]}
            for step in self.steps
        )
        return "".join(json.dumps(row) + "\n" for row in rows)


def loss_plot(history: LossHistory) -> bytes:
    """A PNG of the loss of each exit over the steps: shallow exits dark, deep exits bright, the last layer black.

    Losses on held-out rows are dots.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    layers = sorted(history.latest)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes, colours = figure.add_subplot(), colormaps["viridis"]
    for layer in layers:
        seen = np.array([(step.step, step.exits[layer]) for step in history.steps if layer in step.exits])
        means = [part.mean(0) for part in np.array_split(seen, min(len(seen), _POINTS))]
        held_out = [(step.step, step.validation[layer]) for step in history.steps if step.validation]
        style: dict[str, Any] = {"color": colours((layer - 1) / max(layers))}
        if layer == layers[-1]:
            style = {"color": "black", "linewidth": 2, "label": f"last layer ({layer})"}
        axes.plot(*np.transpose(means), marker="." if len(seen) == 1 else None, **style)
        if held_out:
            axes.plot(*np.transpose(held_out), ".", color=style["color"])
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    if len(layers) > 1:
        figure.colorbar(ScalarMappable(Normalize(1, max(layers)), colours), ax=axes, label="exit layer")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
