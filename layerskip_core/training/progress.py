"""The progress of a run: the sums of a step, the report of each step, the history of losses, and its plot."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_EXIT = "exit_"
_VALIDATION = "eval_exit_"
_LOSS = "_loss"
_AGREEMENT = "_agreement"
_DIVERGENCE = "divergence"
_RARE: dict[str, Any] = {"agreement": {}, _DIVERGENCE: None}  # what stands there if it is not measured
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
    tokens: Tensor = field(default_factory=lambda: torch.zeros(()))  # without padding
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
                exits, divergence = _by_exit(entry, _EXIT, _LOSS), entry.get(_DIVERGENCE)
                history.add(StepLosses(int(entry["step"]), entry["loss"], exits, divergence=divergence))
            elif "eval_loss" in entry:
                history.validate(entry)
        return history

    def add(self, losses: StepLosses) -> None:
        self.steps.append(losses)
        self.latest = dict(sorted({**self.latest, **losses.exits}.items()))

    def validate(self, log: Mapping[str, float]) -> None:
        """Adds the losses and the agreement of every exit on held-out rows, measured after the last step."""
        self.validated, self.agreement = _by_exit(log, _VALIDATION, _LOSS), _by_exit(log, _VALIDATION, _AGREEMENT)
        self.steps[-1] = replace(self.steps[-1], validation=self.validated, agreement=self.agreement)

    def report(self, total_steps: int, learning_rate: float, tokens_per_second: float) -> StepReport:
        """Of the last step."""
        last = self.steps[-1]
        return StepReport(
            last.step, total_steps, last.loss, last.final, self.latest, learning_rate, tokens_per_second,
            self.validated, self.agreement, last.divergence,
        )  # fmt: skip

    def to_jsonl(self) -> str:
        """One JSON line per step, without what the run does not measure."""
        rows = (
            {name: value for name, value in vars(step).items() if name not in _RARE or value != _RARE[name]}
            for step in self.steps
        )
        return "".join(json.dumps(row) + "\n" for row in rows)


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


def _by_exit(log: Mapping[str, float], prefix: str, suffix: str) -> dict[int, float]:
    """Exit layer -> value, of the names PREFIX<layer>SUFFIX in a log entry."""
    named = {name: name.removeprefix(prefix) for name in log if name.startswith(prefix) and name.endswith(suffix)}
    return {int(layer.removesuffix(suffix)): log[name] for name, layer in named.items()}


def loss_plot(history: LossHistory) -> bytes:
    """A PNG of the loss of each exit over the steps: shallow exits dark, deep exits bright, the last layer black.

    Losses on held-out rows are dots.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    layers = sorted(history.latest)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"]
    for layer in layers:
        seen = [(step.step, step.exits[layer]) for step in history.steps if layer in step.exits]
        held_out = [(step.step, step.validation[layer]) for step in history.steps if step.validation]
        last = layer == layers[-1]
        colour = "black" if last else colours((layer - 1) / max(layers))
        axes.plot([step for step, _ in held_out], [loss for _, loss in held_out], ".", color=colour)
        axes.plot(
            *_thinned(seen), color=colour, linewidth=2 if last else 1,
            marker="." if len(seen) == 1 else None, label=f"last layer ({layer})" if last else None,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    if len(layers) > 1:
        figure.colorbar(ScalarMappable(Normalize(1, max(layers)), colours), ax=axes, label="exit layer")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, as means over at most _POINTS segments."""
    width = -(-len(points) // _POINTS)
    segments = [points[start : start + width] for start in range(0, len(points), width)]
    means = [[sum(values) / len(segment) for values in zip(*segment, strict=True)] for segment in segments]
    return [step for step, _ in means], [loss for _, loss in means]
