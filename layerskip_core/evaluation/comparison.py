"""Compares runs: means of every figure over the runs of a label, with intervals, and differences
from the first label.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from ..checkpoint.info import read_info
from ..errors import LayerSkipError, require
from ..files import parse_json, read_bytes
from .metrics import MOST_NATS, bounds_of, is_share, lower_is_better
from .results import RunRecord, drafts_name, read_record, result_name

RESULTS = "results.json"
LOSSES = "losses.jsonl"
HELD_OUT = "held_out_perplexity"
# Of a training's Cost, see checkpoint.info.
OWN_AGREEMENT = "own_text_agreement"
OWN_PERPLEXITY = "own_text_perplexity"
ANSWERED = "held_out_exact_match"
SHOWN = (
    "perplexity",
    "agreement",
    "acceptance_rate",
    "speedup",
    HELD_OUT,
    ANSWERED,
    OWN_AGREEMENT,
    OWN_PERPLEXITY,
)  # last
_OF_DECODING = (
    "acceptance_rate",
    "mean_accepted_tokens",
    "speedup",
    "tokens_per_second",
    "identical_outputs",
)
_NO_SHARES = (HELD_OUT, OWN_PERPLEXITY, "mean_accepted_tokens", "speedup", "tokens_per_second")
_MEASURED = {RESULTS: "metrics", LOSSES: "held-out losses"}  # in the files of a run
_OF_HELD_OUT = (HELD_OUT, ANSWERED)
_OF_OWN_TEXT = (OWN_AGREEMENT, OWN_PERPLEXITY)
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
    # Measured, by RESULTS and LOSSES; unequal ones cannot be paired
    rows: dict[str, Any] = field(default_factory=dict)


def labelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Paths by label, from `LABEL=PATH,PATH`, or `PATH`, whose label is its name without `-seed3`.
    Raises ConfigError.
    """
    named: list[tuple[str, str]] = []  # (label or empty, path)
    for argument in arguments:
        # The name of a file may have commas and equals signs
        whole = bool(argument) and Path(argument).exists()
        label, equals, paths = (
            argument.partition("=") if "=" in argument and not whole else ("", "", argument)
        )
        listed = [argument] if whole else paths.split(",")
        require(
            all(listed) and bool(label or not equals),
            "RUNS",
            "[LABEL=]PATH[,PATH...]",
            repr(argument),
        )
        named += [(label, path) for path in listed]
    seen = [Path(path).absolute() for _, path in named]
    for run in seen:
        require(seen.count(run) == 1, "RUNS", "named once each", f"{run} twice")
    folders = {
        path: str(Path(path).parent if Path(path).name in (RESULTS, LOSSES) else Path(path))
        for _, path in named
    }
    stems = {path: _SEED.sub("", folder) or folder for path, folder in folders.items()}
    unlabelled = dict.fromkeys(stems[path] for label, path in named if not label)
    names = [Path(stem).absolute().name for stem in unlabelled]
    groups: dict[str, list[str]] = {}
    for label, path in named:
        name = Path(stems[path]).absolute().name
        groups.setdefault(label or (name if names.count(name) == 1 else stems[path]), []).append(
            path
        )
    return groups


def read_run(path: str) -> Run:
    """A results.json, a losses.jsonl, or a folder with one or both. Raises LayerSkipError for
    anything else.
    """
    place = Path(path)
    files = (
        [place / name for name in (RESULTS, LOSSES) if (place / name).is_file()]
        if place.is_dir()
        else [place]
    )
    if not files:
        raise LayerSkipError(
            f"RUNS {path} must be a folder with {RESULTS} (of sweep-exits or bench --output) or {LOSSES}"
        )
    # Nats per token at the last validation, by exit
    run = Run(path)
    held_out = dict[str, float]()
    for file in files:
        if file.suffix != ".jsonl":
            add_record(run, read_record(str(file), named="RUNS"))
            continue
        for number, line in enumerate(
            read_bytes(file, f"RUNS {file}", LayerSkipError).splitlines(), start=1
        ):
            step = parse_json(line, f"RUNS {file}:{number}", LayerSkipError, dict[str, Any])
            held_out = step.get("validation") or held_out
        info = read_info(file.parent)
        if held_out:
            alone = {
                Setting(f"exit {layer} alone", int(layer)): math.exp(loss)
                for layer, loss in held_out.items()
            }
            run.figures[HELD_OUT] = alone
            run.rows[LOSSES] = info.details.get("validation_rows")
        if (cost := info.cost) is not None:
            whole = Setting("all layers")
            run.figures.update(
                {OWN_AGREEMENT: {whole: cost.agreement}, OWN_PERPLEXITY: {whole: cost.after}}
            )
            if cost.exact_match is not None:
                run.figures[ANSWERED] = {whole: cost.exact_match[1]}
    if not run.figures:
        raise LayerSkipError(
            f"RUNS {path} has no held-out losses: `finetune` measures them with `validation`"
        )
    return run


