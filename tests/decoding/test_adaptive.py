"""Adaptive drafting: what it chooses, and that it changes no output."""

from functools import cache

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, context_after, ids_of, native_or_skip, plainly, prompt_of

from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafters import DrafterSetup
from layerskip_core.decoding.drafters.knowledge import Acceptance, LinearTime, best_length, knowledge_of
from layerskip_core.decoding.engine import drafter_for
from layerskip_core.decoding.sampling import Sampler
from layerskip_core.model import TorchBackend, TransformersBackend

EXITS = (2, 4)


@cache
def backend_of(kind):
    if kind == "generic":
        return TransformersBackend(tiny_model())
    packing = PackingConfig(draft_weights=("int8",))
    if kind == "packed":
        return TorchBackend.of(tiny_model("llama", torch.float64, **WIDE), packing)
    return native_or_skip(tiny_model("llama", torch.float32, **WIDE), packing)


# --- the output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generic", "packed", "native"])
def test_the_output_is_that_of_plain_decoding(kind):
    backend = backend_of(kind)
    for length in (1, 30):
        for limit in (1, 2, 40):
            plain = plainly(backend, prompt_of(length), limit)
            config = DecodingConfig("adaptive", max_new_tokens=limit, num_draft_tokens=9, exits=EXITS)
            decoding = decode(backend, prompt_of(length), config)
            assert ids_of(decoding) == plain
            # The prompt's pass gives the first token; every later step gives its accepted drafts and one more.
            assert sum(decoding.stats.steps_by_drafter.values()) + decoding.stats.accepted == len(plain) - 1


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
    assert acceptance.chances == (pytest.approx(3 / 5), pytest.approx(2 / 5))  # the prior counts as four observations
    acceptance.compare([7, 8, 9], [7, 9])  # the same, by what the target said
    other = Acceptance(0.5, 0.5)
    other.observe(4, 1)
    other.observe(2, 1)
    assert acceptance.chances == other.chances
    for _ in range(200):
        acceptance.observe(2, 2)
    assert min(acceptance.chances) > 0.95
    acceptance.forget(6000)
    assert 0.5 < min(acceptance.chances) <= max(acceptance.chances) < 0.6


def test_an_option_learns_how_far_to_trust_a_probability():
    option = knowing(backend_of("generic"))._known.options["exit 2"]
    for _ in range(300):
        option.observe(2, 2, [0.5, 0.5])
    assert option.doubt < 0.05
    for _ in range(300):
        option.observe(1, 0, [0.5])
    assert option.doubt == pytest.approx(2.0, rel=0.05)
    option.observe(1, 0, [])
    assert option.doubt == pytest.approx(2.0, rel=0.05)


def test_times_are_fitted_by_a_line_that_follows_the_machine():
    times = LinearTime(1.0, 0.1)
    assert times.of(5) == pytest.approx(1.5)
    for n in (1, 3, 9, 4, 12, 2) * 40:
        times.observe(n, 2.0 + 0.5 * n)
    assert (times.fixed, times.each) == (pytest.approx(2.0, rel=0.05), pytest.approx(0.5, rel=0.05))
    times.observe(3, 1000.0)  # a disturbance counts as twice the time at most
    assert times.of(3) < 1.1 * 3.5
    for _ in range(300):
        times.observe(4, 8.0)
    assert times.of(4) == pytest.approx(8.0, rel=0.02) and times.each >= 0


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_times_of_one_length_only_keep_the_slope_that_was_known(factor):
    times, first = LinearTime(1.0, 0.1), LinearTime(1.0, 0.1)
    for _ in range(5000):
        times.observe(1, factor * first.of(1))
    assert [times.of(n) for n in (1, 2, 16)] == pytest.approx([factor * first.of(n) for n in (1, 2, 16)], rel=1e-3)


def test_no_part_of_a_time_is_negative():
    times = LinearTime(1.0, 0.1)
    for _ in range(200):
        times.observe(2, 2.0)
        times.observe(12, 24.0)  # a line through the two points has a fixed part of -2.4
    assert times.fixed == 0 and times.each == pytest.approx(2.0, rel=0.02)
    for _ in range(200):
        times.observe(2, 3.0)
        times.observe(12, 1.0)
    assert times.each == 0 and times.fixed == pytest.approx(2.0, rel=0.02)


def test_times_that_are_not_measured_for_long_move_back_to_what_was_known():
    times = LinearTime(1.0, 0.1)
    for n in (1, 2, 3, 4) * 10:
        times.observe(n, 5.0)
    times.forget(1, unit=2.0)
    assert 4.0 < times.of(4) < 5.0
    times.forget(1000, unit=2.0)
    assert (times.fixed, times.each) == (pytest.approx(2.0), pytest.approx(0.2))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("first", "later", "draft", "ahead"), [(0.9, 0.9, 0.2, 0), (0.5, 0.95, 0.1, 1), (0.99, 0.8, 0.05, 1), (0.1, 0.1, 0.3, 0)]
)
def test_the_best_length_maximises_tokens_per_time(first, later, draft, ahead, batch):
    """Against every length: 1 + a + a a' + ... tokens of each row, in passes of drafts and one of d + 1 tokens a row."""
    drafts, verify = LinearTime(0.02, draft), LinearTime(0.9, 0.1)
    slower = verify.of(batch) / verify.of(1)  # a pass of the draft side is slower for more rows, as one of the target is
    tokens = [1 + sum(first * later**place for place in range(length)) for length in range(17)]
    rates = {
        length: tokens[length] / (slower * drafts.of(length + ahead) + verify.of(batch * (length + 1)))
        for length in range(1, 17)
    }
    best = max(rates, key=rates.__getitem__)
    assert best_length((first, later), drafts, ahead, verify, batch, 16) == (pytest.approx(rates[best]), best)


