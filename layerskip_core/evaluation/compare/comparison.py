"""Runs of several labels side by side: the mean of every figure over the runs of a label, and the difference to the first."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from ..metrics import is_share, lower_is_better
from .intervals import Interval, difference_of, mean_of
from .runs import HELD_OUT, LOSSES, RESULTS, Run, Setting

SHOWN = ("perplexity", "agreement", "acceptance_rate", "speedup", HELD_OUT)  # after the task's metrics, unless others are asked
_NO_SHARES = (HELD_OUT, "mean_accepted_tokens", "speedup", "tokens_per_second")


@dataclass(frozen=True)
class Cell:
    """A figure of one label: the value of each run, their mean, and its difference to that of the first label.

    The difference of perplexities is their ratio, and their mean is geometric. It is None in the first label, and where the
    first label lacks the figure.
    """

    label: str
    runs: tuple[float, ...]
    interval: Interval
    difference: Interval | None = None


@dataclass(frozen=True)
class Line:
    """A figure of one setting, for the labels whose runs all have it."""

    figure: str
    setting: Setting
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Point:
    """The held-out perplexity of an exit after a number of steps, over the runs of a label."""

    label: str
    exit_layer: int
    step: int
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """`paths`: label -> its runs. `paired`: whether differences are those of run and run, in the order of the paths.

    `notes` say what makes the figures hard to compare.
    """

    paths: dict[str, tuple[str, ...]]
    lines: tuple[Line, ...]
    points: tuple[Point, ...] = ()
    paired: bool = False
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.figure for line in self.lines))

    def document(self) -> dict[str, Any]:
        """The comparison as plain values; every float in it is finite."""
        fields = asdict(self)
        for line in fields["lines"]:
            line["setting"] = line["setting"]._asdict()
        return fields


def compare(groups: Mapping[str, Sequence[Run]], only: Sequence[str] = (), exits: Sequence[int] = ()) -> Comparison:
    """Compares the runs of each label with those of the first. `only` and `exits` choose figures and exit layers; empty: all.

    Differences are paired, the k-th run of a label with the k-th of the first, where all labels have equally many runs,
    measured on the same rows.
    """
    notes = tuple(_notes(groups))
    paired = not notes and len({len(runs) for runs in groups.values()}) == 1
    lines = tuple(
        line
        for figure in only or _figures_shown(groups)
        for setting in _settings(groups, figure, exits)
        if (line := _line(groups, figure, setting, paired)).cells
    )
    paths = {label: tuple(run.path for run in runs) for label, runs in groups.items()}
    return Comparison(paths, lines, tuple(_points(groups, exits)), paired, notes)


def figures_of(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """The names of all figures that some run has, in the order of the runs."""
    return list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.figures))


def is_logarithmic(figure: str) -> bool:
    """Perplexities are compared on the scale of their logarithms, the losses: a shallow exit's would hide all others."""
    return figure == HELD_OUT or lower_is_better(figure)


def is_percentage(figure: str) -> bool:
    """Whether a figure, a metric or what was measured of decoding, is in 0..1, and shown in percent."""
    return is_share(figure) and figure not in _NO_SHARES


def _figures_shown(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    known = figures_of(groups)
    hidden = {"mean_accepted_tokens", "tokens_per_second", "identical_outputs", *SHOWN}
    return [name for name in known if name not in hidden] + [name for name in SHOWN if name in known]


def _settings(groups: Mapping[str, Sequence[Run]], figure: str, exits: Sequence[int]) -> list[Setting]:
    """By exit, then those without one; drafts of different lengths follow each other."""
    found = dict.fromkeys(setting for runs in groups.values() for run in runs for setting in run.figures.get(figure, {}))
    chosen = [setting for setting in found if not exits or setting.exit_layer is None or setting.exit_layer in exits]
    return sorted(chosen, key=lambda setting: (setting.exit_layer is None, setting.drafts, setting.exit_layer or 0))


def _line(groups: Mapping[str, Sequence[Run]], figure: str, setting: Setting, paired: bool) -> Line:
    values = {
        label: [run.figures[figure][setting] for run in runs]
        for label, runs in groups.items()
        if all(setting in run.figures.get(figure, {}) for run in runs)
    }
    logarithmic = is_logarithmic(figure) and all(value > 0 for each in values.values() for value in each)
    first = next(iter(groups))
    cells = []
    for label, own in values.items():
        compared = label != first and first in values
        mean = mean_of(own, logarithmic)
        difference = difference_of(own, values[first], paired, logarithmic) if compared else None
        if is_percentage(figure):
            mean, difference = mean.within(0, 1), difference and difference.within(-1, 1)
        cells.append(Cell(label, tuple(own), mean, difference))
    return Line(figure, setting, tuple(cells))


def _points(groups: Mapping[str, Sequence[Run]], exits: Sequence[int]) -> Iterator[Point]:
    """The held-out perplexity at the steps that all runs of a label validated, of the exits that all of them have."""
    for label, runs in groups.items():
        steps = sorted(set.intersection(*(set(run.held_out) for run in runs)))
        for step in steps:
            losses = [run.held_out[step] for run in runs]
            for exit_layer in sorted(set.intersection(*map(set, losses))):
                if not exits or exit_layer in exits:
                    perplexities = [exp(loss[exit_layer]) for loss in losses]
                    yield Point(label, exit_layer, step, mean_of(perplexities, logarithmic=True))


def _notes(groups: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """A label whose figures are of other rows than those of the first, run by run."""
    first, *others = groups
    for file, what in ((RESULTS, "metrics"), (LOSSES, "held-out losses")):
        for label in others:
            rows, known = _rows(groups[label], file), _rows(groups[first], file)
            same = rows == known if len(rows) == len(known) else set(rows) == set(known)
            if rows and known and not same:
                yield f"The {what} of {first} and {label} are of different rows, or of other settings of the task."


def _rows(runs: Sequence[Run], file: str) -> list[str]:
    """What each run was measured on, as one text."""
    return [json.dumps(run.rows[file], sort_keys=True) for run in runs if file in run.rows]
