"""Compares runs: means of every figure over the runs of a label, with intervals, and differences
from the first label.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from ..checkpoint.info import read_info
from ..errors import LayerSkipError, require
from ..files import parse_json, read_bytes
from .columns import (
    ANSWERED,
    COLUMNS,
    HELD_OUT,
    LOSSES,
    OWN_AGREEMENT,
    OWN_PERPLEXITY,
    RESULTS,
    column_named,
)
from .intervals import NO_LIMITS, Estimate, Variance, change, metric, t_interval
from .metrics import MOST_NATS, Scores
from .results import Result, RunRecord, drafts_name, read_record, result_name

_MEASURED = {RESULTS: "metrics", LOSSES: "held-out losses"}  # in the files of a run
_SEED = re.compile(r"[-_./]?seed[-_]?\d+$")

_FEWEST_RUNS = 3  # for an interval: with two it would be the mean ± 12.7 standard errors


@dataclass(frozen=True)
class Setting:
    """A setting's name in reports, and its exit and drafts for plots."""

    name: str
    exit_layer: int | None = None
    drafts: str = ""  # `6 drafts`, `6 int8 drafts`; empty where nothing drafts


@dataclass(frozen=True)
class Run:
    """The figures of one run by name and setting."""

    path: str
    figures: dict[str, dict[Setting, float]] = field(default_factory=dict)
    scores: dict[tuple[str, Setting], Scores] = field(default_factory=dict)  # by prompt
    # Measured, by RESULTS and LOSSES; unequal ones cannot be paired
    rows: dict[str, Any] = field(default_factory=dict)


def labelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Paths by label, from `LABEL=PATH,PATH`, or `PATH`, whose label is its name without `-seed3`.
    Raises ConfigError.
    """
    named: list[tuple[str, str]] = []  # (label or empty, path)
    for argument in arguments:
        if argument and Path(argument).exists():
            named.append(("", argument))  # its name may have commas and equals signs
            continue
        label, equals, paths = argument.partition("=")
        if not equals:
            label = ""
            paths = argument
        is_right = all(paths.split(",")) and bool(label or not equals)
        require(is_right, "RUNS", "[LABEL=]PATH[,PATH...]", repr(argument))
        named += [(label, path) for path in paths.split(",")]
    seen: set[Path] = set()
    for _, path in named:
        run = Path(path).absolute()
        require(run not in seen, "RUNS", "named once each", f"{run} twice")
        seen.add(run)

    stems = {path: _stem(path) for _, path in named}
    short_names = [Path(stem).absolute().name for stem in _unlabelled(named, stems)]
    groups: dict[str, list[str]] = {}
    for label, path in named:
        name = Path(stems[path]).absolute().name
        if short_names.count(name) > 1:
            name = stems[path]
        groups.setdefault(label or name, []).append(path)
    return groups


def _stem(path: str) -> str:
    """The folder of a run without its seed."""
    place = Path(path)
    folder = str(place.parent if place.name in (RESULTS, LOSSES) else place)
    return _SEED.sub("", folder) or folder


def _unlabelled(named: Sequence[tuple[str, str]], stems: Mapping[str, str]) -> dict[str, None]:
    return dict.fromkeys(stems[path] for label, path in named if not label)


def read_run(path: str) -> Run:
    """A results.json, a losses.jsonl, or a folder with one or both. Raises LayerSkipError for
    anything else.
    """
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = [place / name for name in (RESULTS, LOSSES) if (place / name).is_file()]
    if not files:
        raise LayerSkipError(
            f"RUNS {path} must be a folder with {RESULTS} (of sweep-exits or bench --output) "
            f"or {LOSSES}"
        )
    run = Run(path)
    for file in files:
        if file.suffix == ".jsonl":
            _add_training(run, file)
        else:
            add_record(run, read_record(str(file), named="RUNS"))
    if not run.figures:
        raise LayerSkipError(
            f"RUNS {path} has no held-out losses: `finetune` measures them with `validation`"
        )
    return run


def _add_training(run: Run, file: Path) -> None:
    """The figures at the end of a training: held-out losses, and what it cost the model."""
    held_out = dict[str, float]()  # nats per token at the last validation, by exit
    lines = read_bytes(file, f"RUNS {file}", LayerSkipError).splitlines()
    for number, line in enumerate(lines, start=1):
        step = parse_json(line, f"RUNS {file}:{number}", LayerSkipError, dict[str, Any])
        held_out = step.get("validation") or held_out
    info = read_info(file.parent)
    if held_out:
        alone = {}
        for layer, loss in held_out.items():
            alone[Setting(f"exit {layer} alone", int(layer))] = math.exp(loss)
        run.figures[HELD_OUT] = alone
        run.rows[LOSSES] = info.details.get("validation_rows")
    if info.cost is not None:
        whole = Setting("all layers")
        run.figures[OWN_AGREEMENT] = {whole: info.cost.agreement}
        run.figures[OWN_PERPLEXITY] = {whole: info.cost.after}
        if info.cost.exact_match is not None:
            run.figures[ANSWERED] = {whole: info.cost.exact_match[1]}


def add_record(run: Run, record: RunRecord) -> Run:
    """The run with a record's figures; skips quality for speculative settings: their output equals
    plain decoding.
    """
    task = record.config["task"]
    run.rows[RESULTS] = {name: value for name, value in task.items() if value is not None}
    for place, result in enumerate(record.results):
        setting = _setting_of(result)
        drafts = result.acceptance_rate is not None
        figures = {} if drafts else dict(result.metrics)
        for column in COLUMNS:
            is_of_results = column.compared != "never" and column.source == RESULTS
            if is_of_results and not (drafts and column.is_quality):
                value = getattr(result, column.figure)
                if value is not None:  # perplexity may be a metric instead
                    figures[column.figure] = value
        for name, value in figures.items():
            run.figures.setdefault(name, {}).setdefault(setting, value)
            values = [row.scores[name][place] for row in record.answered if name in row.scores]
            if values:
                run.scores.setdefault((name, setting), Scores(tuple(values)))
    return run


def _setting_of(result: Result) -> Setting:
    exit_layer = None
    drafts = ""
    if result.strategy in ("early-exit", "self-speculative") and result.exit_confidence is None:
        exit_layer = result.exit_layer
    if result.strategy == "self-speculative":
        drafts = drafts_name(result)
    return Setting(result_name(result), exit_layer, drafts)


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval, None where runs are few or all equal."""

    mean: float
    low: float | None = None
    high: float | None = None

    def over_prompts(self, estimate: Estimate) -> "Interval":
        """The same mean, of one run, with the interval of an estimate over its prompts."""
        if estimate.bounds is None:
            return self
        return replace(self, low=estimate.bounds.low, high=estimate.bounds.high)


def interval_of(
    values: Sequence[float],
    others: Sequence[float] = (),
    paired: bool = False,
    logarithmic: bool = False,
    share: bool = False,
) -> Interval:
    """The mean over runs, minus that of `others` (`paired`, else by Welch). `logarithmic`: a
    geometric mean, or a ratio.
    """
    if logarithmic:
        values = [math.log(value) for value in values]
        others = [math.log(value) for value in others]
    mean = fmean(values) - (fmean(others) if others else 0.0)
    samples = [sample for sample in (values, others) if sample]
    if paired and others:
        samples = [[value - other for value, other in zip(values, others, strict=True)]]
    variances = []
    if min(map(len, samples)) >= _FEWEST_RUNS:
        for sample in samples:
            variances.append(Variance(variance(sample) / len(sample), len(sample) - 1))
    limits = NO_LIMITS
    if share:
        limits = (-1.0 if others else 0.0, 1.0)
    ends = t_interval(mean, variances, limits, logarithmic) or ()
    return Interval(math.exp(min(mean, MOST_NATS)) if logarithmic else mean, *ends)


