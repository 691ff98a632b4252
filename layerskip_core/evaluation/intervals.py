"""The one way to a 95% interval: Student's t, around a figure of sums over prompts.

The variance is the jackknife estimate over prompts (Efron and Tibshirani, 1993, chapter 11), paired
in comparisons, plus the variance over repeats. Student's t allows for few of either: a bootstrap
over 12 prompts covers 90% instead of 95%.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist, fmean, pvariance
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .metrics import MOST_NATS, Scores, metric_named
from .results import Bounds

SHARE = (0.0, 1.0)
NO_LIMITS = (-math.inf, math.inf)
_ANGLES = 100_001  # points of a numerical integral
_ROUNDING = 1e-9  # times max(1, |value|): a smaller standard error is rounding
_OF_A_MEDIAN = math.pi / 2  # variance of a median over a mean's, at most (normal values)


class Variance(NamedTuple):
    """One independent part of a figure's variance."""

    value: float
    freedom: int  # degrees of freedom with which it was estimated


class Estimate(NamedTuple):
    """A figure (None: not finite), its 95% interval, and the number of rows that would halve the
    interval (0: only more repeats would).
    """

    value: float | None
    bounds: Bounds | None = None
    rows_to_halve: int | None = None


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


@cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Student's t with n degrees of freedom lies between plus and minus this with probability
    `level`.
    """
    # Of t = sqrt(n) tan(a), whose density is proportional to cos(a)^(n-1)
    angles = numpy.linspace(0, math.pi / 2, _ANGLES)
    density = numpy.cos(angles) ** (freedom - 1)
    below = numpy.concatenate([[0.0], numpy.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(numpy.interp(level, below / below[-1], angles))


def t_interval(
    value: float,
    variances: Sequence[Variance],
    limits: tuple[float, float] = NO_LIMITS,
    logarithmic: bool = False,
    level: float = 0.95,
) -> Bounds | None:
    """Student's t interval around a value, whose variance is the sum of these (Welch). None if all
    spread is rounding.

    `logarithmic`: value and variances are of a logarithm; the returned ends are exponentiated.
    """
    total = sum(part.value for part in variances)
    if not total > (_ROUNDING * max(1.0, abs(value))) ** 2:  # NaN included
        return None
    # Welch and Satterthwaite. The addend is because 2 can be computed as 1.9999999
    squares = sum(part.value**2 / part.freedom for part in variances)
    freedom = max(1, int(total**2 / squares + 1e-6))
    half = t_quantile(freedom, level) * math.sqrt(total)
    low = value - half
    high = value + half
    if logarithmic:
        low = math.exp(min(low, MOST_NATS))
        high = math.exp(min(high, MOST_NATS))
    return Bounds(max(low, limits[0]), min(high, limits[1]))


def estimate(
    figure: Callable[..., Tensor],
    columns: Tensor,
    limits: tuple[float, float] = NO_LIMITS,
    logarithmic: bool = False,
    level: float = 0.95,
) -> Estimate:
    """The median over repeats of a `figure` of sums over prompts, such as a ratio, which takes one
    sum per column.

    `columns`: (columns, repeats, prompts). `limits` clip the interval. `logarithmic`: the interval
    is symmetric in the logarithm.
    """
    _, repeats, prompts = columns.shape
    sums = columns.sum(-1, keepdim=True)
    # The figure of all prompts, then without each of them: (repeats, 1 + prompts)
    replicates = figure(*torch.cat([sums, sums - columns], dim=-1))
    value = replicates[:, 0].quantile(0.5).item()
    if not math.isfinite(value) or prompts < 2:
        return Estimate(finite(value))
    center = value
    if logarithmic:
        center = math.log(value)
        replicates = replicates.log()
    influence = (prompts - 1) * (replicates[:, :1] - replicates[:, 1:]).mean(0)
    of_prompts = Variance(influence.var().item() / prompts, prompts - 1)
    of_repeats = Variance(0.0, 1)
    if repeats > 1:
        spread = replicates[:, 0].var().item()
        of_repeats = Variance(_OF_A_MEDIAN * spread / repeats, repeats - 1)
    bounds = t_interval(center, (of_prompts, of_repeats), limits, logarithmic, level)
    if bounds is None:
        return Estimate(value)
    # An interval half as wide has a quarter of the variance, and that of repeats stays as it is
    allowed = (of_prompts.value + of_repeats.value) / 4 - of_repeats.value
    rows = math.ceil(prompts * of_prompts.value / allowed) if allowed > 0 else 0
    return Estimate(value, bounds, rows)


def speed_ratio(slower: Tensor, faster: Tensor, level: float = 0.95) -> Estimate:
    """The ratio of seconds per token; both arguments are (2, repeats, prompts), seconds and
    tokens.
    """

    def ratio(slow_seconds: Tensor, slow_tokens: Tensor, seconds: Tensor, tokens: Tensor) -> Tensor:
        return slow_seconds / slow_tokens / (seconds / tokens)

    return estimate(ratio, torch.cat([slower, faster]), logarithmic=True, level=level)


def metric(scores: Scores) -> Estimate:
    """The mean over the prompts, or the perplexity per token of all texts."""
    if scores.is_perplexity:
        return estimate(scores.mean_of, scores.columns, logarithmic=True)
    return estimate(scores.mean_of, scores.columns, SHARE)


def change(scores: Scores, full_depth: Scores) -> Estimate:
    """A metric minus its value at full depth, on the same prompts."""

    def difference(total: Tensor, count: Tensor, full_total: Tensor, full_count: Tensor) -> Tensor:
        return scores.mean_of(total, count) - full_depth.mean_of(full_total, full_count)

    return estimate(difference, torch.cat([scores.columns, full_depth.columns]))


class Margin(NamedTuple):
    """By how much a metric exceeds the required share of full depth's, as a mean over the
    prompts.
    """

    mean: float
    low: float  # end of its interval
    prompts: int
    # Prompts with which `low` would reach 0 at this mean and spread; None if the mean is not above
    # 0
    needed: int | None


def margin(
    scores: Scores, full_depth: Scores, share: float, name: str, compared: int = 1
) -> Margin:
    """Compares a metric with this share of full depth's, paired by prompt. A perplexity may grow by
    1 / share.

    `compared`: how many settings are compared so; the intervals of all hold jointly at 95%
    (Bonferroni).

    Few prompts may show no spread, so metrics in 0..1 get two pseudo-observations: a prompt that
    only the setting gets right, and one that only full depth does (Bonett and Price, 2012, Journal
    of Educational and Behavioral Statistics 37).
    """
    pairs = list(zip(scores.values, full_depth.values, strict=True))
    pseudo: list[float] = []
    if metric_named(name).lower_is_better:
        allowed = -math.log(share)  # more nats per token
        tokens = scores.tokens or (1,) * len(pairs)
        values = []
        for (nats, full_nats), count in zip(pairs, tokens, strict=True):
            values.append(full_nats + count * allowed - nats)
    else:
        values = [value - share * full for value, full in pairs]
        pseudo = [1.0, -share]
    level = 1 - 0.05 / compared
    bounds = estimate(torch.div, Scores((*values, *pseudo)).columns, level=level).bounds
    mean = fmean(values)
    needed = None
    if mean > 0:
        # Normal approximation: the n with n * mean = z * sqrt(n * variance + sum of the squared
        # pseudo-observations).
        square = NormalDist().inv_cdf((1 + level) / 2) ** 2
        spread = square * pvariance(values)
        extra = square * sum(value**2 for value in pseudo)
        enough = math.ceil((spread + math.sqrt(spread**2 + 4 * mean**2 * extra)) / (2 * mean**2))
        needed = max(enough, len(values) + 1)
    return Margin(mean, -math.inf if bounds is None else bounds.low, len(values), needed)
