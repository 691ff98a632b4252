"""Means over runs with 95% intervals by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

_LEVEL = 1.959964  # the 97.5% quantile of the normal distribution
# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_LARGEST = 700.0  # the largest power of e that is taken: beyond it floats overflow


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; the ends are None where a single run tells nothing about others."""

    mean: float
    low: float | None = None
    high: float | None = None

    def within(self, low: float, high: float) -> "Interval":
        """Without what lies outside the values that there are."""
        ends = (None if end is None else min(max(end, low), high) for end in (self.low, self.high))
        return Interval(self.mean, *ends)


def mean_of(values: Sequence[float], logarithmic: bool = False) -> Interval:
    """The mean of one value per run.

    `logarithmic`: the geometric mean, with an interval on the scale of logarithms; all values must be positive.
    """
    scaled = _scaled(values, logarithmic)
    error = math.sqrt(variance(scaled) / len(scaled)) if len(scaled) > 1 else None
    return _interval(fmean(scaled), error, len(scaled) - 1, logarithmic)


def difference_of(values: Sequence[float], others: Sequence[float], paired: bool, logarithmic: bool = False) -> Interval:
    """The mean of `values` less that of `others`; `logarithmic`: over it, a ratio.

    `paired`: by the differences of run and run, which must be equally many. Otherwise the variances may differ, with the
    degrees of freedom of Welch and Satterthwaite, rounded down.
    """
    mine, theirs = _scaled(values, logarithmic), _scaled(others, logarithmic)
    if paired:
        differences = [value - other for value, other in zip(mine, theirs, strict=True)]
        error = math.sqrt(variance(differences) / len(differences)) if len(differences) > 1 else None
        return _interval(fmean(differences), error, len(differences) - 1, logarithmic)
    mean = fmean(mine) - fmean(theirs)
    if min(len(mine), len(theirs)) < 2:
        return _interval(mean, None, 0, logarithmic)
    first, second = variance(mine) / len(mine), variance(theirs) / len(theirs)
    spread = first**2 / (len(mine) - 1) + second**2 / (len(theirs) - 1)
    freedom = (first + second) ** 2 / spread if spread else len(mine) + len(theirs) - 2
    return _interval(mean, math.sqrt(first + second), int(freedom + 1e-6), logarithmic)  # 2 can be computed as 1.9999999


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t; above 30 degrees of freedom by its expansion around the normal
    (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[max(freedom, 1) - 1]
    z = _LEVEL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _scaled(values: Sequence[float], logarithmic: bool) -> list[float]:
    return [math.log(value) for value in values] if logarithmic else list(values)


def _interval(mean: float, error: float | None, freedom: int, logarithmic: bool) -> Interval:
    def shown(value: float) -> float:
        return math.exp(min(value, _LARGEST)) if logarithmic else value

    if error is None:
        return Interval(shown(mean))
    half = t_quantile(freedom) * error
    return Interval(shown(mean), shown(mean - half), shown(mean + half))