@dataclass(frozen=True)
class Cell:
    """A figure of one label: each run's value, their mean (of perplexities geometric), and the
    difference from the first.
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
class Comparison:
    """Runs compared by label."""

    paths: dict[str, tuple[str, ...]]  # label -> its runs
    lines: tuple[Line, ...]
    paired: bool  # whether differences are by run, in the order of the paths
    notes: tuple[str, ...]  # reasons why figures are hard to compare


def compare(
    groups: Mapping[str, Sequence[Run]], only: Sequence[str] = (), exits: Sequence[int] = ()
) -> Comparison:
    """Compares the labels with the first one, paired by run if they have equally many on the same
    rows.
    """
    first = next(iter(groups))
    differing = list(_differing(groups))
    notes = []
    for file, label in differing:
        notes.append(
            f"The {_MEASURED[file]} of {first} and {label} are of different rows, or of other "
            "settings of the task: differences are left out."
        )
    paired = not notes and len({len(runs) for runs in groups.values()}) == 1
    lines = list[Line]()
    for figure in only or _usual_figures(groups):
        source = column_named(figure).source
        incomparable = {label for file, label in differing if file == source}
        lines += _lines(groups, figure, exits, paired, incomparable)
    paths = {}
    for label, runs in groups.items():
        paths[label] = tuple(run.path for run in runs)
    return Comparison(paths, tuple(lines), paired, tuple(notes))


def figures_of(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """The names of all figures that some run has, in the order of the runs."""
    names: dict[str, None] = {}
    for runs in groups.values():
        for run in runs:
            names |= dict.fromkeys(run.figures)
    return list(names)


def _usual_figures(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    known = figures_of(groups)
    of_columns = [column.figure for column in COLUMNS]
    metrics = [name for name in known if name not in of_columns]
    usual = [column.figure for column in COLUMNS if column.compared == "always"]
    return metrics + [name for name in usual if name in known]


def _lines(
    groups: Mapping[str, Sequence[Run]],
    figure: str,
    exits: Sequence[int],
    paired: bool,
    incomparable: Collection[str],
) -> Iterator[Line]:
    """By draft length, then exit; settings without an exit last. `incomparable`: labels that get no
    difference.
    """
    first = next(iter(groups))
    column = column_named(figure)
    for setting in _settings_of(groups, figure):
        if exits and setting.exit_layer not in (None, *exits):
            continue
        values = {}
        scores = {}  # of labels with one run
        for label, runs in groups.items():
            if all(setting in run.figures.get(figure, {}) for run in runs):
                values[label] = [run.figures[figure][setting] for run in runs]
            if len(runs) == 1 and (figure, setting) in runs[0].scores:
                scores[label] = runs[0].scores[figure, setting]
        logarithmic = column.is_logarithmic and all(min(own) > 0 for own in values.values())
        cells = []
        for label, own in values.items():
            mean = interval_of(own, logarithmic=logarithmic, share=column.is_share)
            if label in scores:
                mean = mean.over_prompts(metric(scores[label]))
            difference = None
            if label != first and first in values and label not in incomparable:
                difference = interval_of(own, values[first], paired, logarithmic, column.is_share)
                difference = _paired(difference, scores.get(label), scores.get(first))
            cells.append(Cell(label, tuple(own), mean, difference))
        if cells:
            yield Line(figure, setting, tuple(cells))


def _paired(interval: Interval, own: Scores | None, other: Scores | None) -> Interval:
    """A difference of two runs with its interval over prompts, if both have saved their scores."""
    if own is None or other is None or len(own.values) != len(other.values):
        return interval
    return interval.over_prompts(change(own, other))


def _settings_of(groups: Mapping[str, Sequence[Run]], figure: str) -> list[Setting]:
    settings: dict[Setting, None] = {}
    for runs in groups.values():
        for run in runs:
            settings |= dict.fromkeys(run.figures.get(figure, {}))

    def order(setting: Setting) -> tuple[bool, str, int]:
        return setting.exit_layer is None, setting.drafts, setting.exit_layer or 0

    return sorted(settings, key=order)


def _differing(groups: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str]]:
    """Labels that were measured on other rows than the first label, each with the file of the
    figures.
    """
    for file in _MEASURED:
        rows: dict[str, list[str]] = {}
        for label, runs in groups.items():
            own = [run.rows[file] for run in runs if file in run.rows]
            rows[label] = [json.dumps(each, sort_keys=True) for each in own]
        (_, expected), *others = rows.items()
        for label, found in others:
            # Equally many runs are paired, in their order
            same = set(found) == set(expected)
            if len(found) == len(expected):
                same = found == expected
            if found and expected and not same:
                yield file, label
