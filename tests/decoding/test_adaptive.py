"""Adaptive drafting: what it chooses, and that it changes no output."""

import random
from functools import cache

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, backend_on, context_after, ids_of, native_or_skip, prompt_of

from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.decoding.drafters.estimates import Acceptance, Calibration, PassTimes, best_length
from layerskip_core.decoding.drafters.exit import ExitDrafter
from layerskip_core.decoding.drafters.knowledge import knowledge_of
from layerskip_core.model import Submodel

EXITS = (2, 4)


@cache
def backend_of(kind):
    return backend_on(kind, PackingConfig(draft_weights=("int8",)), **WIDE)


# --- the output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_a_seed_gives_the_same_sample_however_long_passes_take(kind, monkeypatch):
    backend = backend_of(kind)
    config = DecodingConfig("adaptive", max_new_tokens=40, num_draft_tokens=6, exits=EXITS, temperature=0.8, seed=3)
    first = decode(backend, prompt_of(9), config)
    tokens, chosen = ids_of(first), first.stats.steps_by_drafter
    ids_of(decode(backend, prompt_of(9), DecodingConfig("adaptive", max_new_tokens=30, exits=EXITS)))  # greedy, learns times
    clock = iter(range(0, 1 << 20, 777))
    monkeypatch.setattr("layerskip_core.decoding.drafters.adaptive.time.perf_counter", lambda: float(next(clock)))
    second = decode(backend, prompt_of(9), config)
    assert ids_of(second) == tokens and second.stats.steps_by_drafter == chosen


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_acceptance_moves_from_its_prior_to_what_was_seen_and_back():
    acceptance = Acceptance(0.5, 0.5)
    acceptance.observe(drafted=4, accepted=1)  # the second was wrong, the others were not tested
    assert acceptance.chances() == (pytest.approx(3 / 5), pytest.approx(2 / 5))  # the prior counts as four observations
    acceptance.compare([7, 8, 9], [7, 9])  # the same, by what the target said
    other = Acceptance(0.5, 0.5)
    other.observe(4, 1)
    other.observe(2, 1)
    assert acceptance.chances() == other.chances()
    for _ in range(400):
        acceptance.observe(2, 2)
    assert min(acceptance.chances()) > 0.95
    acceptance.fade(6000)
    assert 0.5 < min(acceptance.chances()) <= max(acceptance.chances()) < 0.6


def test_the_upper_end_of_a_chance_comes_down_to_its_mean_with_every_trial():
    acceptance = Acceptance(0.9, 0.9)
    gaps = []
    for _ in range(3):
        mean, upper = acceptance.chances()[0], acceptance.chances(1.0)[0]
        assert mean < upper < 1
        gaps.append(upper - mean)
        for number in range(20):
            acceptance.observe(1, int(number % 10 > 0))
    assert gaps == sorted(gaps, reverse=True)
    # Wilson's interval (1927) at 90 of 100 and 1.96 deviations is 0.826 to 0.945.
    seen = Acceptance(0.0, 0.0, strength=0.0)
    seen._tested, seen._accepted = [100.0, 100.0], [90.0, 90.0]
    assert seen.chances(1.96)[0] == pytest.approx(0.945, abs=5e-4)


def test_a_drafter_learns_how_far_to_trust_a_probability():
    calibration = Calibration(1.0, 1)
    for _ in range(400):
        calibration.observe(2, [0.5, 0.5])
    assert calibration.doubt < 0.05
    seen = random.Random(0)
    for _ in range(2000):
        prob = seen.random()
        right = seen.random() > 0.6 * (1 - prob) ** 3
        calibration.observe(int(right), [prob])
    assert calibration.power in (2, 3, 4)
    survival = calibration.survival([0.9, 0.2])
    assert survival == [pytest.approx(1.0, abs=0.02), pytest.approx(1 - 0.6 * 0.8**3, abs=0.1)]


