"""The cost model: exact simulation of rounds, pass times from the real loop, and the arithmetic on them."""

import json
import shutil

import pytest
from evaluating import NEW_TOKENS, TOO_LONG, own_answers, task_of, tiny_loaded

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure.cost_model import (
    Prediction,
    Predictions,
    Rounds,
    agreement,
    predict,
    prediction_of,
    simulate,
)
from layerskip_core.evaluation.measure.pass_times import PassTimes, Stretch, averages, pass_times, plain_seconds, stretch_of
from layerskip_core.evaluation.measure.runs import measure_prompt

EOS = frozenset({9})
SETTING = DecodingConfig("self-speculative", 5, 3)


def collect(events):
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return seen, end.value


@pytest.mark.parametrize("new_tokens", [1, 2, 5, NEW_TOKENS])
@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("exit_layer", [2, 4, 5])
def test_simulated_rounds_are_the_real_ones(exit_layer, drafts, new_tokens):
    loaded = tiny_loaded()
    for example in own_answers().examples:
        prompt = loaded.encode_prompt(example.prompt)
        output = list(measure_prompt(loaded, example.prompt, DecodingConfig("autoregressive", max_new_tokens=new_tokens)).ids)
        choices = agreement(loaded, prompt, output, [2, 4, 5])[exit_layer]
        found = simulate(choices, output, drafts, new_tokens, loaded.eos_ids)
        real = decode(
            loaded.backend, prompt, DecodingConfig("self-speculative", exit_layer, drafts, new_tokens), loaded.eos_ids
        )
        assert [token.id for step in real for token in step] == output
        stats = real.stats
        assert (found.drafted, found.accepted, found.rounds) == (stats.drafted, stats.accepted, stats.rounds)


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
    assert [token.id for step in decoding for token in step] == output
    stats = decoding.stats
    assert stats.accepted > 0
    assert (expected.drafted, expected.accepted, expected.rounds) == (stats.drafted, stats.accepted, stats.rounds)


@pytest.mark.parametrize(
    ("choices", "output", "drafts", "room", "rounds"),
    [
        # The first token is the prefill's. 2 3 right and 4 the target's; 5 6 right, and 7 where no draft has room.
        ([1, 2, 3, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], 2, 7, Rounds(4, 4, 2, 0)),
        # Never right: one token per round. The last but one has room for one draft, the last for none.
        ([0, 0, 0, 0], [1, 2, 3, 4], 2, 4, Rounds(3, 0, 2, 1)),
        # An accepted EOS ends the draft, and the output.
        ([1, 2, 9], [1, 2, 9], 2, 5, Rounds(2, 2, 1, 0)),
        # The drafts after a wrong one are assumed to end where the output ends.
        ([1, 0, 9], [1, 2, 9], 4, 9, Rounds(3, 1, 2, 0)),
        # A wrong EOS ends the draft, and is rejected.
        ([1, 9, 3, 4, 5], [1, 2, 3, 4, 5], 3, 5, Rounds(3, 2, 2, 0)),
        ([1], [1], 2, 5, Rounds()),
    ],
)
def test_rounds_of_known_choices(choices, output, drafts, room, rounds):
    assert simulate(choices, output, drafts, room, EOS) == rounds


def test_the_time_of_rounds():
    # 6 drafts of 2 ms, 3 rounds of 10 + 1 ms, 2 plain steps of 8 ms.
    seconds = Rounds(6, 4, 3, 2).seconds(PassTimes(0.002, 0.010, 0.001, plain=0.008))
    assert seconds == pytest.approx(0.012 + 0.033 + 0.016)
    assert Rounds(6, 4, 3, 2).acceptance_rate == pytest.approx(4 / 6)
    assert Rounds().acceptance_rate == 0.0
    assert Rounds(6, 4, 3, 2) + Rounds(1, 1, 1, 1) == Rounds(7, 5, 4, 3)


def test_pass_times_of_the_real_loop():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt("hi")
    stretch, setting = stretch_of(prompt, [5] * 9), DecodingConfig("self-speculative", 2, 4)
    (times,) = pass_times(loaded, stretch, setting, plain_seconds(loaded, stretch))
    assert min(times.draft, times.verify, times.other, times.plain) > 0
    for without_room in (stretch_of([5] * (loaded.backend.max_positions - 1), [5]), stretch_of(prompt, [])):
        assert plain_seconds(loaded, without_room) is None
        assert pass_times(loaded, without_room, setting, 0.1) == []


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (32, 0), (33, 0), (34, 1), (100, 34)])
def test_of_a_long_answer_the_middle_is_timed(tokens, start):
    stretch = stretch_of([1, 2], list(range(10, 10 + tokens)))
    assert stretch == Stretch([1, 2, *range(10, 10 + start)], tokens - start)


def test_the_speed_of_known_rounds():
    # 3 answers of 30 tokens, 27 of them after the prefills of 0.5 s: plainly at 0.1 s each, or in the rounds above.
    found = prediction_of(Rounds(6, 4, 3, 2), PassTimes(0.01, 0.2, 0.0, plain=0.1), prefill=0.5, tokens=30, answers=3)
    assert found.tokens_per_second == pytest.approx(30 / (0.5 + 0.06 + 0.6 + 0.2))
    assert found.speedup == pytest.approx((0.5 + 2.7) / (0.5 + 0.06 + 0.6 + 0.2))


def test_times_that_were_disturbed_do_not_count():
    usual, disturbed = PassTimes(0.01, 0.2, 0.0, 0.1), PassTimes(0.5, 9.0, 3.0, 5.0)
    means = averages([usual] * 7 + [disturbed] + [usual] * 2)
    assert (means.draft, means.verify, means.rest, means.plain) == pytest.approx((0.01, 0.2, 0.2, 0.1))


def test_the_best_predictions_come_first():
    slow, fast, middle = (DecodingConfig("self-speculative", 2, drafts) for drafts in (1, 2, 3))
    speedups = {slow: 5.0, fast: 9.0, middle: 7.0}
    settings = {setting: Prediction(Rounds(), PassTimes(1, 1, 0, 1), 1.0, speed) for setting, speed in speedups.items()}
    assert Predictions({}, settings, []).promising(2) == [fast, middle]


def test_prompts_that_fail_are_left_out_and_nothing_but_failures_is_an_error():
    loaded, task = tiny_loaded(), own_answers(1)
    _, alone = collect(predict(loaded, task.examples, [SETTING], NEW_TOKENS))
    _, found = collect(predict(loaded, (TOO_LONG, *task.examples), [SETTING], NEW_TOKENS))
    assert found.agreement == alone.agreement
    with pytest.raises(LayerSkipError, match="none of the 1 prompts could be answered"):
        collect(predict(loaded, task_of(TOO_LONG).examples, [SETTING], NEW_TOKENS))
