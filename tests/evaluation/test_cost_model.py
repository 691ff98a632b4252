"""The cost model: exact simulation of rounds, pass times from the real loop, and the arithmetic on them."""

import json
import shutil

import pytest
from evaluating import NEW_TOKENS, TOO_LONG, collect, own_answers, tiny_loaded

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.evaluation.measure import measure_prompt
from layerskip_core.evaluation.measure.cost_model import (
    PassTimes,
    agreement,
    averages,
    draft_profile,
    interpolated,
    predict,
    prediction_of,
    simulate,
    timed_part,
    timed_visits,
)
from layerskip_core.evaluation.results import Result

EOS = frozenset({9})
PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
SETTING = DecodingConfig("self-speculative", 5, 3)


def counts(stats):
    """Drafts, accepted ones, rounds, and steps without drafts."""
    return stats.drafted, stats.accepted, stats.rounds, stats.steps_by_drafter.get("plain", 0)


@pytest.mark.parametrize(("new_tokens", "drafts"), [(1, 3), (2, 8), (5, 1), (NEW_TOKENS, 1), (NEW_TOKENS, 3), (NEW_TOKENS, 8)])
@pytest.mark.parametrize("exit_layer", [2, 5])
def test_simulated_rounds_are_the_real_ones(exit_layer, new_tokens, drafts):
    loaded = tiny_loaded()
    for example in own_answers().examples:
        prompt = loaded.encode_prompt(example.prompt)
        output = list(measure_prompt(loaded, example.prompt, DecodingConfig("autoregressive", max_new_tokens=new_tokens)).ids)
        choices = agreement(loaded, prompt, output, [2, 4, 5])[exit_layer]
        found = simulate(choices, output, drafts, new_tokens, loaded.eos_ids)
        real = decode(
            loaded.backend, prompt, DecodingConfig("self-speculative", exit_layer, drafts, new_tokens), loaded.eos_ids
        )
        assert [token for [step] in real for token in step.ids] == output
        assert counts(found) == counts(real.stats)


def test_simulated_rounds_of_drafts_with_their_own_vocabulary(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    # The draft head scores half of the 300 tokens, in another order than the tokenizer's.
    (folder / "token_order.json").write_text(json.dumps(list(range(299, -1, -1))))
    packing = PackingConfig(draft_vocab=150)
    loaded = for_decoding(str(folder), packing=packing)
    prompt = loaded.encode_prompt("remind me to call mom")
    output = list(measure_prompt(loaded, "remind me to call mom", DecodingConfig("autoregressive", max_new_tokens=40)).ids)
    choices = agreement(loaded, prompt, output, [5])[5]
    assert min(choices) >= 150
    expected = simulate(choices, output, 3, 40, loaded.eos_ids)
    decoding = decode(loaded.backend, prompt, DecodingConfig("self-speculative", 5, 3, 40), loaded.eos_ids)
    assert [token for [step] in decoding for token in step.ids] == output
    assert counts(expected) == counts(decoding.stats) and expected.accepted > 0


@pytest.mark.parametrize(
    ("choices", "output", "drafts", "room", "rounds"),
    [
        # The first token is the prefill's. 2 3 right and 4 the target's; 5 6 right, and 7 where no draft has room.
        ([1, 2, 3, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], 2, 7, (4, 4, 2, 0)),
        # Never right: one token per round. The last but one has room for one draft, the last for none.
        ([0, 0, 0, 0], [1, 2, 3, 4], 2, 4, (3, 0, 2, 1)),
        # An accepted EOS ends the draft, and the output.
        ([1, 2, 9], [1, 2, 9], 2, 5, (2, 2, 1, 0)),
        # The drafts after a wrong one are assumed to end where the output ends.
        ([1, 0, 9], [1, 2, 9], 4, 9, (3, 1, 2, 0)),
        # A wrong EOS ends the draft, and is rejected.
        ([1, 9, 3, 4, 5], [1, 2, 3, 4, 5], 3, 5, (3, 2, 2, 0)),
        ([1], [1], 2, 5, (0, 0, 0, 0)),
    ],
)
def test_rounds_of_known_choices(choices, output, drafts, room, rounds):
    assert counts(simulate(choices, output, drafts, room, EOS)) == rounds


def test_pass_times_of_the_real_loop():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt("hi")
    part, setting = timed_part(loaded, prompt, [5] * 9), DecodingConfig("self-speculative", 2, 4)
    ((_, passes),) = next(timed_visits(loaded, [part], [setting])).items()
    assert min(passes) > 0
    for context in (40, 10_000):  # passes of 1 to 17 tokens after the context, as far as there is room
        passes = draft_profile(loaded, (), PackingConfig(), [5] * context).passes
        assert len(passes) == 17 and all(time > 0 for time in passes)
    for without_room in (timed_part(loaded, [5] * (loaded.backend.spec.context - 1), [5]), timed_part(loaded, prompt, [])):
        assert list(timed_visits(loaded, [without_room], [setting])) == [{}]


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (32, 0), (33, 0), (34, 1), (100, 34)])
def test_of_a_long_answer_the_middle_is_timed(tokens, start):
    ids, limit = timed_part(tiny_loaded(), [1, 2], list(range(10, 10 + tokens)))
    assert (ids, limit) == ([1, 2, *range(10, 10 + start)], tokens - start + 1)


