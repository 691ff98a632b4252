"""Figures with their 95% intervals over the prompts, by the percentile bootstrap: how they vary with the prompts drawn.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for the percentile interval; Koehn,
Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004), for pairs: two settings are compared on the same
resampled prompts, so that a hard prompt is hard for both. Prompts are resampled, with all answers to a prompt, because several
answers to one prompt are not independent.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import fmean, pvariance
from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import Scores, lower_is_better
from .results import Bounds

_RESAMPLES = (200, 1000)  # fewer of many prompts
_DRAWS = 4_000_000  # that take a moment and 50 MB
_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
_LEVEL = 1.959964  # the 97.5% quantile of the normal distribution


class Estimate(NamedTuple):
    """A figure, None if it is not finite, and its interval. No interval of a figure that is equal in all resamples."""

    value: float | None
    bounds: Bounds | None


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def estimate(
    figure: Callable[..., Tensor], columns: Tensor | Sequence[Sequence[float]], answers_per_prompt: int = 1
) -> Estimate:
    """A figure that is computed from sums over the prompts, such as the ratio of two.

    Args:
        figure: of the sums, one argument per column.
        columns: (columns, prompts), or (columns, repeats, prompts) for the median over the repeats.
        answers_per_prompt: how many values in a row belong to the same prompt.
    """
    values = torch.as_tensor(columns, dtype=torch.float64)
    values = values.reshape(len(values), -1, values.shape[-1] // answers_per_prompt, answers_per_prompt).sum(-1)
    drawn = values.float() @ _resamples(values.shape[-1])
    value = figure(*values.sum(-1)).quantile(0.5).item()
    resampled = figure(*drawn).quantile(0.5, 0)
    known = resampled[resampled.isfinite()].double()
    low, high = known.quantile(_ENDS).tolist() if len(known) else (0.0, 0.0)
    return Estimate(finite(value), Bounds(low, high) if low < high else None)


@lru_cache(maxsize=2)
def _resamples(prompts: int) -> Tensor:
    """(prompts, resamples): how often each prompt was drawn, of as many draws with replacement. The same in every run."""
    fewest, most = _RESAMPLES
    shape = (min(most, max(fewest, _DRAWS // max(prompts, 1))), prompts)
    drawn = torch.randint(max(prompts, 1), shape, generator=torch.Generator().manual_seed(0))
    return torch.zeros(shape).scatter_add_(1, drawn, torch.ones(shape)).T


def speed_ratio(slower: Tensor, faster: Tensor) -> Estimate:
    """The ratio of their seconds per token; both (2, repeats, prompts): seconds and tokens."""
    return estimate(lambda seconds, tokens, own, new: seconds / tokens / (own / new), torch.cat([slower, faster]))


def metric(scores: Scores) -> Estimate:
    """The mean over the prompts, or the perplexity per token of all texts together."""
    return estimate(scores.mean_of, scores.columns)


def change(scores: Scores, full_depth: Scores) -> Estimate:
    """A metric minus its value at full depth, on the same prompts."""
    columns = [*scores.columns, *full_depth.columns]
    return estimate(lambda *sums: scores.mean_of(*sums[:2]) - full_depth.mean_of(*sums[2:]), columns)


class Margin(NamedTuple):
    """By how much a metric exceeds the share of full depth's that it must keep, as a mean over the prompts.

    `low`: the lower end of its 95% interval. `prompts`: how many were measured. `needed`: with about how many the lower end
    would reach 0, if mean and spread stayed the same; None if the mean is not above 0.
    """

    mean: float
    low: float
    prompts: int
    needed: int | None


def margin(scores: Scores, full_depth: Scores, share: float, name: str) -> Margin:
    """Compares one metric of a setting with this share of full depth's. A perplexity may grow by 1 / share.

    The interval is that of the paired bootstrap. On a few prompts most exits have the scores of full depth, and resampling
    equal scores gives no spread at all. So two prompts are added to those of metrics in 0..1: one that only the setting gets
    right, one that only full depth does. Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37) add these
    to the pairs of which an interval of a difference of paired shares is made.
    """
    pairs = list(zip(scores.values, full_depth.values, strict=True))
    if lower_is_better(name):
        allowed, added = -math.log(share), list[float]()
        tokens = scores.tokens or (1,) * len(pairs)
        values = [full + count * allowed - nats for (nats, full), count in zip(pairs, tokens, strict=True)]
    else:
        values, added = [value - share * full for value, full in pairs], [1.0, -share]
    ends = metric(Scores((*values, *added))).bounds
    mean, needed = fmean(values), None
    if mean > 0:
        # The n for which n * mean = z * sqrt(n * variance + the squares of what is added), by the normal approximation.
        spread, extra = _LEVEL**2 * pvariance(values), _LEVEL**2 * sum(value**2 for value in added)
        enough = math.ceil((spread + math.sqrt(spread**2 + 4 * mean**2 * extra)) / (2 * mean**2))
        needed = max(enough, len(values) + 1)
    return Margin(mean, -math.inf if ends is None else ends.low, len(values), needed)