def test_times_of_drafts_for_several_rows_count_as_those_for_one():
    known = knowing(backend_of("generic"), drafts={"exit 2": 0.2, "exit 4": 0.4}, passes=(1.0, 1.5))._known
    option = known.options["exit 2"]
    for _ in range(200):
        slower = option.verify.of(8) / option.verify.of(1)
        known.observe_round(option, 3, slower * 4 * 0.2, 8 * 4, option.verify.of(8 * 4))
    assert option.draft.of(4) == pytest.approx(4 * 0.2, rel=0.05)


def adaptive(backend, exits=EXITS):
    config = DecodingConfig("adaptive", exits=exits)
    return drafter_for(DrafterSetup(backend, Sampler(config, backend.device), config))


def knowing(backend, **profile):
    drafter = adaptive(backend)
    drafters = {name: drafter._drafters[name] for name in ("exit 2", "exit 4")}
    drafter._known, drafter._by_clock = knowledge_of(backend, drafters, DraftProfile(**profile), remembered=False), False
    return drafter


def source_of(drafter, backend, ids):
    with torch.inference_mode():
        draft = drafter.draft(context_after(backend, ids, 7), [7])
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
    backend, drafts = backend_of("generic"), {"exit 2": 0.1, "exit 4": 0.2}
    by_exit = dict(zip(drafts, acceptance, strict=True))
    assert source_of(knowing(backend, acceptance=by_exit, drafts=drafts, passes=passes), backend, ids) == expected


def test_a_profile_may_hold_exits_that_are_never_right_and_passes_whose_rows_are_free():
    backend = backend_of("generic")
    known = knowing(backend, acceptance={"exit 2": 0.0, "exit 4": 0.5}, passes=(1.0, 0.9))._known
    assert known.options["exit 2"].ends(1.0).survival == 1.0
    assert known.plain.of(10_000) == known.plain.of(1) == pytest.approx(1.0)


def test_few_steps_are_without_drafts_and_not_the_first():
    known = knowing(backend_of("generic"))._known
    assert [step for step in range(300) if known.wants_plain_step()] == [4, 132, 260]


def test_it_turns_away_from_what_is_rejected():
    backend = backend_of("generic")
    acceptance, drafts = {"exit 2": 0.9, "exit 4": 0.7}, {"exit 2": 0.2, "exit 4": 0.3}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.3))
    seen = []
    for _ in range(60):
        seen.append(source_of(drafter, backend, [5, 6, 7]))
        drafter.observe(0, drafter._draft.counts[0], [1])  # nothing is ever accepted
    assert seen[0] == "exit 2" and "exit 4" in seen and seen[-1] == "plain"


def test_a_disturbance_does_not_end_drafting_for_good():
    drafter = knowing(backend_of("generic"), drafts={"exit 2": 0.2, "exit 4": 0.4}, passes=(1.0, 1.05))
    known = drafter._known

    def drafted(rounds, slowness=1.0):
        """How many of the rounds drafted, while drafts take so many times as long as they should. Two of three are right."""
        count = 0
        for number in range(rounds):
            option, length, _ = drafter._plan(1, 8)
            drafting = 0.0 if option is None else slowness * (length + 1) * {"exit 2": 0.2, "exit 4": 0.4}[option.name]
            known.observe_round(option, length, drafting, length + 1, 1.0 + 0.05 * length)
            if option is not None:
                option.acceptance.observe(length, length if number % 3 else 0)
            count += option is not None
        return count

    assert drafted(2) == 2
    drafted(40, slowness=20.0)
    assert drafted(5) == 0  # plain steps, in which drafts are not timed
    drafted(300)
    assert drafted(20) == 20


def test_lookups_learn_without_being_used():
    backend = backend_of("generic")
    acceptance, drafts = {"exit 2": 0.99, "exit 4": 0.1}, {"exit 2": 0.01, "exit 4": 0.2}
    drafter = knowing(backend, acceptance=acceptance, drafts=drafts, passes=(1.0, 1.0))
    acceptance = drafter._known.acceptance_of_lookup(16)
    before = acceptance.chances[0]
    for _ in range(5):
        assert source_of(drafter, backend, REPEATED) in ("exit 2", "lookup")
        drafter.observe(0, drafter._draft.counts[0], [66])  # the repetition does not go on
    assert acceptance.chances[0] < before


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
    assert set(first._known.options) == {"exit 2", "exit 4", "int8 exit 2", "int8 exit 4", "int8"}
    generic = backend_of("generic")  # its outputs could depend on what drafts, so that they must not depend on the clock
    others = [adaptive(generic, ()) for _ in range(2)]
    assert others[0]._known is not others[1]._known and not others[0]._by_clock


def test_a_copy_at_an_exit_is_expected_to_be_right_nearly_as_often_as_the_exit():
    backend, profile = backend_of("packed"), DraftProfile({"exit 2": 0.4, "int8 exit 4": 0.7})
    drafters = {name: drafter for name, drafter in adaptive(backend)._drafters.items() if name.startswith("int8")}
    options = knowledge_of(backend, drafters, profile, remembered=False).options
    found = {name: option.acceptance.chances[0] for name, option in options.items()}
    assert found == {"int8": 0.95, "int8 exit 2": pytest.approx(0.38), "int8 exit 4": 0.7}
    assert {name: option.power for name, option in options.items()} == {
        "int8": 3,
        "int8 exit 2": 1,
        "int8 exit 4": 1,
    }


def test_without_trained_exits_a_copy_drafts_with_all_its_layers():
    backend = backend_of("native")
    assert list(adaptive(backend, ())._known.options) == ["int8"]
