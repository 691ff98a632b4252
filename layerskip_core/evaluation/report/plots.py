"""The figures of a record: drawn once, written as PNG for papers and as SVG for the report."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..metrics import LOWER_IS_BETTER, quality
from ..record import RunRecord
from ..results import BenchResult, ExitResult, frontier

_SIZE = (5.6, 3.8)  # inches: small, so that the letters stay readable when a phone shrinks the figure
_PNG_DPI = 200
_INK = "#010203"  # becomes the page's own text colour in SVG
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
_MARKERS = {"autoregressive": "s", "early-exit": "o", "self-speculative": "^"}
_COLORS = ("#3b82c4", "#e07b39", "#3f9b5f", "#b0579b", "#c9a227", "#8a6fd1", "#d1495b", "#4aa3a2")  # for light and dark
_WIDE = 8  # the largest speed over the smallest that still has room on a linear axis
_PARTS = ("prefill", "draft", "verify", "other")

Result = ExitResult | BenchResult
Record = RunRecord[Any]


def figures(record: Record) -> dict[str, Figure]:
    """The figures that this record has data for, by name, with a title each."""
    with _drawing():
        made = {name: make(record) for name, make in MAKERS.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def to_png(figure: Figure) -> bytes:
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    with _drawing():
        figure.savefig(image, format="png", dpi=_PNG_DPI)
    return image.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page: transparent, as wide as its place, in the colour of the text around it."""
    image = io.StringIO()
    with _drawing(**{"svg.hashsalt": figure.get_label()}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # known to every HTML parser
    text = re.sub(r' id="(?:figure|axes|patch|matplotlib|text|line2d|PathCollection|legend|xtick|ytick)[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{figure.get_label()}"', 1)


@contextmanager
def _drawing(**settings: Any) -> Iterator[None]:
    """In our style, and without matplotlib's notes on letters that its font lacks or values that an axis cannot show."""
    with rc_context({**_STYLE, **settings}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pareto(record: Record) -> Figure | None:
    metric = str(record.config.get("quality_metric"))
    shown = [one for one in record.results if metric in one.metrics and one.tokens_per_second is not None]
    if not shown:
        return None
    figure, axes = _figure("Quality against speed")
    lower, scale = metric in LOWER_IS_BETTER, 1 if metric in LOWER_IS_BETTER else 100
    points = [(one.tokens_per_second, scale * one.metrics[metric]) for one in shown]
    for number, strategy in enumerate(dict.fromkeys(one.strategy for one in shown)):
        mine = [point for one, point in zip(shown, points, strict=True) if one.strategy == strategy]
        axes.scatter(
            *zip(*mine, strict=True), marker=_MARKERS.get(strategy, "D"), color=_color(number), alpha=0.8, label=strategy
        )
    best = sorted(
        frontier([(one.tokens_per_second or 0.0, quality(one.metrics, metric)) for one in shown]),
        key=lambda place: points[place],
    )
    axes.plot(
        *zip(*(points[place] for place in best), strict=True), color="#888888", linewidth=1, zorder=0, label="Pareto frontier"
    )
    for place in best:
        axes.annotate(_label(shown[place]), points[place], textcoords="offset points", xytext=(3, 5), fontsize=7)
    axes.set_xlabel("tokens per second")
    axes.set_ylabel(metric.replace("_", " ") + ("" if lower else " (%)"), parse_math=False)
    highest = max(value for _, value in points) or 1.0
    axes.set_ylim(-0.05 * highest, 1.15 * highest)
    axes.margins(x=0.15)
    speeds = [speed for speed, _ in points]
    if max(speeds) > _WIDE * min(speeds) > 0:  # a shallow exit alone is so fast that all else would lie on one spot
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize=7)
    return figure


def _acceptance_by_exit(record: Record) -> Figure | None:
    found = [one for one in record.results if one.strategy == "self-speculative" and one.acceptance_rate is not None]
    if len({one.exit_layer for one in found}) < 2:
        return None
    figure, axes = _figure("Accepted drafts by exit")
    for number, drafts in enumerate(sorted({one.num_draft_tokens for one in found})):
        line = [(one.exit_layer, 100 * one.acceptance_rate) for one in found if one.num_draft_tokens == drafts]
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=_color(number), label=f"{drafts} drafts")
    agreeing = [(one.exit_layer, 100 * one.agreement) for one in record.results if getattr(one, "agreement", None) is not None]
    if agreeing:
        axes.plot(*zip(*agreeing, strict=True), linestyle="--", color="#888888", label="agreement")
    axes.set(xlabel="exit layer", ylabel="accepted (%)", ylim=(0, 105))
    axes.legend(fontsize=7)
    return figure


