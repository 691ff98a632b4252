"""Pictures in the terminal: settings as points of quality and speed, and the loss of every exit over a training."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from layerskip_core.evaluation.report.tables import Points

_HEIGHT = 12  # lines of a front
_MARKERS = {"autoregressive": "■", "early-exit": "○", "self-speculative": "▲"}
_COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_yellow", "bright_green")
_BARS = "▁▂▃▄▅▆▇█"
_MOST_CURVES = 12  # exits with a line of their own
_POINTS = 200  # of a curve, at most
_LEAST = 1e-6  # losses below count as this on the logarithmic scale


def front(points: "Points", width: int) -> Text:
    """A marker per setting, better quality higher and faster further right. Numbers stand for the settings on the frontier.

    `width`: characters of a line.
    """
    from layerskip_core.evaluation.report.tables import is_wide, strategy_name
    from layerskip_core.evaluation.results import result_name

    high, low = f"{max(points.values):.4g}", f"{min(points.values):.4g}"
    margin = max(len(high), len(low))
    across = _places(points.speeds, width - margin - 2, is_wide(points.speeds))
    up = _places(points.values, _HEIGHT, points.lower_is_better and is_wide(points.values))
    if not points.lower_is_better:
        up = [_HEIGHT - 1 - row for row in up]
    markers = {
        strategy: (_MARKERS.get(strategy, "◆"), _COLOURS[number % len(_COLOURS)])
        for number, strategy in enumerate(points.strategies)
    }
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for place, result in zip(zip(up, across, strict=True), points.results, strict=True):
        cells[place] = markers[strategy_name(result)]
    # One of several points in the same place is shown: the frontier's, and of these the fastest.
    ranked = sorted(points.optimal, key=lambda index: points.speeds[index])
    for rank, index in enumerate(ranked, start=1):
        cells[up[index], across[index]] = str(rank % 10), "bold"
    text = Text()
    text.append(f"{points.quality_label}\n", style="dim")
    ends = (low, high) if points.lower_is_better else (high, low)
    for row in range(_HEIGHT):
        text.append(f"{ends[0] if row == 0 else ends[1] if row == _HEIGHT - 1 else '':>{margin}} │", style="dim")
        for column in range(max(across) + 1):
            text.append(*cells.get((row, column), (" ", "")))
        text.append("\n")
    text.append(f"{'':>{margin}} └{'─' * (width - margin - 2)}\n", style="dim")
    slow, fast = f"{min(points.speeds):.0f}", f"{max(points.speeds):.0f} tokens/s"
    text.append(f"{'':>{margin}}  {slow}{fast:>{width - margin - 2 - len(slow)}}\n", style="dim")
    for strategy, (marker, colour) in markers.items():
        text.append(f"{marker} {strategy}  ", style=colour)
    text.append("\n")
    for rank, index in enumerate(ranked, start=1):
        result = points.results[index]
        speedup = f" {result.speedup:.2f}x" if result.speedup else ""
        text.append(f"{rank} {result_name(result)}:{speedup}, {points.values[index]:.4g}\n")
    return text


class Curves:
    """The loss of every exit over the steps of a training, kept of at most `_POINTS` steps at even distances."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._kept: list[dict[int, float]] = []
        self._steps, self._distance = 0, 1

    def add(self, losses: Mapping[int, float]) -> None:
        """The latest loss of every exit, after a step."""
        self._latest = dict(losses)
        self._first = self._latest | self._first
        if self._steps % self._distance == 0:
            self._kept.append(self._latest)
        self._steps += 1
        if len(self._kept) == _POINTS:
            self._kept, self._distance = self._kept[::2], self._distance * 2

    def picture(self, width: int) -> Text:
        """A line per exit: its loss at first, over the steps and now. One logarithmic scale for all lines, so they compare.

        `width`: characters of a line. Of more than twelve exits every second, third, ... is shown, and always the last.
        """
        text, layers = Text(), sorted(self._latest)
        text.append("loss: at first, over the steps, now\n", style="dim")
        apart = -(-len(layers) // _MOST_CURVES) or 1
        steps = [*self._kept, self._latest]
        together = max(1, -(-len(steps) // max(width - 24, 10)))
        means = [_mean(steps[start : start + together]) for start in range(0, len(steps), together)]
        seen = [math.log(max(loss, _LEAST)) for point in means for loss in point.values()]
        for layer in layers[(len(layers) - 1) % apart :: apart]:
            text.append(f"exit {layer:>3} {self._first[layer]:>6.3f} ")
            bars = (_bar(point[layer], min(seen), max(seen)) if layer in point else " " for point in means)
            text.append("".join(bars), style="bold" if layer == layers[-1] else "green")
            text.append(f" {self._latest[layer]:.3f}\n")
        return text


def _places(values: Sequence[float], size: int, logarithmic: bool) -> list[int]:
    """Places 0..size-1 for the values, the lowest at 0."""
    scaled = [math.log(value) for value in values] if logarithmic else list(values)
    lowest, extent = min(scaled), max(scaled) - min(scaled)
    return [round((value - lowest) / extent * (size - 1)) if extent else 0 for value in scaled]


def _mean(points: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean loss of each exit, over the points that have it."""
    layers = dict.fromkeys(layer for point in points for layer in point)
    return {layer: fmean(point[layer] for point in points if layer in point) for layer in layers}


def _bar(loss: float, lowest: float, highest: float) -> str:
    """`lowest`, `highest`: logarithms of losses."""
    share = (math.log(max(loss, _LEAST)) - lowest) / (highest - lowest) if highest > lowest else 0.0
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]
