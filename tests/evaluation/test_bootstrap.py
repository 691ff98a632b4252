"""Intervals over the prompts: against the spread of the figure in fresh samples of prompts, and in cases that are known."""

import math

import pytest
import torch
from evaluating import outputs_of

from layerskip_core.evaluation.bootstrap import change, estimate, metric, speed_ratio
from layerskip_core.evaluation.measure.figures import repeated_times
from layerskip_core.evaluation.metrics import Scores
from layerskip_core.evaluation.outputs import times_of

PROMPTS = 60


def measured(generator, prompts=PROMPTS):
    """Times of two settings on some prompts; a prompt that is slow for one is slow for the other. Their ratio is about 2."""
    tokens = torch.randint(5, 40, (prompts,), generator=generator)
    base = tokens * (1 + 0.3 * torch.rand(prompts, generator=generator))
    faster = base / (1.2 + 1.6 * torch.rand(prompts, generator=generator))
    return [torch.stack([seconds, tokens])[:, None].double() for seconds in (base, faster)]


def times(seconds, tokens=(1, 2, 3, 4)):
    return torch.tensor([seconds, tokens], dtype=torch.float64)[:, None]


def test_the_interval_is_as_wide_as_fresh_samples_of_prompts_differ():
    generator = torch.Generator().manual_seed(1)
    found = [speed_ratio(*measured(generator)) for _ in range(200)]
    ratios = torch.tensor([ratio for ratio, _ in found])
    truth = ratios.mean().item()
    covering = sum(ends.low <= truth <= ends.high for _, ends in found) / len(found)
    assert 0.89 <= covering <= 0.99
    widths = torch.tensor([ends.high - ends.low for _, ends in found])
    assert widths.median().item() == pytest.approx(2 * 1.96 * ratios.std().item(), rel=0.15)


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about the factor."""
    base, slow = times((1.0, 9.0, 3.0, 40.0)), times((0.9, 8.0, 3.1, 39.0))  # a repeat that something disturbed
    half = base.clone()
    half[0] /= 2
    assert speed_ratio(base, half) == (2.0, None)
    alone = speed_ratio(base, slow).bounds
    assert alone.low < alone.high
    assert speed_ratio(base.expand(2, 3, 4), torch.cat([half, slow, half], dim=1)) == (2.0, None)  # in every resample


def test_what_has_no_interval_or_no_value():
    assert speed_ratio(times((1.0,), (2,)), times((0.7,), (3,))).bounds is None
    assert estimate(torch.div, [[1, 2, 3], [0, 0, 0]]) == (None, None)


def test_the_interval_of_a_share():
    value, (low, high) = estimate(torch.div, [[10, 5, 0, 10], [10] * 4])
    assert value == 25 / 40 and 0 <= low < value < high <= 1
    assert estimate(torch.div, [[1] * 4, [1] * 4]) == (1.0, None)  # the same in every resample


def test_the_answers_to_a_prompt_are_resampled_together():
    """Ten copies of a dozen prompts say no more about other prompts than one of each: the interval does not shrink."""
    pair = measured(torch.Generator().manual_seed(2), prompts=12)
    _, alone = speed_ratio(*pair)
    columns = torch.cat([times.repeat_interleave(10, dim=-1) for times in pair])

    def ratio(base, tokens, own, new):
        return base / tokens / (own / new)

    assert estimate(ratio, columns, answers_per_prompt=10).bounds == pytest.approx(alone, rel=1e-5)
    low, high = estimate(ratio, columns).bounds
    assert high - low < 0.5 * (alone.high - alone.low)
    assert repeated_times([outputs_of([(1, 1.0)], [(2, 4.0)])], 2).tolist() == [[[5.0]], [[3.0]], [[0.0]], [[0.0]]]


def test_changes_are_paired():
    full, worse = Scores((0.0, 1.0) * 20), Scores((0.0, 0.9) * 20)
    assert change(full, full) == (0.0, None)
    paired, own = change(worse, full).bounds, metric(worse).bounds
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    texts = metric(Scores((10.0, 40.0, 30.0), (10, 20, 10)))
    assert texts.value == pytest.approx(math.exp(2.0))
    assert texts.bounds == pytest.approx((math.exp(1.0), math.exp(3.0)), rel=1e-3)


def test_times_leave_out_the_prefill_or_not():
    assert times_of(outputs_of([(1, 2.0), (3, 1.0)], [(1, 4.0)])).tolist() == [[3.0, 4.0], [4, 1], [1.0, 0.0], [3, 0]]
