"""A comparison as a text table and as CSV."""

import csv
import io
from collections.abc import Callable

from ..report.tables import TextTable
from .comparison import Cell, Comparison, Line, is_logarithmic, is_percentage
from .intervals import Interval

_RATES = ("tokens_per_second",)


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