def test_times_follow_the_machine_where_they_are_measured_and_keep_their_shape_elsewhere():
    def machine(n):
        return 2.0 * max(1.0, 0.4 + 0.1 * n)  # few tokens wait for memory

    passes = PassTimes(1.0, 0.05)
    assert passes.of(5) == pytest.approx(1.2)
    for n in (1, 2, 4, 8, 16, 3, 12, 6) * 60:
        passes.observe(n, machine(n))
    assert [passes.of(n) for n in (1, 2, 4, 8, 16)] == pytest.approx([machine(n) for n in (1, 2, 4, 8, 16)], rel=0.08)
    before = passes.of(8)
    passes.observe(8, 1000.0)  # a disturbance counts as twice the time at most
    assert passes.of(8) <= 1.11 * before
    one = PassTimes(1.0, 0.05)
    for _ in range(500):
        one.observe(4, 3 * 1.15)
    assert one.of(4) == pytest.approx(3 * 1.15, rel=0.01) and one.of(1) < one.of(8) < one.of(64)


def test_more_tokens_never_take_less_time():
    passes = PassTimes(1.0, 0.05, (1.0, 0.9, 1.2, 0.8))
    assert passes.of(1) == 1.0
    for n, time in ((16, 0.1), (2, 3.0), (32, 0.5)) * 20:
        passes.observe(n, time)
    times = [passes.of(n) for n in range(1, 100)]
    assert times == sorted(times)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("others", [(0.0, 0), (7.5, 9)])
@pytest.mark.parametrize(
    ("first", "later", "step", "ahead"), [(0.9, 0.9, 0.2, 0), (0.5, 0.95, 0.1, 1), (0.99, 0.8, 0.05, 1), (0.1, 0.1, 0.3, 0)]
)
def test_the_best_length_maximises_tokens_per_time(first, later, step, ahead, rows, others):
    """Against every length: 1 + a + a a' + ... tokens of each row, in steps of the drafter and a pass over all tokens."""
    passes = PassTimes(1.0, 0.1)
    tokens = [1 + sum(first * later**place for place in range(length)) for length in range(17)]
    rates = {
        length: (others[0] + rows * tokens[length]) / ((length + ahead) * step + passes.of(others[1] + rows * (length + 1)))
        for length in range(1, 17)
    }
    rate, best = best_length((first, later), step, passes, 16, ahead, 1.0, rows, others)
    assert rate == pytest.approx(rates[best]) and rate > 0.99 * max(rates.values())


