"""95% intervals over the prompts, by the percentile bootstrap (Efron, 1979): how a figure varies with the prompts drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .outputs import Outputs, Times
from .results import Bounds

_RESAMPLES = (200, 1000)  # fewer of many prompts
_DRAWS = 4_000_000  # that take a moment and 50 MB
_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


class Resamples:
    """As many prompts as were measured, drawn from them with replacement, many times. Equal numbers give equal draws."""

    def __init__(self, prompts: int) -> None:
        fewest, most = _RESAMPLES
        shape = (min(most, max(fewest, _DRAWS // max(prompts, 1))), prompts)
        drawn = torch.randint(max(prompts, 1), shape, generator=torch.Generator().manual_seed(0))
        # How often each prompt was drawn: (resamples, prompts).
        self._counts = torch.zeros(shape).scatter_add_(1, drawn, torch.ones(shape))

    def sums(self, values: Sequence[float]) -> Tensor:
        """The sum over each resample of a value per prompt, (resamples,)."""
        return self._counts @ torch.tensor(values, dtype=torch.float32)

    def seconds_per_token(self, times: Times) -> Tensor:
        """(resamples,); not finite where the prompts that were drawn have no tokens."""
        return self.sums(times.seconds) / self.sums(times.tokens)

    def bounds(self, values: Tensor) -> Bounds | None:
        """The middle 95% of a figure's values, (resamples,). None if none is finite, or if they do not differ, which would
        look certain."""
        known = values[values.isfinite()].double()
        low, high = known.quantile(_ENDS).tolist() if len(known) else (0.0, 0.0)
        return Bounds(low, high) if low < high else None


def ratio_bounds(slower: Sequence[Times], faster: Sequence[Times]) -> Bounds | None:
    """Of the ratio of seconds per token, in the median over repeats. None also without repeats."""
    if not slower or not faster:
        return None
    resamples = Resamples(len(slower[0].seconds))
    ratios = [
        resamples.seconds_per_token(base) / resamples.seconds_per_token(new) for base, new in zip(slower, faster, strict=True)
    ]
    return resamples.bounds(torch.stack(ratios).quantile(0.5, 0))


def answer_bounds(answers: Outputs, expected: Outputs, drafts: bool) -> dict[str, Bounds | None]:
    """Of the figures that follow from the tokens: the share of identical outputs, and how many drafts were accepted."""
    each, resamples = answers.each, Resamples(len(answers.each))
    answered = [output.error is None for output in expected.each]
    same = [known and output.ids == other.ids for known, output, other in zip(answered, each, expected.each, strict=True)]
    ratios = {"identical_outputs": resamples.sums(same) / resamples.sums(answered)}
    if drafts:
        accepted = resamples.sums([output.stats.accepted for output in each])
        ratios["acceptance_rate"] = accepted / resamples.sums([output.stats.drafted for output in each])
        ratios["mean_accepted_tokens"] = accepted / resamples.sums([output.stats.rounds for output in each])
    return {name: resamples.bounds(values) for name, values in ratios.items()}
