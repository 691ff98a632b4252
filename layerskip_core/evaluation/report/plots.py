"""The figures of a record, their style, and their export as PNG and as SVG for the page."""

import io
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

from ..metrics import lower_is_better
from ..results import Result, RunRecord, drafts_name, result_name
from .tables import Points, has_scores, is_wide, points_of, strategy_name

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
# Where a label stands from its point: points to the right and up, in order of preference.
_OFFSETS = ((0, 5), (6, 0), (0, -5), (-6, 0), (5, 4), (5, -4), (-5, -4), (-5, 4))


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
    (x, y), colour = zip(*points, strict=True), f"C{number}"
    axes.plot(x, y, marker=LINE_MARKERS[number], markersize=4, color=colour, label=label, **style)
    if errors is not None:
        axes.errorbar(
            x, y, errors, fmt="none", ecolor=colour, elinewidth=style.get("linewidth"), capsize=2
        )


def best_lines(
    lines: Mapping[Any, list[Result]], most: int = MOST_LINES
) -> tuple[dict[Any, list[Result]], str]:
    """At most `most` lines, first from the Pareto frontier, then the fastest; and a note on the
    choice.
    """
    ranks = {
        name: max((each.pareto, each.tokens_per_second or 0.0) for each in results)
        for name, results in lines.items()
    }
    best = sorted(lines, key=ranks.__getitem__, reverse=True)[:most]
    note = f"\n{len(best)} of {len(lines)}: those on the Pareto frontier of quality and speed, then the fastest"
    return {name: lines[name] for name in lines if name in best}, note if len(lines) > len(
        best
    ) else ""