def test_what_a_round_takes_besides_passes_makes_drafts_longer():
    passes = PassTimes(1.0, 0.1)
    lengths = [best_length((0.9, 0.9), 0.2, passes, 16, rest=rest)[1] for rest in (0.0, 1.0, 4.0)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    known = knowing(backend_of("native"))._known
    known.observe_round(None, 1, 0, 1, 0.0, 2.0)  # a pass takes two seconds
    for _ in range(200):
        known.observe_period(1, True, 4, 6.0, 5.0)
        known.observe_period(1, False, 1, 9.0, 2.0)  # where nothing is looked for, other things may be slow
    assert known.rest == pytest.approx(0.5, rel=0.01)


def test_steps_for_several_rows_have_times_of_their_own():
    known = knowing(backend_of("native"), drafts={"exit 2": 0.2, "exit 4": 0.4}, passes=(1.0, 1.1))._known
    arm, times = known.arms["exit 2"], {1: 0.2, 8: 0.9}
    assert arm.steps.of(8) == pytest.approx(0.2 + 7 * 0.1 * 0.4, abs=0.1)  # two of six layers, and the head
    for _ in range(200):
        for rows, step in times.items():
            known.observe_round(arm, rows, 3, rows * 4, 4 * step, arm.share * known.passes.of(rows * 4))
    assert {rows: arm.steps.of(rows) for rows in times} == {rows: pytest.approx(step, rel=0.05) for rows, step in times.items()}


@pytest.mark.parametrize("best", ["exit 2", "exit 4", None])
@pytest.mark.parametrize("prior", [0.4, 0.7, 0.95])
def test_the_best_arm_is_found_whatever_was_believed_before(best, prior):
    """One arm is right 95 times in 100, the others 5 times. Within 200 tokens the best one drafts nearly always."""
    profile = DraftProfile({"exit 2": prior, "exit 4": prior}, (1.0, 1.04))
    backend, config = backend_of("packed"), DecodingConfig("adaptive")
    setup = DrafterSetup(backend, config)
    drafters = {f"exit {exit_layer}": ExitDrafter(setup, "int8", Submodel(exit_layer)) for exit_layer in EXITS}
    known, seen = knowledge_of(backend, drafters, profile, remembered=False), random.Random(1)
    tokens, late = 0, []
    while tokens < 1000:
        chosen = known.choose(1 / known.passes.of(1), 12, 1)
        arm, length, accepted = None if chosen is None else chosen[0], 0, 0
        if arm is not None:
            length = known.best_length(arm, 1, 12)[1]
            right = 0.95 if arm.name == best else 0.05
            accepted = next((place for place in range(length) if seen.random() > right), length)
            arm.acceptance.observe(length, accepted)
        known.observe_round(arm, 1, length, length + 1, length * 0.25, (1 + 0.04 * length) * (arm.share if arm else 1))
        tokens += accepted + 1
        if tokens > 200:
            late.append(None if arm is None else arm.name)
    assert late.count(best) > 0.8 * len(late)


def adaptive(backend, exits=EXITS):
    config = DecodingConfig("adaptive", exits=exits)
    return drafter_for(DrafterSetup(backend, config))


def knowing(backend, **profile):
    drafter = adaptive(backend)
    drafters = {name: drafter._drafters[name] for name in ("exit 2", "exit 4")}
    drafter._known, drafter._by_clock = knowledge_of(backend, drafters, DraftProfile(**profile), remembered=False), False
    return drafter


def source_of(drafter, backend, ids, verified=()):
    context = context_after(backend, ids)
    with torch.inference_mode():
        draft = drafter.draft(context, [7])
    if verified:
        drafter.observe(context.rows[0], draft.counts[0], verified)
    return draft.source if draft.counts[0] else "plain"


REPEATED = [5, 6, 7, 8, 9, 10] * 4


@pytest.mark.parametrize(
    ("acceptance", "passes", "ids", "expected"),
    [
        ((0.5, 0.99), (1.0, 1.0), [5, 6, 7], "exit 4"),
        ((0.99, 0.99), (1.0, 1.0), [5, 6, 7], "exit 2"),
        ((0.1, 0.1), (1, 2), [5, 6, 7], "plain"),
        ((0.1, 0.1), (1.0, 1.0), REPEATED, "lookup"),
        ((0.1, 0.1), (1, 9), REPEATED, "plain"),
    ],
)
def test_it_drafts_by_what_promises_most(acceptance, passes, ids, expected):
    backend, drafts = backend_of("generic"), {"exit 2": 0.3, "exit 4": 0.6}
    by_exit = dict(zip(drafts, acceptance, strict=True))
    assert source_of(knowing(backend, acceptance=by_exit, drafts=drafts, passes=passes), backend, ids) == expected


def test_a_profile_may_hold_exits_that_are_never_right_and_passes_whose_rows_are_free():
    backend = backend_of("generic")
    known = knowing(backend, acceptance={"exit 2": 0.0, "exit 4": 0.5}, passes=(1.0, 0.9))._known
    assert known.ends(known.arms["exit 2"], 1.0, 4).survival == 1.0
    assert known.passes.of(10_000) == known.passes.of(1) == pytest.approx(1.0)


def untried_arms():
    """What is known after a plain step of a second, and arms of exits 2 and 4."""
    known = knowing(backend_of("generic"), drafts={"exit 2": 0.2, "exit 4": 0.4}, passes=(1.0, 1.05))._known
    tried, other = known.arms["exit 2"], known.arms["exit 4"]
    tried.tries = other.tries = 0.0
    known.observe_round(None, 0, 0, 1, 0.0, 1.0)
    return known, tried, other


def test_what_was_not_tried_is_as_fast_as_what_has_the_same_kernels():
    known, tried, other = untried_arms()
    assert other.step(1, 0.5) == pytest.approx(0.2)  # as fast as passes became
    for _ in range(50):
        known.observe_round(tried, 1, 4, 5, 5 * 0.1, 0.7)  # a step takes half as long as expected
    assert tried.step(1, 1.0) == pytest.approx(0.1, rel=0.05) and other.step(1, 1.0) == pytest.approx(0.2, rel=0.05)
    for _ in range(50):
        known.observe_round(other, 1, 4, 5, 5 * 0.4, 0.4)  # its own times count more
    assert other.step(1, 1.0) == pytest.approx(0.4, rel=0.1) and tried.step(1, 1.0) == pytest.approx(0.1, rel=0.15)


def test_a_draft_takes_time_besides_its_steps():
    known, tried, other = untried_arms()
    for number in range(200):
        drafted = (2, 9)[number % 2]
        known.observe_round(tried, 1, drafted, drafted + 1, 0.5 + (drafted + 1) * 0.1, 0.7)
    assert tried.pace.each == pytest.approx(0.5, rel=0.1) and tried.step(1, 1.0) == pytest.approx(0.1, rel=0.1)
    assert other.step(1, 1.0) == pytest.approx(0.2, rel=0.1)
    known.passes, other.acceptance = PassTimes(1.0, 0.01), Acceptance(0.95, 0.95, 100.0)
    short = known.best_length(other, 1, 16)[1]
    other.pace.each = 0.0
    assert known.best_length(other, 1, 16)[1] < short  # longer drafts where each costs more


def test_a_slow_first_draft_makes_no_steps_free():
    known, tried, other = untried_arms()
    known.observe_round(tried, 1, 1, 2, 4.0, 0.7)  # ten times as long as expected
    known.observe_round(tried, 1, 4, 5, 1.0, 0.7)
    assert tried.pace.each > 0 and tried.step(1, 1.0) > 0.05 and other.step(1, 1.0) > 0.1


def test_few_steps_are_without_drafts_and_not_the_first():
    known = knowing(backend_of("generic"))._known
    assert [step for step in range(300) if known.wants_plain_step()] == [4, 12, 28, 60, 124, 252]


def test_where_drafts_gain_nothing_few_steps_look_for_them():
    known = knowing(backend_of("generic"))._known
    known._choices = 64  # all drafters were tried

    def looking(rows, tokens, seconds):
        """How many of 128 steps look for drafts, if such steps give so many tokens in so many plain steps' time."""
        count = 0
        for _ in range(128):
            looks = not known.wants_plain_step(rows)
            known.observe_period(rows, looks, rows * tokens if looks else rows, seconds if looks else 1.0)
            count += looks
        return count

    assert looking(1, 4, 2.0) == 123 and looking(1, 4, 2.0) == 127  # five steps, then one, are timed
    assert 20 < looking(8, 2, 2.0) < 64
    assert looking(8, 3, 2.0) > 90
    assert 100 < looking(2, 2.2, 2.0) < 120  # a small gain: one in eight is plain, so that it is known well
    assert looking(4, 1.2, 2.0) < 55  # the more they lose, the fewer: 40 until that is known, one in 16 then


def test_it_turns_away_from_what_is_rejected():
    backend = backend_of("generic")
    acceptance, drafts = {"exit 2": 0.9, "exit 4": 0.9}, {"exit 2": 0.3, "exit 4": 0.5}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.3))
    seen = []
    for _ in range(120):
        seen.append(source_of(drafter, backend, [5, 6, 7], [1]))  # nothing is ever accepted
    assert seen[0] == "exit 2" and "exit 4" in seen and seen[-1] == "plain"


