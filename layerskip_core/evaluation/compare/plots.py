"""The figures of a comparison: every figure by exit, and held-out perplexity over the steps of the trainings."""

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..report.drawing import SIZE, color, legend_above, logarithmic, new_figure, style, to_png
from .comparison import Comparison, Line, is_logarithmic, is_percentage
from .intervals import Interval
from .runs import HELD_OUT

OVER_STEPS = f"{HELD_OUT}_over_steps"
_PANELS = 4  # exits whose perplexity over the steps is drawn
_LINE_STYLES = ("-", "--", ":", "-.")


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
