"""Adaptive drafting: what it chooses, and that it changes no output."""

import random
from collections import Counter
from functools import cache

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, backend_on, context_after, ids_of, native_or_skip, prompt_of

from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.decoding.drafters.adaptive import new_bandit
from layerskip_core.decoding.drafters.bandit import (
    Acceptance,
    Arm,
    Bandit,
    Calibration,
    PassTimes,
    Step,
)
from layerskip_core.model.backend import DraftEnds

EXITS = (2, 4)


@cache
def backend_of(kind):
    return backend_on(kind, PackingConfig(draft_weights=("int8",)), **WIDE)


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_a_seed_gives_the_same_sample_however_long_passes_take(kind, monkeypatch):
    backend = backend_of(kind)
    config = DecodingConfig(
        "adaptive", max_new_tokens=40, num_draft_tokens=6, exits=EXITS, temperature=0.8, seed=3
    )
    first = decode(backend, prompt_of(9), config)
    tokens = ids_of(first)
    chosen = first.stats.steps_by_drafter
    ids_of(
        decode(backend, prompt_of(9), DecodingConfig("adaptive", max_new_tokens=30, exits=EXITS))
    )  # greedy, learns times
    clock = iter(range(0, 1 << 20, 777))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    second = decode(backend, prompt_of(9), config)
    assert ids_of(second) == tokens
    # Which chooses by the clock
    assert (second.stats.steps_by_drafter == chosen) != backend.batch_invariant


# --- averages and times
# --------------------------------------------------------------------------------------------------


def test_acceptance_moves_from_its_prior_to_what_was_seen_and_back():
    acceptance = Acceptance(0.5)
    acceptance.observe(drafted=4, accepted=1)  # the second was wrong, the others were not tested
    # The prior counts as four observations
    assert acceptance.means() == (pytest.approx(3 / 5), pytest.approx(2 / 5))
    gaps = []
    for _ in range(400):
        acceptance.observe(2, 2)
        gaps.append(acceptance.means(at_best=True)[0] - acceptance.means()[0])
    assert min(acceptance.means()) > 0.95 and 0 < gaps[-1] < gaps[0] / 10
    acceptance.fade(0.002)
    assert 0.5 < min(acceptance.means()) <= max(acceptance.means()) < 0.6


def test_the_upper_end_is_that_of_wilson_s_interval():
    """At 90 of 100 and a standard deviation: (0.9 + 1/200 + sqrt(0.09/100 + 1/40000)) / (1 +
    1/100).
    """
    acceptance = Acceptance(0.9, strength=100.0)
    assert acceptance.means(at_best=True)[0] == pytest.approx(
        (0.905 + (0.0009 + 0.000025) ** 0.5) / 1.01
    )


def test_a_drafter_learns_how_far_to_trust_a_probability():
    calibration = Calibration(1.0, 3)
    seen = random.Random(0)
    for _ in range(2000):
        prob = seen.random()
        calibration.observe(int(seen.random() > 0.6 * (1 - prob) ** 3), [prob])
    assert calibration.doubt == pytest.approx(0.6, abs=0.15)


def test_drafts_of_a_drafter_that_is_too_sure_end_at_once():
    """Half of its drafts are rejected where it says 0.95, and a draft pays down to 0.6."""
    calibration = Calibration(1.0, 1)
    for place in range(1000):
        calibration.observe(place % 2, [0.95])
    ends = DraftEnds(survival=0.6, doubt=calibration.doubt, power=calibration.power)
    assert ends.length([0.95] * 6, 6) == 1
    assert ends.length([0.999, 0.999, 0.95, 0.95], 6) == 3


def test_times_follow_the_machine_where_they_are_measured_and_keep_their_shape_elsewhere():
    def machine(n):
        return 2.0 * max(1.0, 0.4 + 0.1 * n)  # few tokens wait for memory

    passes = PassTimes.measured((1.0, 1.05))
    assert passes.time_of(5) == pytest.approx(1.2)
    for n in (1, 2, 4, 8, 16, 3, 12, 6) * 60:
        passes.observe(n, machine(n))
    assert [passes.time_of(n) for n in (1, 2, 4, 8, 16)] == pytest.approx(
        [machine(n) for n in (1, 2, 4, 8, 16)], rel=0.08
    )
    before = passes.time_of(8)
    passes.observe(8, 1000.0)  # a disturbance counts as twice the time at most
    assert passes.time_of(8) <= 1.11 * before
    for n, time in ((16, 0.1), (2, 3.0), (32, 0.5)) * 20:
        passes.observe(n, time)
    times = [passes.time_of(n) for n in range(1, 100)]
    assert times == sorted(times)  # more tokens never take less time
    one = PassTimes.measured((1.0, 1.1, 1.2, 1.3))
    one.observe(4, 3.9)  # the first sets the unit
    assert [one.time_of(n) for n in (1, 4, 8)] == pytest.approx([3.0, 3.9, 5.1])


