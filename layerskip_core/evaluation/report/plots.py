"""The plots of a record, their style, and their export as PNG and as SVG for the page."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogFormatter, LogLocator
from matplotlib.transforms import Bbox

from ..metrics import metric_named
from ..results import Result, RunRecord, drafts_name, result_name
from .tables import Point, Points, has_scores, is_wide, points_of

# Inches: small, so that the text stays readable when a page or a phone shrinks the figure
_SIZE = (5.6, 3.8)
GREY = "#888888"
_PNG_DPI = 200
_INK = "#010203"  # to_svg replaces it by the page's text colour
MOST_LINES = 8
# At least 25 apart in CIELAB for every kind of colour vision (Machado et al., 2009), and visible on
# light and on dark.
COLORS = ("#3000fc", "#e49c00", "#24c0c0", "#a82400", "#cc60fc", "#9cb478", "#6c3c84", "#843c48")
_STYLE = {
    "axes.prop_cycle": cycler(color=COLORS),
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
Curves = Mapping[str, Sequence[tuple[Any, Any]]]  # points by the label of their line
LINE_MARKERS = "osD^vPX*"
_MARKERS = {"autoregressive": "s", "early-exit": "o", "self-speculative": "^"}
# Where a label stands from its point (to the right and up), and how it is aligned, in order of
# preference
_SPOTS = (
    (0, 5, "center", "bottom"),
    (6, 0, "left", "center"),
    (0, -5, "center", "top"),
    (-6, 0, "right", "center"),
    (5, 4, "left", "bottom"),
    (5, -4, "left", "top"),
    (-5, -4, "right", "top"),
    (-5, 4, "right", "bottom"),
)


@contextmanager
def style(**settings: Any) -> Iterator[None]:
    """The common style. Silences matplotlib's warnings about missing glyphs and values that an axis
    cannot show.
    """
    with rc_context({**_STYLE, **settings}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(title: str, xlabel: str = "", ylabel: str = "") -> tuple[Figure, Any]:
    """A figure and its axes. The title is not drawn: the page shows it as the caption."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.set_label(title)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def logarithmic(axes: Any) -> None:
    """A logarithmic axis of values. Below two powers of ten some numbers between the powers are
    labelled too.
    """
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def legend_above(axes: Any) -> None:
    """A legend above the axes, where it covers no data: in one line, or in lines of three if there
    are more than four.
    """
    entries = len(axes.get_legend_handles_labels()[1])
    columns = entries if entries <= 4 else 3
    axes.legend(
        fontsize=7.5,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        handletextpad=0.3,
        columnspacing=1.2,
    )


def draw_line(
    axes: Any,
    number: int,
    label: str,
    points: Iterable[tuple[Any, Any]],
    errors: Any = None,
    **style: Any,
) -> None:
    """A line with markers, and with error bars if there are any, in the colour and with the marker
    of its number.
    """
    x, y = zip(*points, strict=True)
    colour = f"C{number}"
    marker = LINE_MARKERS[number]
    axes.plot(x, y, marker=marker, markersize=4, color=colour, label=label, **style)
    if errors is not None:
        width = style.get("linewidth")
        axes.errorbar(x, y, errors, fmt="none", ecolor=colour, elinewidth=width, capsize=2)


def to_png(figure: Figure) -> bytes:
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    with style():
        figure.savefig(image, format="png", dpi=_PNG_DPI, facecolor="white")
    return image.getvalue()


