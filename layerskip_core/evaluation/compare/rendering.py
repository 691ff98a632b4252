"""A comparison as a text table, as CSV and JSON, and as plots: every figure by exit, and perplexity over the training steps."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..report.plots import SIZE, color, legend_above, logarithmic, new_figure, style, to_png
from ..report.tables import TextTable
from .comparison import HELD_OUT, Cell, Comparison, Interval, Line, is_logarithmic, is_percentage

_RATES = ("tokens_per_second",)
OVER_STEPS = f"{HELD_OUT}_over_steps"
_PANELS = 4  # exits whose perplexity over the steps is drawn
_LINE_STYLES = ("-", "--", ":", "-.")


def to_json(comparison: Comparison) -> str:
    return json.dumps(comparison.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compare_files(comparison: Comparison) -> dict[str, bytes]:
    """The table as Markdown, all numbers as JSON and CSV, and a PNG per figure; by name."""
    texts = {
        "comparison.md": compare_table(comparison).markdown(),
        "comparison.json": to_json(comparison),
        "comparison.csv": to_csv(comparison),
    }
    files = {name: text.encode() for name, text in texts.items()}
    return files | {f"{name}.png": image for name, image in plots(comparison).items()}


def compare_table(comparison: Comparison) -> TextTable:
    """A row per figure and setting; a column per label, then one per label with its difference to the first."""
    first, *others = comparison.paths
    headers = ("figure", "setting", *comparison.paths, *(f"{label} vs {first}" for label in others))
    return TextTable(headers, tuple(map(_row_of(comparison), comparison.lines)), _note(comparison), labels=2)


def to_csv(comparison: Comparison) -> str:
    """A row per figure, setting and label."""
    text = io.StringIO()
    ends = ("mean", "low", "high")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("figure", "setting", "exit_layer", "label", "runs", *ends, *(f"difference_{end}" for end in ends)))
    for line in comparison.lines:
        for cell in line.cells:
            numbers = [getattr(interval, end, None) for interval in (cell.interval, cell.difference) for end in ends]
            writer.writerow((line.figure, line.setting.name, line.setting.exit_layer, cell.label, len(cell.runs), *numbers))
    return text.getvalue()


def _row_of(comparison: Comparison) -> Callable[[Line], tuple[str, ...]]:
    def row(line: Line) -> tuple[str, ...]:
        cells = {cell.label: cell for cell in line.cells}
        labels = list(comparison.paths)
        means = [_mean(line.figure, cells.get(label)) for label in labels]
        differences = [_difference(line.figure, cells.get(label)) for label in labels[1:]]
        return (line.figure.replace("_", " "), line.setting.name, *means, *differences)

    return row


def _mean(figure: str, cell: Cell | None) -> str:
    return "-" if cell is None else _with_ends(cell.interval, _form(figure))


def _difference(figure: str, cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return "-"
    if is_logarithmic(figure):
        return _with_ends(cell.difference, "x{:.3g}".format)
    if is_percentage(figure):
        return _with_ends(cell.difference, lambda value: f"{100 * value:+.1f}")
    return _with_ends(cell.difference, ("{:+.0f}" if figure in _RATES else "{:+.2f}").format)


def _form(figure: str) -> Callable[[float], str]:
    if is_logarithmic(figure):
        return "{:.3g}".format
    if is_percentage(figure):
        return "{:.1%}".format
    return ("{:.0f}" if figure in _RATES else "{:.2f}").format


def _with_ends(interval: Interval, form: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return form(interval.mean)
    return f"{form(interval.mean)} ({form(interval.low)} to {form(interval.high)})"


def _note(comparison: Comparison) -> str:
    counts = {len(paths) for paths in comparison.paths.values()}
    runs = " or ".join(map(str, sorted(counts)))
    lines = [f"Means over {runs} run{'' if counts == {1} else 's'} of a label, of perplexities the geometric mean."]
    if counts != {1}:
        lines[0] = lines[0][:-1] + ", with 95% intervals (Student t)."
    if len(comparison.paths) > 1:
        how = "paired run by run" if comparison.paired else "not paired"
        lines.append(f"vs: the difference, in points for percentages, of perplexities the ratio (x); {how}.")
    return "\n".join((*lines, *comparison.notes))


def plots(comparison: Comparison) -> dict[str, bytes]:
    """PNGs by name: each figure that at least two exits have, and the held-out perplexity over the steps."""
    with style():
        drawn = {name: _by_exit(comparison, name) for name in comparison.figures}
        drawn[OVER_STEPS] = _over_steps(comparison)
    return {re.sub(r"\W", "_", name): to_png(figure) for name, figure in drawn.items() if figure is not None}


def _by_exit(comparison: Comparison, name: str) -> Figure | None:
    """A line per label and draft length; bars are 95% intervals. Full depth stands at the right."""
    lines = [line for line in comparison.lines if line.figure == name and line.setting.exit_layer is not None]
    exits = sorted({line.setting.exit_layer or 0 for line in lines})
    if len(exits) < 2:
        return None
    full = next((line for line in comparison.lines if (line.figure, line.setting.name) == (name, "autoregressive")), None)
    kinds = list(dict.fromkeys(line.setting.drafts for line in lines))
    whole = full if kinds == [""] else None  # what drafts has no figure at full depth
    figure, axes = new_figure(name.replace("_", " "))
    labels, scale = list(comparison.paths), 100.0 if is_percentage(name) else 1.0
    entries = 0
    for number, label in enumerate(labels):
        shift = 0.12 * (number - (len(labels) - 1) / 2) / max(1, len(labels) - 1)  # so that bars do not hide each other
        for kind in kinds:
            own = [line for line in lines if line.setting.drafts == kind]
            places = {line: exits.index(line.setting.exit_layer or 0) for line in own}
            points = [(place + shift, interval) for line, place in places.items() if (interval := _of(line, label))]
            if whole is not None and (interval := _of(whole, label)):
                points.append((len(exits) + shift, interval))
            if points:
                text = _plain(f"{label}, {kind}" if len(kinds) > 1 else label)
                _draw(axes, sorted(points, key=lambda point: point[0]), scale, number, kinds.index(kind), text)
                entries += 1
    names = [*map(str, exits), *(["all"] if whole is not None else [])]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="exit layer", ylabel=_plain(name.replace("_", " ")) + (" (%)" if is_percentage(name) else ""))
    if is_logarithmic(name):
        logarithmic(axes)
    legend_above(axes, entries)
    return figure


def _draw(axes: Any, points: Sequence[tuple[float, Interval]], scale: float, number: int, kind: int, text: str) -> None:
    intervals = [interval for _, interval in points]
    means = [scale * interval.mean for interval in intervals]
    below = [0.0 if interval.low is None else scale * (interval.mean - interval.low) for interval in intervals]
    above = [0.0 if interval.high is None else scale * (interval.high - interval.mean) for interval in intervals]
    axes.errorbar(
        [place for place, _ in points], means, yerr=(below, above), marker="o", markersize=4, capsize=2, linewidth=1.2,
        elinewidth=0.8, color=color(number), linestyle=_LINE_STYLES[kind % len(_LINE_STYLES)], label=text,
    )  # fmt: skip


def _over_steps(comparison: Comparison) -> Figure | None:
    """A panel per exit, at most four, evenly spread and the deepest among them. A band is the 95% interval."""
    points = [point for point in comparison.points if point.interval.mean > 0]
    if len({point.step for point in points}) < 2:
        return None
    exits = _spread(sorted({point.exit_layer for point in points}))
    figure = Figure(figsize=(1.2 + 2.6 * len(exits), SIZE[1]), layout="constrained")
    figure.set_label("held-out perplexity over the steps")
    panels = figure.subplots(1, len(exits), sharey=True, squeeze=False)[0]
    for axes, exit_layer in zip(panels, exits, strict=True):
        for number, label in enumerate(comparison.paths):
            own = [point for point in points if (point.label, point.exit_layer) == (label, exit_layer)]
            steps = [point.step for point in own]
            axes.plot(steps, [point.interval.mean for point in own], marker=".", color=color(number), label=_plain(label))
            if own and own[0].interval.low is not None:
                low, high = ([getattr(point.interval, end) for point in own] for end in ("low", "high"))
                axes.fill_between(steps, low, high, color=color(number), alpha=0.2, linewidth=0)
        axes.set_title(f"exit {exit_layer}", fontsize=9)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    logarithmic(panels[0])
    means = [point.interval.mean for point in points if point.exit_layer in exits]
    room = 1.05 * (max(means) / min(means)) ** 0.15  # bands of few runs can be far wider than the lines
    panels[0].set_ylim(min(means) / room, max(means) * room)
    panels[0].set_ylabel("held-out perplexity")
    panels[-1].legend(fontsize=7.5)
    return figure


def _spread(exits: list[int]) -> list[int]:
    """At most four of the exits, evenly spread, the last among them."""
    if len(exits) <= _PANELS:
        return exits
    return [exits[round(place * len(exits) / _PANELS) - 1] for place in range(1, _PANELS + 1)]


def _of(line: Line, label: str) -> Interval | None:
    return next((cell.interval for cell in line.cells if cell.label == label), None)


def _plain(text: str) -> str:
    """A text without formulas."""
    return text.replace("$", r"\$")
