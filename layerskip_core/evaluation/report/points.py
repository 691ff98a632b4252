"""The settings of a record as points of quality and speed, for the Pareto figure and the one in the terminal."""

from dataclasses import dataclass

from ..metrics import is_share, lower_is_better, quality
from ..results import Result, RunRecord, frontier
from .tables import strategy_name

_WIDE = 8  # the largest ratio of highest to lowest value for a linear axis


@dataclass(frozen=True)
class Points:
    """What was measured: tokens per second and the quality metric, in percent unless a lower value is better.

    `optimal`: the indices of the points on the Pareto frontier. `strategies`: their names, in the order of the results.
    """

    results: list[Result]
    speeds: list[float]
    values: list[float]
    optimal: list[int]
    strategies: list[str]
    lower_is_better: bool
    quality_label: str


def points_of(record: RunRecord) -> Points | None:
    """None without quality or speed."""
    metric = str(record.config.get("quality_metric"))
    shown = [result for result in record.results if metric in result.metrics and result.tokens_per_second is not None]
    if not shown:
        return None
    lower, share = lower_is_better(metric), is_share(metric)
    speeds = [result.tokens_per_second or 0.0 for result in shown]
    values = [result.metrics[metric] * (100 if share else 1) for result in shown]
    optimal = frontier([(speed, quality(result.metrics, metric)) for speed, result in zip(speeds, shown, strict=True)])
    label = f"Quality: {metric.replace('_', ' ')}" + (", lower is better" if lower else " (%)" if share else "")
    return Points(shown, speeds, values, optimal, list(dict.fromkeys(map(strategy_name, shown))), lower, label)


def is_wide(values: list[float]) -> bool:
    """Whether an axis is better logarithmic: one very fast exit would squeeze all other points together."""
    return max(values) > _WIDE * min(values) > 0
