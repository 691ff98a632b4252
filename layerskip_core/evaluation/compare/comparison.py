"""Runs side by side: the mean of every figure over the runs of each label, with intervals, and the difference to the first."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

import msgspec

from ...checkpoint.info import INFO_FILE, read_info
from ...config.checks import refused
from ...errors import ConfigError, LayerSkipError
from ...files import read_bytes
from ..metrics import is_share, lower_is_better
from ..report.tables import result_name
from ..results import Result, RunRecord, read_record

RESULTS, LOSSES = "results.json", "losses.jsonl"
HELD_OUT = "held_out_perplexity"
SHOWN = ("perplexity", "agreement", "acceptance_rate", "speedup", HELD_OUT)  # after the task's metrics, unless others are asked
_OF_DECODING = ("acceptance_rate", "mean_accepted_tokens", "speedup", "tokens_per_second", "identical_outputs")
_NO_SHARES = (HELD_OUT, "mean_accepted_tokens", "speedup", "tokens_per_second")
_SEED = re.compile(r"[-_./]?seed[-_]?\d+$")

_LEVEL = 1.959964  # the 97.5% quantile of the normal distribution
# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_LARGEST = 700.0  # the largest power of e that is taken: beyond it floats overflow


class Setting(NamedTuple):
    """How the figures were decoded: the name that reports give it, and what plots need of it."""

    name: str
    exit_layer: int | None = None
    drafts: str = ""  # `6 drafts`, `6 int8 drafts`; empty where nothing drafts


@dataclass(frozen=True)
class Run:
    """The figures of one run by name and setting, and the held-out losses of its training.

    `held_out`: step -> exit layer -> nats per token. `rows` say what the figures were measured on, the metrics' under
    `results.json` and the losses' under `losses.jsonl`; figures on different rows cannot be paired.
    """

    path: str
    figures: dict[str, dict[Setting, float]]
    held_out: dict[int, dict[int, float]] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)


def labelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Label -> paths, in the order given, from `LABEL=PATH,PATH` and `PATH`.

    A path without a label is labelled by its name, without `-seed3` or the like at the end: runs that differ in nothing else
    belong together. Paths with equal names in different folders keep the folders in their labels. Raises ConfigError for an
    empty label or path, and for a run that is given twice.
    """
    named = [(label, path) for argument in arguments for label, path in _parsed(argument)]
    seen = [Path(path).absolute() for _, path in named]
    for place in seen:
        if seen.count(place) > 1:
            raise ConfigError(f"RUNS must name every run once, found {place} twice")
    stems = dict.fromkeys(_stem(path) for label, path in named if label is None)
    names = [Path(stem).absolute().name for stem in stems]
    short = {stem: name if names.count(name) == 1 else stem for stem, name in zip(stems, names, strict=True)}
    groups: dict[str, list[str]] = {}
    for label, path in named:
        groups.setdefault(short[_stem(path)] if label is None else label, []).append(path)
    return groups


def _parsed(argument: str) -> list[tuple[str | None, str]]:
    """The label, None if the argument has none, and path of each of its runs. What exists under this name is one path."""
    if argument and Path(argument).exists():
        return [(None, argument)]
    label, _, paths = argument.partition("=") if "=" in argument else (None, "", argument)
    listed = paths.split(",")
    if label == "" or not all(listed):
        raise refused("RUNS", "[LABEL=]PATH[,PATH...]", repr(argument))
    return [(label, path) for path in listed]


def _stem(path: str) -> str:
    """The folder of a run without the number of its seed."""
    place = Path(path)
    if place.name in ("results.json", "losses.jsonl"):
        place = place.parent
    return _SEED.sub("", str(place)) or str(place)


def read_run(path: str) -> Run:
    """A results.json, a losses.jsonl, or a folder with one or both. Raises LayerSkipError for anything else."""
    place = Path(path)
    files = [place / name for name in (RESULTS, LOSSES) if (place / name).is_file()] if place.is_dir() else [place]
    if not files:
        raise LayerSkipError(f"RUNS {path} must be a folder with {RESULTS} (of sweep-exits or bench --output) or {LOSSES}")
    run = Run(path, {})
    for file in files:
        if file.suffix == ".jsonl":
            _add_losses(run, file)
        else:
            _add_record(run, read_record(str(file), named="RUNS"))
    if not run.figures:
        raise LayerSkipError(f"RUNS {path} has no held-out losses: `finetune` measures them with `validation`")
    return run


def run_of(name: str, record: RunRecord) -> Run:
    """What a sweep has just measured."""
    run = Run(name, {})
    _add_record(run, record)
    return run


def _add_record(run: Run, record: RunRecord) -> None:
    for result in record.results:
        setting = _setting_of(result)
        for name, value in _figures_of(result):
            run.figures.setdefault(name, {}).setdefault(setting, value)
    run.rows[RESULTS] = record.config["task"]


