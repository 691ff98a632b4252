"""Intervals over the prompts: against the spread of the figure in fresh samples of prompts, and in cases that are known."""

import math
from dataclasses import replace

import pytest
import torch
from evaluating import outputs_of

from layerskip_core.decoding import DecodeStats
from layerskip_core.evaluation.bootstrap import Resamples, answer_bounds, change_bounds, metric_bounds, ratio_bounds
from layerskip_core.evaluation.metrics import Scores
from layerskip_core.evaluation.outputs import Output, Outputs, Times

PROMPTS = 60


def measured(generator):
    """Two methods on some prompts; a prompt that is slow for one is slow for the other. Their ratio is 2 on average."""
    tokens = torch.randint(5, 40, (PROMPTS,), generator=generator)
    base = tokens * (1 + 0.3 * torch.rand(PROMPTS, generator=generator))
    faster = base / (1.2 + 1.6 * torch.rand(PROMPTS, generator=generator))
    return [Times(tuple(seconds.tolist()), tuple(tokens.tolist())) for seconds in (base, faster)]


def test_the_interval_is_as_wide_as_fresh_samples_of_prompts_differ():
    generator = torch.Generator().manual_seed(1)
    pairs = [measured(generator) for _ in range(200)]
    ratios = torch.tensor([base.seconds_per_token / faster.seconds_per_token for base, faster in pairs])
    truth = ratios.mean().item()
    bounds = [ratio_bounds([base], [faster]) for base, faster in pairs]
    covering = sum(ends.low <= truth <= ends.high for ends in bounds) / len(bounds)
    assert 0.89 <= covering <= 0.99
    widths = torch.tensor([ends.high - ends.low for ends in bounds])
    assert widths.median().item() == pytest.approx(2 * 1.96 * ratios.std().item(), rel=0.15)


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about the factor."""
    base = Times((1.0, 9.0, 3.0, 40.0), (1, 2, 3, 4))
    half = replace(base, seconds=tuple(seconds / 2 for seconds in base.seconds))
    assert ratio_bounds([base], [half]) is None
    slow = Times((0.9, 8.0, 3.1, 39.0), base.tokens)  # a repeat that something disturbed
    alone, repeats = ratio_bounds([base], [slow]), ratio_bounds([base] * 3, [half, slow, half])
    assert alone.low < alone.high
    assert repeats is None  # the median is 2 in every resample


def test_one_prompt_and_no_repeat_have_no_interval():
    assert ratio_bounds([Times((1.0,), (2,))], [Times((0.7,), (3,))]) is None
    assert ratio_bounds([], []) is None
    assert Resamples(2).bounds(torch.tensor([math.nan, math.inf])) is None


def test_intervals_of_what_follows_from_the_tokens():
    expected = Outputs(tuple(Output(ids) for ids in ((1, 2), (3,), (4, 5), (6,))))
    stats = [DecodeStats(drafted=10, accepted=accepted, rounds=2) for accepted in (10, 5, 0, 10)]
    answers = Outputs(tuple(replace(output, stats=own) for output, own in zip(expected.each, stats, strict=True)))
    wrong = Outputs((*answers.each[:3], replace(answers.each[3], ids=(7,))))
    bounds = answer_bounds(wrong, expected, drafts=True)
    assert 0 <= bounds["acceptance_rate"].low < 25 / 40 < bounds["acceptance_rate"].high <= 1
    assert bounds["mean_accepted_tokens"].high == pytest.approx(5 * bounds["acceptance_rate"].high)
    assert bounds["identical_outputs"].low < 0.75 < bounds["identical_outputs"].high == 1
    assert answer_bounds(answers, expected, drafts=False) == {"identical_outputs": None}  # identical in every resample


def test_the_answers_to_a_prompt_are_resampled_together():
    """Ten copies of a dozen prompts say no more about other prompts than one of each: the interval does not shrink."""
    generator = torch.Generator().manual_seed(2)
    base, faster = (Times(times.seconds[:12], times.tokens[:12]) for times in measured(generator))
    copies = [
        Times(*(tuple(each for each in part for _ in range(10)) for part in vars(times).values())) for times in (base, faster)
    ]
    alone = ratio_bounds([base], [faster])
    assert ratio_bounds(*([times] for times in copies), answers_per_prompt=10) == pytest.approx(alone, rel=1e-5)
    narrow = ratio_bounds(*([times] for times in copies))
    assert narrow.high - narrow.low < 0.5 * (alone.high - alone.low)
    outputs = [Outputs(tuple(Output((ids,)) for ids in row for _ in range(10))) for row in ((1, 2, 3, 4), (1, 2, 0, 4))]
    assert answer_bounds(*outputs, drafts=False, answers_per_prompt=10)["identical_outputs"].low <= 0.25


def test_changes_are_paired():
    full = Scores((0.0, 1.0) * 20)
    worse = Scores((0.0, 0.9) * 20)
    assert change_bounds({"rouge2": full}, {"rouge2": full}) == {}
    paired, own = change_bounds({"rouge2": worse}, {"rouge2": full})["rouge2"], metric_bounds({"rouge2": worse})["rouge2"]
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    texts = Scores((10.0, 40.0, 30.0), (10, 20, 10))
    assert metric_bounds({"perplexity": texts})["perplexity"] == pytest.approx((math.exp(1.0), math.exp(3.0)), rel=1e-3)


def test_times_leave_out_the_prefill_or_not():
    outputs = outputs_of([(1, 2.0), (3, 1.0)], [(1, 4.0)])
    assert outputs.times == Times((3.0, 4.0), (4, 1))
    assert outputs.decode_times == Times((1.0, 0.0), (3, 0))
    assert (outputs.times + outputs.decode_times).seconds_per_token == 8.0 / 8
    assert outputs.times.by_prompt(2) == Times((7.0,), (5,))