def test_a_disturbance_does_not_end_drafting_for_good():
    known = knowing(backend_of("generic"), drafts={"exit 2": 0.2, "exit 4": 0.4}, passes=(1.0, 1.05))._known

    def drafted(rounds, slowness=1.0):
        """How many of the rounds drafted, while drafts take so many times as long as they should. Two of three are right."""
        count = 0
        for number in range(rounds):
            chosen, length, drafting = known.choose(1 / known.passes.of(1), 8, 1), 0, 0.0
            arm = None if chosen is None else chosen[0]
            if arm is not None:
                length = known.best_length(arm, 1, 8)[1]
                drafting = slowness * (length + 1) * {"exit 2": 0.2, "exit 4": 0.4}[arm.name]
                arm.acceptance.observe(length, length if number % 3 else 0)
            known.observe_round(arm, 1, length, length + 1, drafting, (1.0 + 0.05 * length) * (arm.share if arm else 1))
            count += arm is not None
        return count

    assert drafted(2) == 2
    drafted(40, slowness=20.0)
    assert drafted(20, slowness=20.0) < 7  # of which few are tried again
    drafted(300)
    assert drafted(20) == 20


def test_lookups_learn_without_being_used():
    backend = backend_of("generic")
    acceptance, drafts = {"exit 2": 0.99, "exit 4": 0.1}, {"exit 2": 0.01, "exit 4": 0.2}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.0))
    acceptance = drafter._known.acceptance_of_lookup(16)
    before = acceptance.chances()[0]
    for _ in range(5):
        assert source_of(drafter, backend, REPEATED, [66]) in ("exit 2", "lookup")  # the repetition does not go on
    assert acceptance.chances()[0] < before


