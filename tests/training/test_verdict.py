"""What a drafter would gain, by the times of rounds that a stand-in gives, and of real ones."""

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from cli.commands import finetune
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.model import TransformersBackend
from layerskip_core.training import verdict
from layerskip_core.training.plan import Verdict
from layerskip_core.training.verdict import SpeedEstimate, Turn, exit_speedup


def timed(monkeypatch, seconds):
    """Rounds take `seconds(config)`. Returns the configs, in the order in which they were timed."""
    asked = list[DecodingConfig]()

    def round_of(rounds):
        asked.append(rounds._config)
        return seconds(rounds._config)

    monkeypatch.setattr(verdict._Rounds, "seconds", round_of)
    return asked


def linear(config):
    """A plain step takes 10 seconds, a round with d drafts 3 d + 8."""
    return 10.0 if config.strategy == "autoregressive" else 3.0 * config.num_draft_tokens + 8


@pytest.mark.parametrize(("accepted", "drafts"), [(0.3, 1), (0.8, 2), (0.99, 8)])
def test_speed_is_that_of_rounds_of_decoding(monkeypatch, accepted, drafts):
    """A block to come counts as a layer."""
    asked = timed(monkeypatch, linear)
    found = exit_speedup(TransformersBackend(tiny_model()), 2, True)
    assert {config.exit_layer for config in asked if config.strategy != "autoregressive"} == {3}
    assert (found.step, found.draft) == (10.0, pytest.approx(0.3))
    tokens = sum(accepted**number for number in range(drafts + 1))
    speedup = found.speed(accepted)
    assert (speedup.value, speedup.drafts) == (
        pytest.approx(10 * tokens / (3 * drafts + 8)),
        drafts,
    )
    assert speedup.low == speedup.value == speedup.high and speedup.is_known


def test_plain_and_drafted_rounds_take_turns_so_that_a_busy_machine_slows_both(monkeypatch):
    """From the fifth turn on everything takes four times as long, as beside another process."""
    count = len(verdict._LENGTHS) + 1
    slow = iter([1.0] * 4 * count + [4.0] * 5 * count)
    asked = timed(monkeypatch, lambda config: next(slow) * linear(config))
    speedup = exit_speedup(TransformersBackend(tiny_model()), 2, False).speed(0.8)
    assert [config.num_draft_tokens for config in asked if config.strategy != "autoregressive"] == [
        1,
        2,
        4,
        8,
    ] * 9
    assert speedup.value == pytest.approx(
        10 * (1 + 0.8 + 0.64) / 14
    ) and speedup.low == pytest.approx(speedup.high)


def test_the_interval_leaves_out_one_turn_at_each_end():
    """Ratios of 1.1 to 1.9 at an acceptance rate of 0: the median is the fifth, the ends are the
    second and the eighth.
    """
    turns = [Turn(ratio, {1: 1.0}) for ratio in (1.5, 1.1, 1.9, 1.2, 1.8, 1.3, 1.7, 1.4, 1.6)]
    alike = [Turn(ratio, {1: 1.0}) for ratio in (1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.1, 9.0, 0.2)]
    wide, narrow = (verdict.SpeedEstimate(each)._ratios(0.0, 1) for each in (turns, alike))
    assert wide == (pytest.approx(1.5), pytest.approx(1.2), pytest.approx(1.8))
    assert narrow == (pytest.approx(1.1), pytest.approx(1.0), pytest.approx(1.1))


@pytest.mark.parametrize(("parameters", "depth"), [(10**9, 0.9 * 3 / 6), (10**6, 0.0)])
def test_no_speedup_is_greater_than_arithmetic_allows(monkeypatch, parameters, depth):
    """Drafts run 2 layers of 6 and a block, the head has a tenth of the weights. In a small model
    other costs count.
    """
    # A round that takes as long as a step: the bound speaks alone
    timed(monkeypatch, lambda config: 1.0)
    backend = TransformersBackend(tiny_model())
    spec = SimpleNamespace(
        parameters=parameters, vocab=100, hidden=10, weights_read=lambda rows: 10_000
    )
    monkeypatch.setattr(backend, "spec", spec)
    speedup = exit_speedup(backend, 2, True).speed(0.46)
    bounds = {
        n: sum(0.46**number for number in range(n + 1)) / (1 + n * depth) for n in (1, 2, 4, 8)
    }
    assert speedup.value == pytest.approx(max(bounds.values())) == speedup.most == speedup.high


def test_a_wide_interval_gives_no_number_and_a_bound_below_one_needs_none():
    def text(turns, depth, accepted=0.46):
        return finetune._verdict_text(
            Verdict("exit 8", accepted, SpeedEstimate(turns, depth).speed(accepted))
        )

    unsteady = [
        Turn(step, {1: 1.0, 8: 9.0})
        for _, step in zip(range(9), cycle((0.5, 1.0, 2.0)), strict=False)
    ]
    steady = [Turn(1.0, {1: 1.0, 8: 9.0})] * 9
    said = "exit 8: 46.0% of first drafts agree on held-out rows; "
    unknown = (
        said
        + "the speed here is not known, because times differ as on a busy machine (by arithmetic at most "
    )
    assert text(unsteady, 1 / 3) == f"{unknown}1.09x)"
    assert text(unsteady, 1 / 2) == f"{unknown}0.97x): does not pay"
    found = (
        said
        + "with 1 draft about 1.09x of plain decoding here (1.09 to 1.09, by arithmetic at most 1.09x)"
    )
    assert text(steady, 1 / 3) == found
    slow = [Turn(1.0, {1: 1.78, 8: 9.0})] * 9
    assert text(slow, 1 / 3).endswith(
        "about 0.82x of plain decoding here (0.82 to 0.82, by arithmetic at most 1.09x): does not pay"
    )


def test_what_is_not_known_is_measured_next():
    """By sweep-exits, which takes its time; only what certainly does not pay needs more
    training.
    """
    assert finetune._pays(verdict.Speedup(1.2, 0.9, 1.5, 1, 1.6)) is None
    assert finetune._pays(verdict.Speedup(1.0, 0.9, 1.04, 1, 1.04)) is False
    assert finetune._pays(verdict.Speedup(1.2, 1.1, 1.25, 1, 1.6)) is True


@pytest.mark.parametrize("context", [12, 128])
def test_rounds_are_timed_where_the_context_is_short(context):
    backend = TransformersBackend(tiny_model(dtype=torch.float32, max_position_embeddings=context))
    found = exit_speedup(backend, 2, False)
    assert len(found.turns) == 9 and min(turn.step for turn in found.turns) > 0
