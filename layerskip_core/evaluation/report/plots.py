"""The figures of a record, their common style, and their export as PNG files and as SVG for the report page."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator

from ..metrics import lower_is_better
from ..results import Result, RunRecord
from .points import Points, is_wide, points_of
from .tables import has_scores, result_name, strategy_name

SIZE = (5.6, 3.8)  # inches: small, so that the text stays readable when a page or a phone shrinks the figure
GREY = "#888888"
_PNG_DPI = 200
_INK = "#010203"  # to_svg replaces it by the page's text colour
_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_COLORS = ("#3b82c4", "#e07b39", "#3f9b5f", "#b0579b", "#c9a227", "#8a6fd1", "#d1495b", "#4aa3a2")  # on light and on dark
_PHASES = ("prefill", "draft", "verify", "other")
_PLAIN = "plain"  # steps without drafts
_WINDOW = 8  # steps

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


@contextmanager
def style(**settings: Any) -> Iterator[None]:
    """The common style. Silences matplotlib's warnings about missing glyphs and values that an axis cannot show."""
    with rc_context({**_STYLE, **settings}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(title: str, height: float = SIZE[1]) -> tuple[Figure, Any]:
    """A figure and its axes. The title is not drawn: the page shows it as the caption."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    figure.set_label(title)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def logarithmic(axes: Any) -> None:
    """A logarithmic axis of values. Below two powers of ten some numbers between the powers are labelled too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def legend_above(axes: Any, entries: int) -> None:
    """A legend above the axes, where it covers no data: in one line, or in lines of three if there are more than four."""
    columns = entries if entries <= 4 else 3
    axes.legend(fontsize=7.5, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.3, columnspacing=1.2)


def to_png(figure: Figure) -> bytes:
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    with style():
        figure.savefig(image, format="png", dpi=_PNG_DPI, facecolor="white")
    return image.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page: transparent, as wide as its container, in the page's text colour."""
    image = io.StringIO()
    with style(**{"svg.hashsalt": figure.get_label()}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML parsers know these namespaces
    text = re.sub(r' id="(?:figure|axes|patch|matplotlib|text|line2d|PathCollection|legend|xtick|ytick)[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{figure.get_label()}"', 1)


def figures(record: RunRecord) -> dict[str, Figure]:
    """The figures that the record has data for, by name."""
    with style():
        drawn = {name: draw(record) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _scores_by_exit(record: RunRecord, caption: str, lower: bool) -> Figure | None:
    """Of lm-eval: a line per task, of its first metric, with the standard errors, and a dashed line at full depth."""
    if not has_scores(record):
        return None
    exits = [result for result in record.results if result.strategy == "early-exit" and result.exit_layer is not None]
    names: dict[str, str] = {}  # by task
    for name in record.results[0].metrics:
        if lower_is_better(name) == lower:
            names.setdefault(name.split()[0], name)
    if len(exits) < 2 or not names:
        return None
    figure, axes = new_figure(caption)
    for place, name in enumerate(names.values()):
        shown = [result for result in exits if name in result.metrics]
        layers, values = [result.exit_layer for result in shown], [result.metrics[name] for result in shown]
        errors = [result.stderr.get(name, 0.0) for result in shown]
        axes.errorbar(layers, values, errors, marker="o", markersize=4, capsize=2, color=color(place), label=name)
        axes.axhline(record.results[0].metrics[name], linestyle="--", linewidth=1, color=color(place))
    axes.plot([], [], linestyle="--", linewidth=1, color=GREY, label="all layers")
    if lower:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="exit layer", ylabel="lower is better" if lower else "score")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return figure


def _acceptance_by_exit(record: RunRecord) -> Figure | None:
    drafted = [
        result for result in record.results if result.strategy == "self-speculative" and result.acceptance_rate is not None
    ]
    if len({result.exit_layer for result in drafted}) < 2:
        return None
    figure, axes = new_figure("Accepted drafts by exit")
    kinds = sorted({(result.draft_weights or "", result.num_draft_tokens) for result in drafted})
    for number, (weights, drafts) in enumerate(kinds):
        line = [
            (result.exit_layer, 100 * (result.acceptance_rate or 0.0))
            for result in drafted
            if (result.draft_weights or "", result.num_draft_tokens) == (weights, drafts)
        ]
        name = f"{drafts} {weights} drafts".replace("  ", " ")
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color(number), label=name)
    alone = [result for result in _exits(record) if result.strategy == "early-exit" and result.agreement is not None]
    agreeing = [(result.exit_layer, 100 * (result.agreement or 0.0)) for result in alone]
    if agreeing:
        axes.plot(*zip(*agreeing, strict=True), linestyle="--", color=GREY, label="agreement with the full model")
    axes.set(xlabel="exit layer", ylabel="accepted drafts (%)", ylim=(0, 105))
    axes.legend(fontsize=7)
    return figure


def _acceptance_by_position(record: RunRecord) -> Figure | None:
    drafted = [result for result in record.results if result.acceptance_by_position]
    if not drafted:
        return None
    by_length = sorted(drafted, key=lambda result: result.num_draft_tokens or 0)
    # The longest drafts of each drafter.
    longest = {(result.strategy, result.draft_weights, result.exit_layer): result for result in by_length}
    figure, axes = new_figure("Accepted drafts by position in the round")
    for number, result in enumerate(longest.values()):
        shares = [100 * share for share in result.acceptance_by_position or ()]
        positions = range(1, len(shares) + 1)
        axes.plot(positions, shares, marker="o", markersize=4, color=color(number), label=result_name(result))
    axes.set(xlabel="position of the draft in its round", ylabel="accepted (%), if all before it were", ylim=(0, 105))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return figure


def _time_split(record: RunRecord) -> Figure | None:
    timed = [result for result in record.results if result.time_split_ms]
    if not timed:
        return None
    figure, axes = new_figure("Where the time goes", height=max(SIZE[1], 0.6 + 0.2 * len(timed)))
    names, ends = [result_name(result) for result in timed], [0.0] * len(timed)
    for number, phase in enumerate(_PHASES):
        times = [result.time_split_ms.get(phase, 0.0) for result in timed]
        axes.barh(range(len(timed)), times, left=ends, color=color(number), label=phase)
        ends = [end + time for end, time in zip(ends, times, strict=True)]
    axes.set_yticks(range(len(timed)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("milliseconds per token")
    legend_above(axes, len(_PHASES))
    return figure


def _speed_within_an_answer(record: RunRecord) -> Figure | None:
    """Tokens per second along the longest answer of adaptive decoding, and what drafted at each step."""
    benched = [result for result in record.results if isinstance(result, Result)]
    steps = next((result.longest_answer[1:] for result in benched if len(result.longest_answer) > 1), ())  # after the prefill
    if not steps:
        return None
    figure, axes = new_figure(f"Speed within the longest answer of adaptive decoding, mean of {_WINDOW} steps")
    ends = list(accumulate(step.seconds for step in steps))
    speeds = []
    for place in range(len(steps)):
        window = steps[max(0, place - _WINDOW // 2) : place + _WINDOW // 2]
        speeds.append(sum(step.tokens for step in window) / sum(step.seconds for step in window))
    axes.plot(ends, speeds, color=GREY, linewidth=1, zorder=0)
    drafters = [step.drafter or _PLAIN for step in steps]
    for number, name in enumerate(sorted(set(drafters), key=lambda name: (name == _PLAIN, -drafters.count(name)))):
        own = [point for point, drafter in zip(zip(ends, speeds, strict=True), drafters, strict=True) if drafter == name]
        axes.scatter(*zip(*own, strict=True), s=14, color=GREY if name == _PLAIN else color(number), label=name)
    plain = next((result.time_per_token_ms.get("p50") for result in benched if result.strategy == "autoregressive"), None)
    if plain:
        axes.axhline(1000 / plain, linestyle="--", linewidth=1, color=GREY, label="autoregressive")
    axes.set(xlabel="seconds after the first token", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def _perplexity(record: RunRecord) -> Figure | None:
    measured = [result for result in _exits(record) if result.perplexity is not None]
    line = [(result.exit_layer, result.perplexity) for result in measured if result.exit_layer is not None]
    if not line:
        return None
    figure, axes = new_figure("Perplexity of the reference by exit")
    axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color(0), label="early exit")
    for full in (result for result in measured if result.exit_layer is None):
        axes.axhline(full.perplexity, linestyle="--", color=GREY, label="all layers")
    if min(value for _, value in line if value is not None) > 0:
        logarithmic(axes)
    axes.set(xlabel="exit layer", ylabel="perplexity (lower is better)")
    axes.legend(fontsize=7)
    return figure


def _prediction(record: RunRecord) -> Figure | None:
    compared = [result for result in _exits(record) if result.predicted_speedup and result.speedup]
    if not compared:
        return None
    figure, axes = new_figure("Predicted and measured speedup")
    for number, (weights, exit_layer) in enumerate(sorted({_side(result) for result in compared})):
        own = [result for result in compared if _side(result) == (weights, exit_layer)]
        points = [(result.predicted_speedup, result.speedup) for result in own]
        name = f"{weights} exit {exit_layer}".strip()
        axes.scatter(*zip(*points, strict=True), marker="^", color=color(number), alpha=0.8, label=name)
    start = min(speedup for result in compared for speedup in (result.predicted_speedup, result.speedup) if speedup)
    axes.axline((start, start), slope=1, color=GREY, linewidth=1, zorder=0)
    axes.set(xlabel="predicted speedup", ylabel="measured speedup")
    axes.legend(fontsize=7)
    return figure


def _side(result: Result) -> tuple[str, int]:
    """What drafts: the weights of a low-bit copy, or nothing, and the exit."""
    return result.draft_weights or "", result.exit_layer or 0


def _exits(record: RunRecord) -> list[Result]:
    """The results of a sweep; none for a benchmark, which has no predictions and no perplexity."""
    return [result for result in record.results if isinstance(result, Result)]


def _pareto(record: RunRecord) -> Figure | None:
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
        text = result_name(result)
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


FIGURES: dict[str, Callable[[RunRecord], Figure | None]] = {
    "scores_by_exit": partial(_scores_by_exit, caption="Scores by exit", lower=False),
    "lower_scores_by_exit": partial(_scores_by_exit, caption="Perplexities by exit", lower=True),
    "pareto": _pareto,
    "acceptance_by_exit": _acceptance_by_exit,
    "acceptance_by_position": _acceptance_by_position,
    "perplexity": _perplexity,
    "prediction": _prediction,
    "speed_within_an_answer": _speed_within_an_answer,
    "time_split": _time_split,  # last, because it can be tall
}