def _setting_of(result: Result) -> Setting:
    drafts = ""
    if result.strategy == "self-speculative":
        drafts = f"{result.num_draft_tokens} {result.draft_weights or ''} drafts".replace("  ", " ")
    fixed = result.strategy in ("early-exit", "self-speculative") and result.exit_confidence is None
    return Setting(result_name(result), result.exit_layer if fixed else None, drafts)


def _figures_of(result: Result) -> Iterator[tuple[str, float]]:
    """Quality is left out where something drafts: drafts leave the output as it is, so it is that of plain decoding."""
    drafts = result.acceptance_rate is not None
    quality = {} if drafts else dict(result.metrics)
    if not drafts:
        measured = {"perplexity": result.perplexity, "agreement": result.agreement}
        quality |= {name: value for name, value in measured.items() if value is not None}
    yield from quality.items()
    for name in _OF_DECODING:
        value = getattr(result, name)
        if value is not None:
            yield name, value


@dataclass(frozen=True)
class _Step:
    """A line of losses.jsonl: held-out nats per token and the agreement with full depth, by exit, if it was validated."""

    step: int
    validation: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)


def _add_losses(run: Run, file: Path) -> None:
    """The losses that `finetune` writes, a line per step; those of the last validation are figures too."""
    agreement: dict[int, float] = {}
    for number, line in enumerate(read_bytes(file, f"RUNS {file}", LayerSkipError).splitlines(), start=1):
        try:
            step = msgspec.json.decode(line, type=_Step)
        except msgspec.DecodeError as error:
            raise LayerSkipError(f"RUNS {file}:{number} must be a line that finetune wrote: {error}") from None
        if step.validation:
            run.held_out[step.step], agreement = step.validation, step.agreement
    if not run.held_out:
        return
    last = run.held_out[max(run.held_out)]
    run.figures[HELD_OUT] = {_alone(layer): math.exp(loss) for layer, loss in last.items()}
    if agreement:
        run.figures["agreement"] = {_alone(layer): share for layer, share in agreement.items()}
    if (file.parent / INFO_FILE).is_file():
        run.rows[LOSSES] = read_info(file.parent).details.get("validation_rows")


def _alone(exit_layer: int) -> Setting:
    return Setting(f"exit {exit_layer} alone", exit_layer)


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; the ends are None where a single run tells nothing about others."""

    mean: float
    low: float | None = None
    high: float | None = None

    def within(self, low: float, high: float) -> "Interval":
        """Without what lies outside the values that there are."""
        ends = (None if end is None else min(max(end, low), high) for end in (self.low, self.high))
        return Interval(self.mean, *ends)


def mean_of(values: Sequence[float], logarithmic: bool = False) -> Interval:
    """The mean of one value per run.

    `logarithmic`: the geometric mean, with an interval on the scale of logarithms; all values must be positive.
    """
    scaled = _scaled(values, logarithmic)
    return _interval(fmean(scaled), _error(scaled), len(scaled) - 1, logarithmic)


def difference_of(values: Sequence[float], others: Sequence[float], paired: bool, logarithmic: bool = False) -> Interval:
    """The mean of `values` less that of `others`; `logarithmic`: over it, a ratio.

    `paired`: by the differences of run and run, which must be equally many. Otherwise the variances may differ, with the
    degrees of freedom of Welch and Satterthwaite, rounded down.
    """
    mine, theirs = _scaled(values, logarithmic), _scaled(others, logarithmic)
    if paired:
        differences = [value - other for value, other in zip(mine, theirs, strict=True)]
        return _interval(fmean(differences), _error(differences), len(differences) - 1, logarithmic)
    first, second = _error(mine), _error(theirs)
    mean, error = fmean(mine) - fmean(theirs), None
    freedom = float(len(mine) + len(theirs) - 2)
    if first is not None and second is not None:
        error = math.hypot(first, second)
        if error > 0:
            freedom = error**4 / (first**4 / (len(mine) - 1) + second**4 / (len(theirs) - 1))
    return _interval(mean, error, int(freedom + 1e-6), logarithmic)  # 2 can be computed as 1.9999999


def _error(values: Sequence[float]) -> float | None:
    """The standard error of a mean."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t; above 30 degrees of freedom by its expansion around the normal
    (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[max(freedom, 1) - 1]
    z = _LEVEL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _scaled(values: Sequence[float], logarithmic: bool) -> list[float]:
    return [math.log(value) for value in values] if logarithmic else list(values)


def _interval(mean: float, error: float | None, freedom: int, logarithmic: bool) -> Interval:
    def shown(value: float) -> float:
        return math.exp(min(value, _LARGEST)) if logarithmic else value

    if error is None:
        return Interval(shown(mean))
    half = t_quantile(freedom) * error
    return Interval(shown(mean), shown(mean - half), shown(mean + half))


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
                    perplexities = [math.exp(loss[exit_layer]) for loss in losses]
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
