"""A comparison as a text table, as CSV and JSON, and as plots of every figure by exit."""

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from ...errors import LayerSkipError, plural
from ...files import read_json
from ..comparison import Comparison, Interval, is_logarithmic, is_percentage
from . import csv_text
from .plots import MOST_LINES, draw_line, legend_above, logarithmic, new_figure, style, to_png
from .tables import TextTable


def compare_table(comparison: Comparison) -> TextTable:
    """A row per figure and setting; a column per label, then one per label with its difference from
    the first.
    """
    first, *others = comparison.paths
    headers = ("figure", "setting", *comparison.paths, *(f"{label} vs {first}" for label in others))
    rows = []
    for line in comparison.lines:
        cells = {cell.label: cell for cell in line.cells}
        means = [
            _text(line.figure, cells[label].interval if label in cells else None)
            for label in comparison.paths
        ]
        changes = [
            _text(line.figure, cells[label].difference if label in cells else None, True)
            for label in others
        ]
        rows.append((line.figure.replace("_", " "), line.setting.name, *means, *changes))
    return TextTable(headers, tuple(rows), _note(comparison), labels=2)


def _text(figure: str, interval: Interval | None, change: bool = False) -> str:
    """`50.0% (40.0% to 60.0%)`, mean and interval; as a `change` `+5.0 (-1.0 to +11.0)`, of
    perplexities `x0.5`.
    """
    if interval is None:
        return "-"
    form: Callable[[float], str]
    if is_logarithmic(figure):
        form = ("x{:.3g}" if change else "{:.3g}").format
    elif is_percentage(figure):
        form = (lambda value: f"{100 * value:+.1f}") if change else "{:.1%}".format
    else:
        form = f"{{:{'+' if change else ''}.{0 if figure == 'tokens_per_second' else 2}f}}".format
    if interval.low is None or interval.high is None:
        return form(interval.mean)
    return f"{form(interval.mean)} ({form(interval.low)} to {form(interval.high)})"


def to_csv(comparison: Comparison) -> str:
    """A row per figure, setting and label."""
    rows = []
    for line in comparison.lines:
        for cell in line.cells:
            names = {
                "figure": line.figure,
                "setting": line.setting.name,
                "exit_layer": line.setting.exit_layer,
            }
            change = {
                f"difference_{end}": getattr(cell.difference, end, None)
                for end in vars(cell.interval)
            }
            rows.append(
                {
                    **names,
                    "label": cell.label,
                    "runs": len(cell.runs),
                    **vars(cell.interval),
                    **change,
                }
            )
    return csv_text(rows)


def _note(comparison: Comparison) -> str:
    counts = {len(paths) for paths in comparison.paths.values()}
    *fewer, most = sorted(counts)
    runs = " or ".join([*map(str, fewer), plural(most, "run")])
    spread = (
        ""
        if max(counts) < 3
        else ", with 95% intervals (Student t) of three runs and more that are not all equal"
    )
    lines = [f"Means over {runs} of a label, of perplexities the geometric mean{spread}."]
    if len(comparison.paths) > 1:
        how = "paired run by run" if comparison.paired else "not paired"
        lines.append(
            f"vs: the difference, in points for percentages, of perplexities the ratio (x); {how}."
        )
    return "\n".join((*lines, *comparison.notes))


def plots(comparison: Comparison, folder: Path) -> dict[str, bytes | None]:
    """A plot of each figure with two exits or more; None for other figures, also of an earlier
    comparison in `folder`.
    """
    earlier = folder / "comparison.json"
    known = [
        comparison,
        *([read_json(earlier, LayerSkipError, Comparison)] if earlier.exists() else []),
    ]
    with style():
        drawn = {
            name: _by_exit(comparison, name)
            for name in {line.figure for each in known for line in each.lines}
        }
    return {
        re.sub(r"\W", "_", name) + ".png": None if figure is None else to_png(figure)
        for name, figure in drawn.items()
    }


def _by_exit(comparison: Comparison, name: str) -> Figure | None:
    """A line per label and draft length; bars are 95% intervals. Full depth stands at the right."""
    lines = [
        line
        for line in comparison.lines
        if line.figure == name and line.setting.exit_layer is not None
    ]
    exits = sorted({line.setting.exit_layer or 0 for line in lines})
    if len(exits) < 2:
        return None
    kinds = list(dict.fromkeys(line.setting.drafts for line in lines))
    ticks = list(map(str, exits))
    if kinds == [""]:  # drafters have no figure at full depth
        full = [
            line
            for line in comparison.lines
            if line.figure == name and line.setting.name == "autoregressive"
        ]
        lines = lines + full
        ticks = [*ticks, *("all" for _ in full)]
    figure, axes = new_figure(name.replace("_", " "))
    labels = list(comparison.paths)[:MOST_LINES]
    scale = 100.0 if is_percentage(name) else 1.0
    shown = kinds[: MOST_LINES // len(labels)]
    fewer = (
        "\nthe first labels and draft lengths"
        if (len(shown), len(labels)) < (len(kinds), len(comparison.paths))
        else ""
    )
    for number, label in enumerate(labels):
        # So that bars do not hide each other
        shift = 0.12 * (number - (len(labels) - 1) / 2) / max(1, len(labels) - 1)
        for kind, dashes in zip(shown, cycle(("-", "--", ":", "-."))):
            own = {
                ticks.index(str(line.setting.exit_layer or "all")) + shift: cell.interval
                for line in lines
                for cell in line.cells
                if (line.setting.drafts, cell.label) == (kind, label)
            }
            if own:
                points = [(place, scale * each.mean) for place, each in own.items()]
                below = [
                    0.0 if each.low is None else scale * (each.mean - each.low)
                    for each in own.values()
                ]
                above = [
                    0.0 if each.high is None else scale * (each.high - each.mean)
                    for each in own.values()
                ]
                text = f"{label}, {kind}" if len(kinds) > 1 else label
                draw_line(
                    axes, number, text, points, (below, above), linewidth=1.2, linestyle=dashes
                )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(
        xlabel=f"exit layer{fewer}",
        ylabel=name.replace("_", " ") + (" (%)" if is_percentage(name) else ""),
    )
    if is_logarithmic(name):
        logarithmic(axes)
    legend_above(axes)
    return figure
