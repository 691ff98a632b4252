"""What a drafter would gain: by given times of steps and rounds, and by real ones."""

import pytest
import torch
from conftest import tiny_model

from cli import training
from layerskip_core.model import TransformersBackend
from layerskip_core.training import speedup as speedups
from layerskip_core.training.speedup import SpeedEstimate, Turn, exit_speedup

LENGTHS = (1, 2, 4, 8)


def turns(step, rounds, slowness=(1,) * 9):
    """`rounds`: seconds by the number of drafts."""
    return [
        Turn(step * slow, {drafts: rounds(drafts) * slow for drafts in LENGTHS})
        for slow in slowness
    ]


@pytest.mark.parametrize("accepted, drafts", [(0.3, 1), (0.8, 2), (0.99, 8)])
def test_the_best_number_of_drafts_depends_on_the_acceptance(accepted, drafts):
    """A plain step takes 10 seconds, a round with d drafts 3 d + 8. Later everything takes four
    times as long, as on a busy machine, which changes no ratio.
    """
    estimate = SpeedEstimate(turns(10.0, lambda count: 3.0 * count + 8, (1,) * 4 + (4,) * 5))
    assert estimate.draft == pytest.approx(0.3)
    speedup = estimate.speed(accepted)
    tokens = sum(accepted**number for number in range(drafts + 1))
    assert speedup.value == pytest.approx(10 * tokens / (3 * drafts + 8))
    assert speedup.drafts == drafts
    assert speedup.low == pytest.approx(speedup.high) and speedup.is_known


def test_the_interval_leaves_out_one_turn_at_each_end():
    """Ratios of 0.1 to 0.9 at an acceptance rate of 0: the median is the fifth, the ends are the
    second and the eighth.
    """
    measured = [Turn(ratio, {1: 1.0}) for ratio in (0.5, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6)]
    speedup = SpeedEstimate(measured).speed(0.0)
    assert (speedup.value, speedup.low, speedup.high) == (0.5, 0.2, 0.8)
    assert not speedup.is_known


def test_no_speedup_is_greater_than_arithmetic_allows():
    """Drafts that read 0.45 of the weights; a round takes as long as a step."""
    speedup = SpeedEstimate(turns(1.0, lambda count: 1.0), 0.45).speed(0.46)
    bounds = [
        sum(0.46**number for number in range(drafts + 1)) / (1 + drafts * 0.45)
        for drafts in LENGTHS
    ]
    assert speedup.value == pytest.approx(max(bounds)) == speedup.most == speedup.high


def test_only_what_certainly_does_not_pay_needs_more_training():
    """What is not known is measured by sweep-exits, which takes its time."""
    assert training._pays(speedups.Speedup(1.2, 0.9, 1.5, 1, 1.6)) is None
    assert training._pays(speedups.Speedup(1.0, 0.9, 1.04, 1, 1.04)) is False
    assert training._pays(speedups.Speedup(1.2, 1.1, 1.25, 1, 1.6)) is True


@pytest.mark.parametrize("context", [12, 128])
def test_rounds_are_timed_where_the_context_is_short(context):
    backend = TransformersBackend(tiny_model(dtype=torch.float32, max_position_embeddings=context))
    found = exit_speedup(backend, 2, False)
    assert len(found.turns) == 9 and min(turn.step for turn in found.turns) > 0