def bandit(passes=(1.0, 1.04), most=12, tries=0.0, **arms):
    """With these drafters: the acceptance that is believed, the time of a step, and the share of a
    pass that verifies.
    """
    by_name = {
        name: Arm(name, Acceptance(prior), step, 0.1, share, Calibration(1.0, 1), tries=tries)
        for name, (prior, step, share) in arms.items()
    }
    return Bandit(PassTimes.measured(passes), by_name, most)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "prior, step, share", [(0.9, 0.2, 1.0), (0.95, 0.1, 0.6), (0.8, 0.05, 0.5), (0.1, 0.3, 1.0)]
)
def test_the_best_length_maximises_tokens_per_time(prior, step, share, rows):
    """Against every length: 1 + a + a^2 + ... tokens of each row, in steps of the drafter and a
    pass over all tokens.
    """
    known = bandit((1.0, 1.1), 16, 1e9, arm=(prior, step, share))
    arm = known.arms["arm"]
    rates = {}
    for length in range(1, 17):
        drafting = (length + (share < 1)) * (
            step + 0.1 * (known.passes.time_of(rows) - known.passes.time_of(1))
        )
        seconds = drafting + share * known.passes.time_of(rows * (length + 1))
        rates[length] = rows * sum(prior**place for place in range(length + 1)) / seconds
    rate, best = known.best_length(arm, rows)
    assert rate == pytest.approx(rates[best], rel=0.01) and rate > 0.99 * max(rates.values())


def drafted(known, rounds, right, seconds, rows=1, seed=1, slowness=1.0):
    """What drafted in each round, where each draft of a drafter is right with this probability and
    a step takes so long.
    """
    seen = random.Random(seed)
    chosen = []
    for _ in range(rounds):
        step = known.next_step(rows)
        plan = known.plan(rows, 0, found=False)
        arm = plan.arm if step.tries_arms else None
        drafting = 0.0
        length = plan.length if arm else 0
        if arm:
            accepted = next(
                (place for place in range(length) if seen.random() > right[arm.name]), length
            )
            arm.acceptance.observe(length, accepted)
            drafting = slowness * (length + (arm.target_share < 1)) * seconds[arm.name]
            step.arm = arm
            step.drafts = length
        step.verified = rows * (length + 1)
        step.tokens = rows * (1 + (accepted if arm else 0))
        known.observe(
            step, drafting + (1 + 0.04 * step.verified) * (arm.target_share if arm else 1)
        )
        chosen.append(arm.name if arm else None)
    return chosen


# --- the choice
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", ["a", "b", None])
@pytest.mark.parametrize("prior", [0.4, 0.7, 0.95])
def test_the_best_drafter_is_found_whatever_was_believed_before(best, prior):
    """One is right 95 times in 100, the others 5 times."""
    known = bandit(a=(prior, 0.25, 1.0), b=(prior, 0.25, 0.8))
    chosen = drafted(
        known, 400, {name: 0.95 if name == best else 0.05 for name in "ab"}, {"a": 0.25, "b": 0.25}
    )
    assert chosen[60:].count(best) > 0.8 * 340


def test_times_of_drafts_are_those_of_each_drafter_and_number_of_rows():
    known = bandit(a=(0.5, 0.2, 0.8), b=(0.5, 0.4, 1.0))
    a, b = known.arms.values()
    # What was not tried becomes as fast as the target's passes
    known.observe(Step(1, verified=1, tokens=1), 0.5)
    assert known.best_length(a, 1)[0] == pytest.approx(
        2 * bandit(a=(0.5, 0.2, 0.8)).best_length(a, 1)[0]
    )
    for drafts in (2, 9, 4) * 70:
        for rows, step in {1: 0.1, 8: 0.2}.items():
            known.observe(Step(rows, arm=a, drafts=drafts), 0.5 + drafts * step)
        known.observe(Step(1, arm=b, drafts=drafts), 9.0)
    for rows, step in {1: 0.1, 8: 0.2}.items():
        times = known.times(a, rows, found=False)
        expected = [0.5 + drafts * step for drafts in (2, 4, 9)]
        assert [times.time_of(1 + drafts) for drafts in (2, 4, 9)] == pytest.approx(
            expected, rel=0.2
        )
    assert known.times(b, 1, found=False).time_of(5) == pytest.approx(9.0, rel=0.1)


def test_a_slow_first_draft_is_not_measured():
    known = bandit(a=(0.5, 0.2, 0.8))
    for seconds in (400.0, 4.0):
        known.observe(Step(1, arm=known.arms["a"], drafts=1), seconds)
    assert known.times(known.arms["a"], 1, found=False).time_of(2) <= 4.0