def test_the_speed_of_known_rounds():
    # 3 answers with 30 tokens: 3 prefills of 0.5 s in all and 27 plain steps of 0.1 s, or 6 drafts, 3 rounds, 2 plain steps.
    rounds = DecodeStats(drafted=6, accepted=4, rounds=3, steps_by_drafter={"plain": 2})
    found = prediction_of(rounds, PassTimes(0.01, 0.19, 0.01, plain=0.1), prefill=0.5, tokens=30, answers=3)
    assert found.speedup == pytest.approx((0.5 + 2.7) / (0.5 + 0.06 + 0.6 + 0.2))


def test_times_that_were_disturbed_do_not_count():
    usual, disturbed = PassTimes(0.01, 0.2, 0.0, 0.1), PassTimes(0.5, 9.0, 3.0, 5.0)
    assert averages([usual] * 7 + [disturbed] + [usual] * 2) == pytest.approx(usual)


def test_times_between_those_of_shorter_and_longer_drafts():
    short, long = PassTimes(0.01, 0.2, 0.0, 0.1, length=2.0), PassTimes(0.02, 0.4, 0.1, 0.1, length=10.0)
    assert interpolated(4.0, [long, short]) == pytest.approx((0.0125, 0.25, 0.025, 0.1, 4.0))
    assert [interpolated(length, [long, short]) for length in (1.0, 2.0, 10.0, 12.0)] == [short, short, long, long]
    assert interpolated(3.0, [long]) == long


def test_prompts_that_fail_are_left_out():
    loaded, task = tiny_loaded(), own_answers(1)
    _, (_, alone, _) = collect(predict(loaded, task.examples, [SETTING], PLAIN))
    _, (_, found, _) = collect(predict(loaded, (TOO_LONG, *task.examples), [SETTING], PLAIN))
    assert found == alone


def test_a_profile_has_acceptance_and_times_of_the_exits_and_copies_that_drafted():
    def row(strategy, exit_layer=None, **changes):
        return Result(strategy, exit_layer, 2, {}, **changes)

    rows = (
        row("self-speculative", 2, acceptance_by_position=(0.5, 0.75), pass_times_ms={"draft": 0.5}),
        row("self-speculative", 6, draft_weights="int8", acceptance_by_position=(1.0, 0.5), pass_times_ms={"draft": 0.25}),
        row("lookup", acceptance_by_position=(0.25, 0.25)),
    )
    profile = draft_profile(tiny_loaded(), rows, PackingConfig(draft_vocab=9), [])
    # Of two drafts at exit 2 the second is compared in half of the rounds: (0.5 + 0.5 * 0.75) / 1.5 of those compared.
    expected = {"exit 2": pytest.approx(0.875 / 1.5), "int8": 0.75}
    assert profile == DraftProfile(expected, (), {"exit 2": 0.5, "int8": 0.25}, draft_vocab=9)