def _acceptance_by_position(record: Record) -> Figure | None:
    found = [one for one in record.results if one.acceptance_by_position]
    if not found:
        return None
    by_exit = {(one.strategy, one.exit_layer): one for one in sorted(found, key=lambda one: one.num_draft_tokens or 0)}
    figure, axes = _figure("Accepted drafts by position in the round")
    for number, one in enumerate(by_exit.values()):  # of each exit its longest drafts
        places = range(1, len(one.acceptance_by_position) + 1)
        shares = [100 * share for share in one.acceptance_by_position]
        axes.plot(places, shares, marker="o", markersize=4, color=_color(number), label=_label(one))
    axes.set(xlabel="position of the draft", ylabel="accepted of those compared (%)", ylim=(0, 105))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return figure


def _time_split(record: Record) -> Figure | None:
    found = [one for one in record.results if one.time_split_ms]
    if not found:
        return None
    figure, axes = _figure("Where the time goes", height=max(_SIZE[1], 0.6 + 0.2 * len(found)))
    names, done = [_label(one) for one in found], [0.0] * len(found)
    for number, part in enumerate(_PARTS):
        sizes = [one.time_split_ms.get(part, 0.0) for one in found]
        axes.barh(range(len(found)), sizes, left=done, color=_color(number), label=part)
        done = [before + size for before, size in zip(done, sizes, strict=True)]
    axes.set_yticks(range(len(found)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("milliseconds a token")
    axes.legend(fontsize=7, ncols=len(_PARTS), loc="lower left", bbox_to_anchor=(0, 1))  # above: bars are everywhere below
    return figure


def _perplexity(record: Record) -> Figure | None:
    known = [one for one in record.results if getattr(one, "perplexity", None) is not None]
    line = [(one.exit_layer, one.perplexity) for one in known if one.exit_layer is not None]
    if not line:
        return None
    figure, axes = _figure("Perplexity of the reference by exit")
    axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=_color(0), label="early exit")
    for full in (one for one in known if one.exit_layer is None):
        axes.axhline(full.perplexity, linestyle="--", color="#888888", label="all layers")
    if min(value for _, value in line) > 0:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if max(value for _, value in line) < 100 else "")
    axes.set(xlabel="exit layer", ylabel="perplexity")
    axes.legend(fontsize=7)
    return figure


def _prediction(record: Record) -> Figure | None:
    found = [one for one in record.results if getattr(one, "predicted_speedup", None) and one.speedup]
    if not found:
        return None
    figure, axes = _figure("Predicted and measured speedup")
    for number, exit_layer in enumerate(sorted({one.exit_layer for one in found}, key=lambda layer: layer or 0)):
        mine = [(one.predicted_speedup, one.speedup) for one in found if one.exit_layer == exit_layer]
        axes.scatter(*zip(*mine, strict=True), marker="^", color=_color(number), alpha=0.8, label=f"exit {exit_layer}")
    ends = [speed for one in found for speed in (one.predicted_speedup, one.speedup)]
    axes.axline((min(ends), min(ends)), slope=1, color="#888888", linewidth=1, zorder=0)
    axes.set(xlabel="predicted speedup", ylabel="measured")
    axes.legend(fontsize=7)
    return figure


MAKERS: dict[str, Callable[[Record], Figure | None]] = {
    "pareto": _pareto,
    "acceptance_by_exit": _acceptance_by_exit,
    "acceptance_by_position": _acceptance_by_position,
    "perplexity": _perplexity,
    "prediction": _prediction,
    "time_split": _time_split,  # the last: it can be long
}


def _figure(title: str, height: float = _SIZE[1]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    figure.set_label(title)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _label(result: Result) -> str:
    if result.strategy in ("autoregressive", "transformers"):
        return result.strategy
    name = (
        ""
        if result.strategy == "self-speculative"
        else "exit alone, "
        if result.strategy == "early-exit"
        else f"{result.strategy}, "
    )
    parts = [f"exit {result.exit_layer}"] if result.exit_layer is not None else []
    parts += [f"{result.num_draft_tokens} drafts"] if result.num_draft_tokens else []
    return (name + ", ".join(parts)).replace("exit alone, exit", "exit alone")


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def title(record: Record) -> str:
    task = record.config["task"]
    data = task.get("data") if task.get("task") == "jsonl" else task.get("task")
    return f"{Path(record.config['model']).name} on {Path(data or 'a task').name}"
