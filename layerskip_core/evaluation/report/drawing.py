"""The common style of all figures, and their export as PNG and as SVG for the report page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

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