# Ids that differ from run to run, and that nothing refers to
_IDS = re.compile(
    r' id="(?:figure|axes|patch|matplotlib|text|line2d|PathCollection|legend|xtick|ytick)[^"]*"'
)


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page: transparent, as wide as its container, in the page's text
    colour.
    """
    label = figure.get_label()
    image = io.StringIO()
    with style(**{"svg.hashsalt": label}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", image.getvalue(), flags=re.DOTALL)
    attributes, body = text[text.index("<svg") + len("<svg") :].split(">", 1)
    # HTML parsers know the namespaces
    attributes = re.sub(r' (width|height|xmlns(:xlink)?)="[^"]*"', "", attributes)
    body = _IDS.sub("", body).replace(_INK, "currentColor")
    return f'<svg role="img" aria-label="{label}"{attributes}>{body}'


def draw_plots(record: RunRecord) -> dict[str, Figure]:
    """The plots that the record has data for, by name."""
    drawn = {}
    with style():
        for name, draw in PLOTS.items():
            figure = draw(record)
            if figure is not None:
                drawn[name] = figure
    return drawn


def _curves(
    title: str, ylabel: str, curves: Curves, dashed: Curves, shares: bool = False
) -> Figure | None:
    """A line per curve over the exits (at most eight), and grey `dashed` ones for comparison; `shares`: in
    percent, with a linear axis.
    """
    if not curves:
        return None
    figure, axes = new_figure(title, "exit layer", ylabel)
    lowest = math.inf
    for number, (label, points) in enumerate(curves.items()):
        draw_line(axes, number, label, points)
        lowest = min(lowest, *(value for _, value in points))
    for label, points in dashed.items():
        axes.plot(*zip(*points, strict=True), linestyle="--", color=GREY, label=label)
    if shares:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    elif lowest > 0:
        logarithmic(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure


def _scores_by_exit(record: RunRecord, title: str, lower: bool) -> Figure | None:
    """lm-eval scores: a line per task (its first metric) with standard errors, and a dashed line at
    full depth.
    """
    full = record.results[0].metrics
    exits = []
    for result in record.results:
        if result.strategy == "early-exit" and result.exit_layer is not None:
            exits.append(result)
    names: dict[str, str] = {}  # by task
    for name in full:
        if metric_named(name).lower_is_better == lower:
            names.setdefault(name.split()[0], name)
    if not has_scores(record) or len(exits) < 2 or not names:
        return None
    xlabel = "exit layer; dashed: all layers"
    if len(names) > MOST_LINES:
        xlabel += f"\nthe first {MOST_LINES} of {len(names)} tasks"
    figure, axes = new_figure(title, xlabel, "lower is better" if lower else "score")
    for number, name in enumerate(list(names.values())[:MOST_LINES]):
        shown = [result for result in exits if name in result.metrics]
        points = [(result.exit_layer, result.metrics[name]) for result in shown]
        draw_line(axes, number, name, points, [result.stderr.get(name, 0.0) for result in shown])
        axes.axhline(full[name], linestyle="--", linewidth=1, color=f"C{number}")
    if lower:
        logarithmic(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure


def _acceptance_by_exit(record: RunRecord) -> Figure | None:
    """A line per number of drafts, and the agreement of exits with all layers."""
    lines: dict[str, list[Result]] = {}
    agreement = []
    exits = set()

    def drafts(result: Result) -> tuple[str, int]:
        return result.draft_weights or "", result.num_draft_tokens or 0

    for result in sorted(record.results, key=drafts):
        if result.strategy == "self-speculative" and result.acceptance_rate is not None:
            lines.setdefault(drafts_name(result), []).append(result)
            exits.add(result.exit_layer)
        if result.strategy == "early-exit" and result.agreement is not None:
            agreement.append((result.exit_layer, 100 * result.agreement))
    if len(exits) < 2:
        return None
    curves = {}
    for name, results in list(lines.items())[: MOST_LINES - 1]:
        curves[name] = [(each.exit_layer, 100 * (each.acceptance_rate or 0.0)) for each in results]
    dashed = {"agreement with all layers": agreement} if agreement else {}
    title = "Accepted drafts by exit"
    return _curves(title, "accepted drafts (%)", curves, dashed, shares=True)


def _perplexity(record: RunRecord) -> Figure | None:
    """A line over the exits, and a dashed one at full depth, which has no exit."""
    line = []
    full = None
    for result in record.results:
        if result.perplexity is not None and result.exit_layer is None:
            full = result.perplexity
        elif result.perplexity is not None:
            line.append((result.exit_layer, result.perplexity))
    curves = {}
    dashed = {}
    if line:
        curves["early exit"] = line
    if line and full is not None:
        dashed["all layers"] = [(line[0][0], full), (line[-1][0], full)]
    title = "Perplexity of the reference by exit"
    return _curves(title, "perplexity (lower is better)", curves, dashed)


def _pareto(record: RunRecord) -> Figure | None:
    """A point per setting, the Pareto frontier, and labels. None without quality or speed."""
    shown = points_of(record)
    if shown is None:
        return None
    xlabel = "Speed (tokens per second)"
    figure, axes = new_figure("Quality against speed", xlabel, shown.quality_label)
    colours: dict[str, str] = {}  # by strategy
    for point in shown.points:
        colours.setdefault(point.strategy, f"C{len(colours)}")
    for number, (strategy, colour) in enumerate(colours.items()):
        own = [(each.speed, each.value) for each in shown.points if each.strategy == strategy]
        # Baselines share colours with strategies
        marker = _MARKERS.get(strategy, "D" if number < MOST_LINES else "X")
        speeds, values = zip(*own, strict=True)
        axes.scatter(speeds, values, marker=marker, color=colour, alpha=0.8, label=strategy)
    # Of equal speeds the best comes first
    sign = 1 if shown.lower_is_better else -1
    optimal = [(each.speed, each.value) for each in shown.points if each.is_optimal]
    optimal.sort(key=lambda point: (point[0], sign * point[1]))
    axes.plot(
        *zip(*optimal, strict=True),
        color=GREY,
        linewidth=1,
        drawstyle="steps-pre",
        zorder=0,
        label="Pareto frontier",
    )
    axes.margins(x=0.12, y=0.16)
    if is_wide([point.speed for point in shown.points]):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if shown.lower_is_better:
        if is_wide([point.value for point in shown.points]):
            logarithmic(axes)
        axes.invert_yaxis()  # better is up for every metric
    legend_above(axes)
    _label_points(figure, axes, shown, colours)
    return figure


def _label_points(figure: Figure, axes: Any, shown: Points, colours: Mapping[str, str]) -> None:
    """Labels the frontier, the exits alone and the fastest setting of each other strategy, where a
    label fits.
    """
    figure.draw_without_rendering()  # settles the layout, so that areas in pixels are final
    positions = [(point.speed, point.value) for point in shown.points]
    places = axes.transData.transform(positions)
    taken = _taken_areas(places, [point.is_optimal for point in shown.points])
    fastest: dict[str, Point] = {}
    for point in shown.points:
        if point.strategy not in fastest or point.speed >= fastest[point.strategy].speed:
            fastest[point.strategy] = point
    labelled = [point for point in shown.points if point.is_optimal]
    labelled += sorted(fastest.values(), key=lambda point: point.speed)
    labelled += [point for point in shown.points if point.strategy == "early-exit"]
    done: list[Point] = []
    for point in labelled:
        if point in done:
            continue
        done.append(point)
        text = result_name(point.result)
        is_fastest = point is fastest[point.strategy] and point.strategy != "autoregressive"
        if is_fastest and point.result.speedup:
            text += f": {point.result.speedup:.2g}x"
        for x, y, horizontal, vertical in _SPOTS:
            label = axes.annotate(
                text,
                (point.speed, point.value),
                textcoords="offset points",
                xytext=(x, y),
                fontsize=8,
                ha=horizontal,
                va=vertical,
                color=colours[point.strategy],
            )
            area = label.get_window_extent()
            is_inside = axes.bbox.x0 <= area.x0 and area.x1 <= axes.bbox.x1
            if is_inside and not area.count_overlaps(taken):
                taken.append(area)
                break
            label.remove()


def _taken_areas(places: Any, optimal: Sequence[bool]) -> list[Bbox]:
    """Areas in pixels where no label may stand: the points, and the frontier's steps, each down at
    its left, then to the right.
    """
    taken = [Bbox([place - 4, place + 4]) for place in places]
    steps = sorted(map(tuple, places[list(optimal)]))
    for (left, top), (right, bottom) in pairwise(steps):
        taken.append(Bbox([(left - 1, bottom), (left + 1, top)]))
        taken.append(Bbox([(left, bottom - 1), (right, bottom + 1)]))
    return taken


PLOTS: Mapping[str, Callable[[RunRecord], Figure | None]] = {
    "scores_by_exit": partial(_scores_by_exit, title="Scores by exit", lower=False),
    "lower_scores_by_exit": partial(_scores_by_exit, title="Perplexities by exit", lower=True),
    "pareto": _pareto,
    "acceptance_by_exit": _acceptance_by_exit,
    "perplexity": _perplexity,
}
