"""The Pareto figure: the quality of every setting against its speed."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..results import Result, RunRecord
from .drawing import GREY, SIZE, color, legend_above, new_figure
from .points import Points, is_wide, label, points_of
from .tables import strategy_name

_MARKERS = {"autoregressive": "s", "early-exit": "o", "self-speculative": "^"}
_FONT = 8  # points
_AXES = (0.86 * 72 * SIZE[0], 0.8 * 72 * SIZE[1])  # points, about
# Offsets from a point in points, in order of preference, with the alignment of the text.
_OFFSETS = (
    (0, 5, "center", "bottom"),
    (6, 0, "left", "center"),
    (0, -5, "center", "top"),
    (-6, 0, "right", "center"),
    (5, 4, "left", "bottom"),
    (5, -4, "left", "top"),
    (-5, -4, "right", "top"),
    (-5, 4, "right", "bottom"),
)

Box = tuple[float, float, float, float]  # left, bottom, right, top


def pareto_figure(record: RunRecord) -> Figure | None:
    """A point per setting, the Pareto frontier, and labels at the points that matter. None without quality or speed."""
    found = points_of(record)
    if found is None:
        return None
    figure, axes = new_figure("Quality against speed")
    shown, lower, strategies = found.results, found.lower_is_better, found.strategies
    points = list(zip(found.speeds, found.values, strict=True))
    for number, strategy in enumerate(strategies):
        own = [point for result, point in zip(shown, points, strict=True) if strategy_name(result) == strategy]
        marker = _MARKERS.get(strategy, "D")
        axes.scatter(*zip(*own, strict=True), marker=marker, color=color(number), alpha=0.8, label=strategy)
    line = sorted((points[index] for index in found.optimal), key=lambda point: (point[0], point[1] if lower else -point[1]))
    axes.plot(*zip(*line, strict=True), color=GREY, linewidth=1, drawstyle="steps-pre", zorder=0, label="Pareto frontier")
    axes.set_xlabel("Speed (tokens per second)")
    axes.set_ylabel(found.quality_label, parse_math=False)
    axes.margins(x=0.12, y=0.16)
    _scale(axes, found)
    legend_above(axes, len(strategies) + 1)
    _label_points(axes, shown, points, strategies, found.optimal)
    return figure


def _scale(axes: Any, points: Points) -> None:
    if is_wide(points.speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if points.lower_is_better:
        if is_wide(points.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.invert_yaxis()  # better is up for every metric


def _label_points(
    axes: Any,
    shown: Sequence[Result],
    points: Sequence[tuple[float, float]],
    strategies: Sequence[str],
    optimal: Sequence[int],
) -> None:
    """Labels the frontier, the exits alone and each other strategy's fastest setting, where a label has room."""
    by_speed = sorted(enumerate(shown), key=lambda item: points[item[0]][0])
    fastest = {strategy_name(result): index for index, result in by_speed}
    alone = [index for index, result in enumerate(shown) if result.strategy == "early-exit"]
    scaled = _in_points(axes, points)
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in scaled]
    steps = sorted(scaled[index] for index in optimal)
    for (left, top), (right, bottom) in pairwise(steps):  # the frontier: down at `left`, then to the right
        taken += [(left - 1, bottom, left + 1, top), (left, bottom - 1, right, bottom + 1)]
    for index in dict.fromkeys([*optimal, *fastest.values(), *alone]):
        result, strategy = shown[index], strategy_name(shown[index])
        text = label(result)
        if strategy != "autoregressive" and index == fastest[strategy] and result.speedup:
            text += f": {result.speedup:.2g}x"
        for x, y, horizontal, vertical in _OFFSETS:
            box = _box(scaled[index][0] + x, scaled[index][1] + y, text, horizontal, vertical)
            if box[0] >= 0 and box[2] <= _AXES[0] and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(
                    text, points[index], textcoords="offset points", xytext=(x, y), ha=horizontal, va=vertical,
                    fontsize=_FONT, color=color(strategies.index(strategy)),
                )  # fmt: skip
                break


def _in_points(axes: Any, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places of data points in typographic points from the axes' lower left corner, for their final limits."""
    places = axes.transAxes.inverted().transform(axes.transData.transform(points))
    return [(float(x) * _AXES[0], float(y) * _AXES[1]) for x, y in places]


def _box(x: float, y: float, text: str, horizontal: str, vertical: str) -> Box:
    """The area of a text at (x, y), by an average width of a letter."""
    width, height = 0.5 * _FONT * len(text), 1.1 * _FONT
    left = {"left": x, "center": x - width / 2, "right": x - width}[horizontal]
    bottom = {"bottom": y, "center": y - height / 2, "top": y - height}[vertical]
    return left - 3, bottom, left + width + 3, bottom + height


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
