"""Intervals: their coverage, what is paired, and what has none."""

import math

import pytest
import torch
from evaluating import measured_of, outputs_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.evaluation.intervals import (
    change,
    estimate,
    margin,
    metric,
    speed_ratio,
    t_quantile,
)
from layerskip_core.evaluation.metrics import Scores


def drawn(generator, prompts=20, repeats=1, of_repeats=0.0):
    """Times of two settings; a prompt that is slow for one is slow for the other. Their ratio is 2,
    to a tenth by prompt.
    """

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(5, 40, (prompts,), generator=generator).double().expand(repeats, prompts)
    base = tokens * (0.3 * noise(prompts) + 0.03 * noise(repeats, prompts)).exp()
    spread = 0.1 * noise(prompts) + of_repeats * noise(repeats, 1) + 0.03 * noise(repeats, prompts)
    return [torch.stack([seconds, tokens]) for seconds in (base, base / 2 * spread.exp())]


def times(seconds, tokens=(1, 2, 3, 4)):
    return torch.tensor([seconds, tokens], dtype=torch.float64)[:, None]


def test_quantiles_of_student_are_those_of_published_tables():
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 7: 2.3646, 12: 2.1788, 31: 2.0395, 100: 1.9840}
    found = {freedom: t_quantile(freedom) for freedom in published}
    assert found == pytest.approx(published, abs=1e-4)
    assert (t_quantile(2, 0.99), t_quantile(9, 0.9)) == pytest.approx((9.9248, 1.8331), abs=1e-4)


@pytest.mark.parametrize(
    "prompts, repeats, of_repeats", [(12, 1, 0.0), (20, 3, 0.05), (12, 2, 0.03)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(prompts, repeats, of_repeats):
    """Also where a repeat is slower than another for one of the settings."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(300):
        low, high = speed_ratio(*drawn(generator, prompts, repeats, of_repeats)).bounds
        covered += low <= 2.0 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about
    the factor.
    """
    base = times((1.0, 9.0, 3.0, 40.0))
    disturbed = times((0.9, 8.0, 3.1, 39.0))
    half = base.clone()
    half[0] /= 2
    assert speed_ratio(base, half) == (2.0, None, None)
    three = torch.cat([half, disturbed, half], dim=1)
    value, bounds, _ = speed_ratio(base.expand(2, 3, 4), three)
    assert value == 2.0 and bounds.low < 1 < 3 < bounds.high


def test_the_interval_of_a_share_and_what_has_none():
    def share(part, whole):
        columns = torch.tensor([part, whole], dtype=torch.float64)[:, None]
        return estimate(torch.div, columns, (0.0, 1.0))

    value, (low, high), _ = share([10, 5, 0, 10], [10] * 4)
    assert value == 25 / 40 and 0 <= low < value < high == 1
    assert share([1] * 4, [1] * 4) == (1.0, None, None)
    assert speed_ratio(times((1.0,), (2,)), times((0.7,), (3,))).bounds is None
    assert share([1, 2, 3], [0, 0, 0]).value is None


def test_the_answers_to_a_prompt_count_together():
    """Their sums are one row of the data: copies say no more about other prompts than one answer
    does.
    """
    measured = measured_of(
        DecodingConfig(), outputs_of([(1, 1.0)], [(2, 4.0)], [(3, 1.0)]), answers_per_prompt=2
    )
    assert measured.times.tolist() == [[[5.0, 1.0]], [[3.0, 3.0]]]


def test_changes_are_paired_and_a_perplexity_is_by_token():
    full = Scores((0.0, 1.0) * 20)
    worse = Scores((0.0, 0.9) * 20)
    assert change(full, full) == (0.0, None, None)
    paired = change(worse, full).bounds
    own = metric(worse).bounds
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    value, (low, high), _ = metric(Scores((10.0, 40.0, 30.0), (10, 20, 10)))
    assert value == pytest.approx(math.exp(2.0)) and 0 < low < value < high


def test_a_perplexity_may_grow_by_the_share():
    """Texts of 100 tokens and ln 9 = 2.197 nats each: the perplexity may be 9 / 0.9 = 10, ln 10 =
    2.303 nats.
    """
    tokens = (100,) * 50
    full = Scores(tuple(219.7 + (place % 5) for place in range(50)), tokens)

    def grown(nats):
        values = tuple(value + nats + place % 3 for place, value in enumerate(full.values))
        return margin(Scores(values, tokens), full, 0.9, "perplexity")

    assert grown(5.0).low > 0 > grown(9.5).low
    assert grown(9.5).needed > 50 and grown(10.0).needed is None
    one = margin(Scores((225.0,), (100,)), Scores((219.7,), (100,)), 0.9, "perplexity")
    assert one.low < 0 < one.mean and one.needed == 2