def add_record(run: Run, record: RunRecord) -> Run:
    """The run with a record's figures; skips quality for speculative settings: their output equals
    plain decoding.
    """
    run.rows[RESULTS] = {
        name: value for name, value in record.config["task"].items() if value is not None
    }
    for result in record.results:
        drafts = drafts_name(result) if result.strategy == "self-speculative" else ""
        fixed = (
            result.strategy in ("early-exit", "self-speculative") and result.exit_confidence is None
        )
        setting = Setting(result_name(result), result.exit_layer if fixed else None, drafts)
        plain = result.acceptance_rate is None
        names = ("perplexity", "agreement", *_OF_DECODING) if plain else _OF_DECODING
        measured = {name: value for name in names if (value := getattr(result, name)) is not None}
        for name, value in {**(result.metrics if plain else {}), **measured}.items():
            run.figures.setdefault(name, {}).setdefault(setting, value)
    return run


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval, None where runs are few or all equal."""

    mean: float
    low: float | None = None
    high: float | None = None


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
    samples = [
        [math.log(value) if logarithmic else value for value in sample]
        for sample in (values, others)
        if sample
    ]
    if paired and others:
        samples = [[value - other for value, other in zip(*samples, strict=True)]]
    mean = fmean(samples[0]) - sum(map(fmean, samples[1:]))
    known = min(map(len, samples)) >= _FEWEST_RUNS
    parts = [(variance(sample) / len(sample), len(sample) - 1) for sample in samples if known]
    # A share is in 0..1
    limits = (-1.0 if others else 0.0, 1.0) if share else (-math.inf, math.inf)
    ends = bounds_of(mean, parts, limits, logarithmic) or ()
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
    differing = list(_differing(groups))
    first = next(iter(groups))
    notes = tuple(
        f"The {_MEASURED[file]} of {first} and {label} are of different rows, or of other settings of the task: "
        "differences are left out."
        for file, label in differing
    )
    paired = not notes and len({len(runs) for runs in groups.values()}) == 1
    known = figures_of(groups)
    hidden = {"mean_accepted_tokens", "tokens_per_second", "identical_outputs", *SHOWN}
    usual = [name for name in known if name not in hidden] + [
        name for name in SHOWN if name in known
    ]
    lines = list[Line]()
    for figure in only or usual:
        file = LOSSES if figure in _OF_HELD_OUT else RESULTS
        incomparable = {
            label for of, label in differing if of == file and figure not in _OF_OWN_TEXT
        }
        lines += _lines(groups, figure, exits, paired, incomparable)
    paths = {label: tuple(run.path for run in runs) for label, runs in groups.items()}
    return Comparison(paths, tuple(lines), paired, notes)


def figures_of(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """The names of all figures that some run has, in the order of the runs."""
    return list(
        dict.fromkeys(name for runs in groups.values() for run in runs for name in run.figures)
    )


def is_logarithmic(figure: str) -> bool:
    """True for perplexities, which are compared as logarithms, the losses: a shallow exit's would
    hide all others.
    """
    return figure in (HELD_OUT, OWN_PERPLEXITY) or lower_is_better(figure)


def is_percentage(figure: str) -> bool:
    """True for a figure or metric in 0..1, which is shown in percent."""
    return is_share(figure) and figure not in _NO_SHARES


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
    settings = dict.fromkeys(
        setting
        for runs in groups.values()
        for run in runs
        for setting in run.figures.get(figure, {})
    )
    for setting in sorted(
        settings, key=lambda each: (each.exit_layer is None, each.drafts, each.exit_layer or 0)
    ):
        if exits and setting.exit_layer not in (None, *exits):
            continue
        values = {
            label: [run.figures[figure][setting] for run in runs]
            for label, runs in groups.items()
            if all(setting in run.figures.get(figure, {}) for run in runs)
        }
        logarithmic = is_logarithmic(figure) and all(min(each) > 0 for each in values.values())
        first = next(iter(groups))
        cells = []
        for label, own in values.items():
            share = is_percentage(figure)
            difference = None
            mean = interval_of(own, logarithmic=logarithmic, share=share)
            if label != first and first in values and label not in incomparable:
                difference = interval_of(own, values[first], paired, logarithmic, share)
            cells.append(Cell(label, tuple(own), mean, difference))
        if cells:
            yield Line(figure, setting, tuple(cells))


def _differing(groups: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str]]:
    """Labels that were measured on other rows than the first label, each with the file of the
    figures.
    """
    for file in _MEASURED:
        rows = {
            label: [json.dumps(run.rows[file], sort_keys=True) for run in runs if file in run.rows]
            for label, runs in groups.items()
        }
        (_, known), *others = rows.items()
        for label, own in others:
            same = own == known if len(own) == len(known) else set(own) == set(known)
            if own and known and not same:
                yield file, label