def test_a_copy_has_other_times_where_it_looks_up_what_may_be_right():
    known = bandit(a=(0.9, 0.5, 1.0))
    known.arms["a"].verifies_lookups = True
    for found, seconds in ((True, 1.0), (False, 3.0)) * 20:
        known.observe(Step(1, found=found, arm=known.arms["a"], drafts=4), seconds)
    found, alone = (known.plan(1, 0, found) for found in (True, False))
    assert found.rate > 2 * alone.rate and found.ends.survival < alone.ends.survival


def test_a_draft_does_not_end_by_the_times_of_longer_ones():
    known = bandit(a=(0.99, 0.1, 0.5))
    times = known.times(known.arms["a"], 1, found=False)
    # Of 32 tokens and more, which nothing measures
    times._times[5:] = [100 * time for time in times._times[5:]]
    plan = known.plan(1, 0, False)
    assert plan.length == 12 and plan.ends.survival < 0.99**12


def test_a_disturbance_does_not_end_drafting_for_good():
    known = bandit((1.0, 1.05), 8, a=(0.8, 0.2, 0.8), b=(0.8, 0.4, 0.6))
    seconds = {"a": 0.2, "b": 0.4}
    right = {"a": 0.8, "b": 0.8}
    assert None not in drafted(known, 4, right, seconds)[1:]  # the first gives the unit of times
    drafted(known, 100, right, seconds, slowness=5.0)
    assert drafted(known, 40, right, seconds, slowness=5.0).count(None) > 25  # few are tried again
    drafted(known, 3500, right, seconds)
    assert drafted(known, 100, right, seconds).count(None) < 10


@pytest.mark.parametrize(
    "gain, least, most",
    [(4.0, 0.98, 1.0), (1.5, 0.98, 1.0), (1.02, 0.9, 0.95), (0.9, 0.03, 0.08), (0.5, 0.0, 0.02)],
)
def test_steps_look_for_drafts_where_that_gains_and_else_rarely(gain, least, most):
    """The share of steps that look for drafts, if these give so many tokens in a plain step's
    time.
    """
    known = bandit()
    looks = []
    for _ in range(1000):
        step = known.next_step(2)
        looks.append(step.looks_up)
        step.verified = 4 if step.looks_up else 2
        step.tokens = 2
        known.observe(step, 1.0 / gain if step.looks_up else 1.0)
    assert all(looks[1:8]) and least <= sum(looks[100:]) / 900 <= most


@pytest.mark.parametrize("lookups", [1.5, 0.8])
@pytest.mark.parametrize("drafter", [1.5, 0.8])
def test_lookups_and_drafters_are_judged_apart(lookups, drafter):
    """Each gives so many tokens in a plain step's time; every third step finds lookups."""
    known = bandit(a=(0.5, 0.2, 1.0))
    wanted = Counter[str]()
    for turn in range(3000):
        step = known.next_step(1)
        step.verified = 1
        step.tokens = 1
        seconds = 1.0
        if step.looks_up and turn % 3 == 0:
            step.verified = 4
            seconds /= lookups
        elif step.tries_arms:
            step.arm = known.arms["a"]
            step.verified = 4
            seconds /= drafter
        known.observe(step, seconds)
        wanted.update(["lookups"] * step.looks_up + ["drafter"] * step.tries_arms)
    # At a loss of a fifth, one step in 50 tries
    for name, gain in {"lookups": lookups, "drafter": drafter}.items():
        share = wanted[name] / 3000
        assert share > 0.9 if gain > 1 else share < 0.1


def adaptive(backend, exits=EXITS):
    return drafter_for(DrafterSetup(backend, DecodingConfig("adaptive", exits=exits)))


def knowing(backend, **profile):
    """With the exits alone, and without a clock."""
    drafter = adaptive(backend)
    drafters = {name: drafter._drafters[name] for name in ("exit 2", "exit 4")}
    setup = DrafterSetup(
        backend, DecodingConfig("adaptive", exits=EXITS, profile=DraftProfile(**profile))
    )
    drafter.bandit = new_bandit(setup, drafters)
    drafter._bandit_for = lambda configs: drafter.bandit
    drafter._by_clock = False
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
    "acceptance, passes, ids, expected",
    [
        ((0.5, 0.99), (1.0, 1.0), [5, 6, 7], "exit 4"),
        ((0.99, 0.99), (1.0, 1.0), [5, 6, 7], "exit 2"),
        ((0.1, 0.1), (1, 2), [5, 6, 7], "plain"),
        ((0.1, 0.1), (1.0, 1.0), REPEATED, "lookup"),
        ((0.1, 0.1), (1, 9), REPEATED, "plain"),
    ],
)
def test_it_drafts_by_what_promises_most(acceptance, passes, ids, expected):
    backend = backend_of("generic")
    drafts = {"exit 2": 0.3, "exit 4": 0.6}
    by_exit = dict(zip(drafts, acceptance, strict=True))
    assert (
        source_of(knowing(backend, acceptance=by_exit, drafts=drafts, passes=passes), backend, ids)
        == expected
    )


