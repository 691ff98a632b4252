"""95% intervals over the prompts, by the percentile bootstrap: how a figure varies with the prompts drawn.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for the percentile interval; Koehn,
Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004), for pairs: two settings are compared on the same
resampled prompts, so that a hard prompt is hard for both. Prompts are resampled, with all answers to a prompt, because several
answers to one prompt are not independent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, pvariance

import torch
from torch import Tensor

from .metrics import Scores, lower_is_better
from .outputs import Outputs, Times
from .results import Bounds

_RESAMPLES = (200, 1000)  # fewer of many prompts
_DRAWS = 4_000_000  # that take a moment and 50 MB
_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
_LEVEL = 1.959964  # the 97.5% quantile of the normal distribution


class Resamples:
    """As many prompts as were measured, drawn from them with replacement, many times. Equal numbers give equal draws."""

    def __init__(self, rows: int, answers_per_prompt: int = 1) -> None:
        """`answers_per_prompt`: how many consecutive rows answer the same prompt."""
        fewest, most = _RESAMPLES
        self._prompts = rows // answers_per_prompt
        shape = (min(most, max(fewest, _DRAWS // max(self._prompts, 1))), self._prompts)
        drawn = torch.randint(max(self._prompts, 1), shape, generator=torch.Generator().manual_seed(0))
        # How often each prompt was drawn: (resamples, prompts).
        self._counts = torch.zeros(shape).scatter_add_(1, drawn, torch.ones(shape))

    def sums(self, values: Sequence[float]) -> Tensor:
        """The sum over each resample, (resamples,), of a value per row or per prompt."""
        by_prompt = torch.tensor(values, dtype=torch.float64).reshape(self._prompts, -1).sum(1)
        return self._counts @ by_prompt.float()

    def means(self, scores: Scores) -> Tensor:
        """The metric in each resample, (resamples,)."""
        if scores.tokens is None:
            return self.sums(scores.values) / self._prompts
        return (self.sums(scores.values) / self.sums(scores.tokens)).exp()

    def seconds_per_token(self, times: Times) -> Tensor:
        """(resamples,); not finite where the prompts that were drawn have no tokens."""
        return self.sums(times.seconds) / self.sums(times.tokens)

    def bounds(self, values: Tensor) -> Bounds | None:
        """The middle 95% of values (resamples,). None if none is finite or all are equal, which would look certain."""
        known = values[values.isfinite()].double()
        low, high = known.quantile(_ENDS).tolist() if len(known) else (0.0, 0.0)
        return Bounds(low, high) if low < high else None


@lru_cache(maxsize=2)
def _resamples(rows: int, answers_per_prompt: int = 1) -> Resamples:
    """Drawn once for all settings of a run."""
    return Resamples(rows, answers_per_prompt)


def ratio_bounds(slower: Sequence[Times], faster: Sequence[Times], answers_per_prompt: int = 1) -> Bounds | None:
    """The interval of a ratio of seconds per token, the median over the repeats. None without repeats."""
    if not slower or not faster:
        return None
    resamples = _resamples(len(slower[0].seconds), answers_per_prompt)
    ratios = [
        resamples.seconds_per_token(base) / resamples.seconds_per_token(new) for base, new in zip(slower, faster, strict=True)
    ]
    return resamples.bounds(torch.stack(ratios).quantile(0.5, 0))


def answer_bounds(answers: Outputs, expected: Outputs, drafts: bool, answers_per_prompt: int = 1) -> dict[str, Bounds | None]:
    """Intervals of what follows from the tokens: the share of identical outputs, and how many drafts were accepted."""
    each, resamples = answers.each, _resamples(len(answers.each), answers_per_prompt)
    answered = [output.error is None for output in expected.each]
    same = [known and output.ids == other.ids for known, output, other in zip(answered, each, expected.each, strict=True)]
    ratios = {"identical_outputs": resamples.sums(same) / resamples.sums(answered)}
    if drafts:
        accepted = resamples.sums([output.stats.accepted for output in each])
        ratios["acceptance_rate"] = accepted / resamples.sums([output.stats.drafted for output in each])
        ratios["mean_accepted_tokens"] = accepted / resamples.sums([output.stats.rounds for output in each])
    return {name: resamples.bounds(values) for name, values in ratios.items()}


def metric_bounds(scores: Mapping[str, Scores]) -> dict[str, Bounds | None]:
    """The interval of every metric, by its name."""
    return {name: (draws := _resamples(len(each.values))).bounds(draws.means(each)) for name, each in scores.items()}


def change_bounds(scores: Mapping[str, Scores], full_depth: Mapping[str, Scores]) -> dict[str, Bounds]:
    """Intervals of each metric minus its value at full depth, on the same prompts; none where no prompt's value differs."""
    found = {}
    for name, each in scores.items():
        draws = _resamples(len(each.values))
        if name in full_depth and (ends := draws.bounds(draws.means(each) - draws.means(full_depth[name]))):
            found[name] = ends
    return found


@dataclass(frozen=True)
class Margin:
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
    draws = _resamples(len(values) + len(added))
    ends = draws.bounds(draws.sums([*values, *added]) / (len(values) + len(added)))
    mean = fmean(values)
    low = -math.inf if ends is None else ends.low
    return Margin(mean, low, len(values), max(_needed(mean, values, added), len(values) + 1) if mean > 0 else None)


def _needed(mean: float, values: Sequence[float], added: Sequence[float]) -> int:
    """The n for which n * mean = z * sqrt(n * variance + the squares of what is added), by the normal approximation."""
    spread, extra = _LEVEL**2 * pvariance(values), _LEVEL**2 * sum(value**2 for value in added)
    return math.ceil((spread + math.sqrt(spread**2 + 4 * mean**2 * extra)) / (2 * mean**2))
