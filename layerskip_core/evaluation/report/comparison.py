"""A comparison as a table, as CSV and JSON, and as plots of every figure by exit."""

import re
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from ...errors import LayerSkipError, plural
from ...files import read_json
from ..columns import column_named
from ..comparison import Comparison, Interval, Line
from .files import csv_text
from .plots import MOST_LINES, draw_line, legend_above, logarithmic, new_figure, style, to_png
from .tables import Table, text_cells

_DASHES = ("-", "--", ":", "-.")  # of draft lengths


def compare_table(comparison: Comparison) -> Table:
    """A row per figure and setting; a column per label, then one per label with its difference from
    the first.
    """
    first, *others = comparison.paths
    changes = [f"{label} vs {first}" for label in others]
    rows = []
    for line in comparison.lines:
        cells = {cell.label: cell for cell in line.cells}
        texts = [line.figure.replace("_", " "), line.setting.name]
        for label in comparison.paths:
            own = cells.get(label)
            texts.append("-" if own is None else _mean_text(line.figure, own.interval))
        for label in others:
            own = cells.get(label)
            change = None if own is None else own.difference
            texts.append("-" if change is None else _change_text(line.figure, change))
        rows.append(text_cells(texts))
    headers = ("figure", "setting", *comparison.paths, *changes)
    return Table(headers, tuple(rows), _note(comparison), labels=2)


def _mean_text(figure: str, interval: Interval) -> str:
    """`50.0% (40.0% to 60.0%)`, mean and interval."""
    return _with_ends(f"{{:{column_named(figure).plain_form}}}", interval)


def _change_text(figure: str, interval: Interval) -> str:
    """`+5.0 (-1.0 to +11.0)`, in points for percentages; of perplexities the ratio, `x0.5`."""
    column = column_named(figure)
    if column.is_logarithmic:
        return _with_ends("x{:.3g}", interval)
    if column.is_share:
        return _with_ends("{:+.1f}", interval, 100.0)
    return _with_ends(f"{{:+{column.plain_form}}}", interval)


def _with_ends(form: str, interval: Interval, scale: float = 1.0) -> str:
    mean = form.format(scale * interval.mean)
    if interval.low is None or interval.high is None:
        return mean
    low = form.format(scale * interval.low)
    high = form.format(scale * interval.high)
    return f"{mean} ({low} to {high})"


def to_csv(comparison: Comparison) -> str:
    """A row per figure, setting and label."""
    rows = []
    for line in comparison.lines:
        for cell in line.cells:
            row = {
                "figure": line.figure,
                "setting": line.setting.name,
                "exit_layer": line.setting.exit_layer,
                "label": cell.label,
                "runs": len(cell.runs),
                **vars(cell.interval),
            }
            for end in vars(cell.interval):
                row[f"difference_{end}"] = getattr(cell.difference, end, None)
            rows.append(row)
    return csv_text(rows)


def _note(comparison: Comparison) -> str:
    counts = sorted({len(paths) for paths in comparison.paths.values()})
    runs = " or ".join([*map(str, counts[:-1]), plural(counts[-1], "run")])
    note = f"Means over {runs} of a label, of perplexities the geometric mean"
    if counts[-1] >= 3:
        note += ", with 95% intervals (Student t) of three runs and more that are not all equal"
    if counts[0] == 1:
        note += ", of one run with 95% intervals over its prompts"
    lines = [f"{note}."]
    if len(comparison.paths) > 1:
        how = "paired run by run" if comparison.paired else "not paired"
        if comparison.paired and counts == [1]:
            how = "paired prompt by prompt"
        lines.append(
            f"vs: the difference, in points for percentages, of perplexities the ratio (x); {how}."
        )
    return "\n".join((*lines, *comparison.notes))


def plots(comparison: Comparison, folder: Path) -> dict[str, bytes | None]:
    """A plot of each figure with two exits or more; None for other figures, also of an earlier
    comparison in `folder`.
    """
    figures = {line.figure for line in comparison.lines}
    earlier = folder / "comparison.json"
    if earlier.exists():
        figures |= {line.figure for line in read_json(earlier, LayerSkipError, Comparison).lines}
    files: dict[str, bytes | None] = {}
    for name in figures:
        with style():
            figure = _by_exit(comparison, name)
        file = re.sub(r"\W", "_", name) + ".png"
        files[file] = None if figure is None else to_png(figure)
    return files


def _by_exit(comparison: Comparison, name: str) -> Figure | None:
    """A line per label and draft length; bars are 95% intervals. Full depth stands at the right."""
    of_figure = [line for line in comparison.lines if line.figure == name]
    lines = [line for line in of_figure if line.setting.exit_layer is not None]
    exits = sorted({line.setting.exit_layer or 0 for line in lines})
    if len(exits) < 2:
        return None
    kinds = list(dict.fromkeys(line.setting.drafts for line in lines))
    ticks = [str(exit_layer) for exit_layer in exits]
    if kinds == [""]:  # drafters have no figure at full depth
        full = [line for line in of_figure if line.setting.name == "autoregressive"]
        lines += full
        ticks += ["all" for _ in full]
    labels = list(comparison.paths)[:MOST_LINES]
    shown = kinds[: MOST_LINES // len(labels)]
    xlabel = "exit layer"
    if len(shown) < len(kinds) or len(labels) < len(comparison.paths):
        xlabel += "\nthe first labels and draft lengths"
    column = column_named(name)
    ylabel = name.replace("_", " ")
    scale = 1.0
    if column.is_share:
        ylabel += " (%)"
        scale = 100.0
    figure, axes = new_figure(name.replace("_", " "), xlabel, ylabel)
    for number, label in enumerate(labels):
        # So that bars do not hide each other
        shift = 0.12 * (number - (len(labels) - 1) / 2) / max(1, len(labels) - 1)
        for kind, dashes in zip(shown, cycle(_DASHES), strict=False):
            intervals = _intervals(lines, label, kind)
            if not intervals:
                continue
            points = []
            below = []
            above = []
            for exit_layer, own in intervals.items():
                points.append((ticks.index(exit_layer) + shift, scale * own.mean))
                below.append(0.0 if own.low is None else scale * (own.mean - own.low))
                above.append(0.0 if own.high is None else scale * (own.high - own.mean))
            text = f"{label}, {kind}" if len(kinds) > 1 else label
            bars = (below, above)
            draw_line(axes, number, text, points, bars, linewidth=1.2, linestyle=dashes)
    axes.set_xticks(range(len(ticks)), ticks)
    if column.is_logarithmic:
        logarithmic(axes)
    legend_above(axes)
    return figure


def _intervals(lines: list[Line], label: str, kind: str) -> dict[str, Interval]:
    """Of a label and a draft length, by exit."""
    found = {}
    for line in lines:
        for cell in line.cells:
            if line.setting.drafts == kind and cell.label == label:
                found[str(line.setting.exit_layer or "all")] = cell.interval
    return found