def to_png(figure: Figure) -> bytes:
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    with style():
        figure.savefig(image, format="png", dpi=_PNG_DPI, facecolor="white")
    return image.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page: transparent, as wide as its container, in the page's text
    colour.
    """
    image = io.StringIO()
    with style(**{"svg.hashsalt": figure.get_label()}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", image.getvalue(), flags=re.DOTALL)
    attributes, body = text[text.index("<svg") + len("<svg") :].split(">", 1)
    attributes = re.sub(
        r' (width|height|xmlns(:xlink)?)="[^"]*"', "", attributes
    )  # HTML parsers know these namespaces
    body = re.sub(
        r' id="(?:figure|axes|patch|matplotlib|text|line2d|PathCollection|legend|xtick|ytick)[^"]*"',
        "",
        body,
    )
    return f'<svg role="img" aria-label="{figure.get_label()}"{attributes}>{body.replace(_INK, "currentColor")}'


def figures(record: RunRecord) -> dict[str, Figure]:
    """The figures that the record has data for, by name."""
    with style():
        drawn = {name: draw(record) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _curves(
    title: str, xlabel: str, ylabel: str, curves: Curves, dashed: Curves, shares: bool = False
) -> Figure | None:
    """A line per curve (at most eight), and grey `dashed` ones for comparison; `shares`: in
    percent, with a linear axis.
    """
    if not curves:
        return None
    figure, axes = new_figure(title, xlabel, ylabel)
    for number, (label, points) in enumerate(curves.items()):
        draw_line(axes, number, label, points)
    for label, points in dashed.items():
        axes.plot(*zip(*points, strict=True), linestyle="--", color=GREY, label=label)
    if shares:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    elif min(value for points in curves.values() for _, value in points) > 0:
        logarithmic(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure


def _scores_by_exit(record: RunRecord, title: str, lower: bool) -> Figure | None:
    """lm-eval scores: a line per task (its first metric) with standard errors, and a dashed line at
    full depth.
    """
    exits = [
        result
        for result in record.results
        if result.strategy == "early-exit" and result.exit_layer is not None
    ]
    names: dict[str, str] = {}  # by task
    for name in record.results[0].metrics:
        if lower_is_better(name) == lower:
            names.setdefault(name.split()[0], name)
    if not has_scores(record) or len(exits) < 2 or not names:
        return None
    note = f"\nthe first {MOST_LINES} of {len(names)} tasks" if len(names) > MOST_LINES else ""
    figure, axes = new_figure(
        title, f"exit layer; dashed: all layers{note}", "lower is better" if lower else "score"
    )
    for number, name in enumerate(list(names.values())[:MOST_LINES]):
        shown = [result for result in exits if name in result.metrics]
        points = [(result.exit_layer, result.metrics[name]) for result in shown]
        draw_line(axes, number, name, points, [result.stderr.get(name, 0.0) for result in shown])
        axes.axhline(
            record.results[0].metrics[name], linestyle="--", linewidth=1, color=f"C{number}"
        )
    if lower:
        logarithmic(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_above(axes)
    return figure


def _acceptance_by_exit(record: RunRecord) -> Figure | None:
    lines: dict[str, list[Result]] = {}
    agreeing = []
    for result in sorted(
        record.results,
        key=lambda result: (result.draft_weights or "", result.num_draft_tokens or 0),
    ):
        if result.strategy == "self-speculative" and result.acceptance_rate is not None:
            lines.setdefault(drafts_name(result), []).append(result)
        if result.strategy == "early-exit" and result.agreement is not None:
            agreeing.append((result.exit_layer, 100 * result.agreement))
    if len({result.exit_layer for results in lines.values() for result in results}) < 2:
        return None
    kept, note = best_lines(lines, MOST_LINES - bool(agreeing))
    curves = {
        name: [(each.exit_layer, 100 * (each.acceptance_rate or 0.0)) for each in own]
        for name, own in kept.items()
    }
    dashed = {"agreement with all layers": agreeing} if agreeing else {}
    return _curves(
        "Accepted drafts by exit",
        f"exit layer{note}",
        "accepted drafts (%)",
        curves,
        dashed,
        shares=True,
    )


def _acceptance_by_position(record: RunRecord) -> Figure | None:
    drafted = [result for result in record.results if result.acceptance_by_position]
    drafted.sort(key=lambda result: result.num_draft_tokens or 0)
    longest = {
        (result.strategy, result.draft_weights, result.exit_layer): [result] for result in drafted
    }  # of each drafter
    kept, note = best_lines(longest)
    curves = {
        result_name(result): [
            (place, 100 * share)
            for place, share in enumerate(result.acceptance_by_position or (), start=1)
        ]
        for (result,) in kept.values()
    }
    xlabel = f"position of the draft in its round{note}"
    ylabel = "accepted (%), if all before it were"
    return _curves(
        "Accepted drafts by position in the round", xlabel, ylabel, curves, {}, shares=True
    )


def _perplexity(record: RunRecord) -> Figure | None:
    measured = {
        result.exit_layer: result.perplexity
        for result in record.results
        if result.perplexity is not None
    }
    full = measured.pop(None, None)
    line = list(measured.items())
    curves = {"early exit": line} if line else {}
    dashed = (
        {} if full is None else {"all layers": [(line[end][0], full) for end in (0, -1) if line]}
    )
    return _curves(
        "Perplexity of the reference by exit",
        "exit layer",
        "perplexity (lower is better)",
        curves,
        dashed,
    )


def _pareto(record: RunRecord) -> Figure | None:
    """A point per setting, the Pareto frontier, and labels. None without quality or speed."""
    shown = points_of(record)
    if shown is None:
        return None
    figure, axes = new_figure(
        "Quality against speed", "Speed (tokens per second)", shown.quality_label
    )
    points = list(zip(shown.speeds, shown.values, strict=True))
    for number, strategy in enumerate(shown.strategies):
        own = [
            point
            for result, point in zip(shown.results, points, strict=True)
            if strategy_name(result) == strategy
        ]
        # Baselines share colours with strategies
        marker = _MARKERS.get(strategy, "D" if number < MOST_LINES else "X")
        axes.scatter(
            *zip(*own, strict=True), marker=marker, color=f"C{number}", alpha=0.8, label=strategy
        )
    sign = 1 if shown.lower_is_better else -1
    line = sorted(
        (points[index] for index in shown.optimal), key=lambda point: (point[0], sign * point[1])
    )
    axes.plot(
        *zip(*line, strict=True),
        color=GREY,
        linewidth=1,
        drawstyle="steps-pre",
        zorder=0,
        label="Pareto frontier",
    )
    axes.margins(x=0.12, y=0.16)
    if is_wide(shown.speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if shown.lower_is_better:
        if is_wide(shown.values):
            logarithmic(axes)
        axes.invert_yaxis()  # better is up for every metric
    legend_above(axes)
    _label_points(figure, axes, shown)
    return figure


def _label_points(figure: Figure, axes: Any, shown: Points) -> None:
    """Labels the frontier, the exits alone and the fastest setting of each other strategy, where a
    label has room.
    """
    figure.draw_without_rendering()  # settles the layout, so that areas in pixels are final
    places = axes.transData.transform(list(zip(shown.speeds, shown.values, strict=True)))
    taken = [Bbox([place - 4, place + 4]) for place in places]
    steps = sorted(map(tuple, places[shown.optimal]))
    # The frontier: down at `left`, then to the right
    for (left, top), (right, bottom) in pairwise(steps):
        taken += [
            Bbox([(left - 1, bottom), (left + 1, top)]),
            Bbox([(left, bottom - 1), (right, bottom + 1)]),
        ]
    by_speed = sorted(range(len(places)), key=lambda index: shown.speeds[index])
    fastest = {strategy_name(shown.results[index]): index for index in by_speed}
    alone = [index for index, result in enumerate(shown.results) if result.strategy == "early-exit"]
    for index in dict.fromkeys([*shown.optimal, *fastest.values(), *alone]):
        result = shown.results[index]
        strategy = strategy_name(shown.results[index])
        text = result_name(result)
        if strategy != "autoregressive" and index == fastest[strategy] and result.speedup:
            text += f": {result.speedup:.2g}x"
        for x, y in _OFFSETS:
            label = axes.annotate(
                text, (shown.speeds[index], shown.values[index]), textcoords="offset points", xytext=(x, y), fontsize=8,
                ha="left" if x > 0 else "right" if x else "center", va="bottom" if y > 0 else "top" if y else "center",
                color=f"C{shown.strategies.index(strategy)}",
            )  # fmt: skip
            area = label.get_window_extent()
            if (
                axes.bbox.x0 <= area.x0
                and area.x1 <= axes.bbox.x1
                and not area.count_overlaps(taken)
            ):
                taken.append(area)
                break
            label.remove()


FIGURES: Mapping[str, Callable[[RunRecord], Figure | None]] = {
    "scores_by_exit": partial(_scores_by_exit, title="Scores by exit", lower=False),
    "lower_scores_by_exit": partial(_scores_by_exit, title="Perplexities by exit", lower=True),
    "pareto": _pareto,
    "acceptance_by_exit": _acceptance_by_exit,
    "acceptance_by_position": _acceptance_by_position,
    "perplexity": _perplexity,
}