def test_a_profile_may_hold_exits_that_are_never_right_and_passes_whose_rows_are_free():
    backend = backend_of("generic")
    known = knowing(backend, acceptance={"exit 2": 0.0, "exit 4": 0.5}, passes=(1.0, 0.9)).bandit
    assert known._ends(known.arms["exit 2"], False, 1.0, 4).survival == 1.0
    assert known.passes.time_of(10_000) == known.passes.time_of(1) == pytest.approx(1.0)


def test_it_turns_away_from_what_is_rejected():
    backend = backend_of("generic")
    acceptance = {"exit 2": 0.9, "exit 4": 0.9}
    drafts = {"exit 2": 0.3, "exit 4": 0.5}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.3))
    seen = []
    for _ in range(120):
        seen.append(source_of(drafter, backend, [5, 6, 7], [1]))  # nothing is ever accepted
    assert seen[0] == "exit 2" and "exit 4" in seen and seen[-1] == "plain"


def test_lookups_learn_without_being_used():
    backend = backend_of("generic")
    acceptance = {"exit 2": 0.99, "exit 4": 0.1}
    drafts = {"exit 2": 0.01, "exit 4": 0.2}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.0))
    acceptance = drafter.bandit.lookup_acceptance(False, 16)
    before = acceptance.means()[0]
    for _ in range(5):
        # The repetition does not go on
        assert source_of(drafter, backend, REPEATED, [66]) in ("exit 2", "lookup")
    assert acceptance.means()[0] < before


def test_a_lookup_counts_little_where_the_text_went_on_in_several_ways():
    backend = backend_of("generic")
    known = {
        "acceptance": {"exit 2": 0.7, "exit 4": 0.1},
        "drafts": {"exit 2": 0.1, "exit 4": 0.2},
        "passes": (1.0, 1.06),
    }
    frame = [*range(5, 20)]
    assert (
        source_of(knowing(backend, **known), backend, [*frame, 20, 21, *frame, 20, 21, *frame])
        == "lookup"
    )
    assert (
        source_of(knowing(backend, **known), backend, [*frame, 30, 31, *frame, 20, 21, *frame])
        == "exit 2"
    )


def test_what_was_learnt_is_kept_for_the_next_greedy_output_only():
    backend = backend_of("native")
    first = adaptive(backend)
    second = adaptive(backend)
    assert first.bandit is second.bandit
    assert set(first.bandit.arms) == {"exit 2", "exit 4", "int8 exit 2", "int8 exit 4", "int8"}
    # Its outputs could depend on what drafts, so that they must not depend on the clock
    generic = backend_of("generic")
    others = [adaptive(generic, ()) for _ in range(2)]
    assert others[0].bandit is not others[1].bandit and not others[0]._by_clock


def test_a_pause_of_the_caller_changes_no_later_choice(monkeypatch):
    """A clock moves by 1/1024 s whenever it is read, and by 3 s between two steps of the eleventh
    answer.
    """
    config = DecodingConfig("adaptive", max_new_tokens=60, exits=EXITS)
    now = 0.0

    def clock():
        nonlocal now
        now += 1 / 1024
        return now

    def chosen(pause):
        nonlocal now
        model = tiny_model(dtype=torch.float32, **WIDE)
        drafters = []
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
    backend = backend_of("packed")
    profile = DraftProfile({"exit 2": 0.4, "int8 exit 4": 0.7})
    drafters = {
        name: drafter
        for name, drafter in adaptive(backend)._drafters.items()
        if name.startswith("int8")
    }
    setup = DrafterSetup(backend, DecodingConfig("adaptive", profile=profile))
    arms = new_bandit(setup, drafters).arms
    found = {name: arm.acceptance.means()[0] for name, arm in arms.items()}
    assert found == {"int8": 0.95, "int8 exit 2": pytest.approx(0.38), "int8 exit 4": 0.7}
    assert {name: arm.calibration.power for name, arm in arms.items()} == {
        "int8": 3,
        "int8 exit 2": 1,
        "int8 exit 4": 1,
    }


def test_without_trained_exits_a_copy_drafts_with_all_its_layers():
    backend = backend_of("native")
    assert list(adaptive(backend, ()).bandit.arms) == ["int8"]