def test_a_lookup_counts_little_where_the_text_went_on_in_several_ways():
    backend = backend_of("generic")
    known = {"acceptance": {"exit 2": 0.7, "exit 4": 0.1}, "drafts": {"exit 2": 0.1, "exit 4": 0.2}, "passes": (1.0, 1.06)}
    frame = [5, 6, 7, 8, 9]
    assert source_of(knowing(backend, **known), backend, [*frame, 20, 21, *frame, 20, 21, *frame]) == "lookup"
    assert source_of(knowing(backend, **known), backend, [*frame, 30, 31, *frame, 20, 21, *frame]) == "exit 2"


def test_what_was_learnt_is_kept_for_the_next_greedy_output_only():
    backend = backend_of("native")
    first, second = adaptive(backend), adaptive(backend)
    assert first._known is second._known
    assert set(first._known.arms) == {"exit 2", "exit 4", "int8 exit 2", "int8 exit 4", "int8"}
    generic = backend_of("generic")  # its outputs could depend on what drafts, so that they must not depend on the clock
    others = [adaptive(generic, ()) for _ in range(2)]
    assert others[0]._known is not others[1]._known and not others[0]._by_clock


def test_a_pause_of_the_caller_changes_no_later_choice(monkeypatch):
    """A clock moves by 1/1024 s whenever it is read, and by 3 s between two steps of the eleventh answer."""
    config, now = DecodingConfig("adaptive", max_new_tokens=60, exits=EXITS), 0.0

    def clock():
        nonlocal now
        now += 1 / 1024
        return now

    def chosen(pause):
        nonlocal now
        model, drafters = tiny_model(dtype=torch.float32, **WIDE), []
        with torch.no_grad():
            for layer in model.model.layers[2:]:  # adds nothing, so that exit 2 is right
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        backend = native_or_skip(model)
        for answer in range(20):
            decoding = decode(backend, prompt_of(9, answer), config)
            for step, _ in enumerate(decoding):
                now += pause if (answer, step) == (10, 3) else 0.0
            drafters.append(decoding.stats.steps_by_drafter)
        return drafters

    monkeypatch.setattr("time.perf_counter", clock)
    assert chosen(pause=3.0) == chosen(pause=0.0)


def test_a_copy_at_an_exit_is_expected_to_be_right_nearly_as_often_as_the_exit():
    backend, profile = backend_of("packed"), DraftProfile({"exit 2": 0.4, "int8 exit 4": 0.7})
    drafters = {name: drafter for name, drafter in adaptive(backend)._drafters.items() if name.startswith("int8")}
    arms = knowledge_of(backend, drafters, profile, remembered=False).arms
    found = {name: arm.acceptance.chances()[0] for name, arm in arms.items()}
    assert found == {"int8": 0.95, "int8 exit 2": pytest.approx(0.38), "int8 exit 4": 0.7}
    assert {name: arm.calibration.power for name, arm in arms.items()} == {
        "int8": 3,
        "int8 exit 2": 1,
        "int8 exit 4": 1,
    }


def test_without_trained_exits_a_copy_drafts_with_all_its_layers():
    backend = backend_of("native")
    assert list(adaptive(backend, ())._known.arms) == ["int8"]
