"""One output and its times; a task measured by several methods, interleaved."""

import math
from dataclasses import replace

import pytest
import torch
from evaluating import NEW_TOKENS, TOO_LONG, outputs_of, own_answers, task_of, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure import runs
from layerskip_core.evaluation.measure.runs import Progress, measure_interleaved, measure_prompt
from layerskip_core.evaluation.outputs import Output, Outputs
from layerskip_core.evaluation.results import Step

PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
DRAFTED = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)


def collect(events):
    """(progress events, what the generator returns)."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            return seen, end.value


def test_an_output_is_what_transformers_generates():
    loaded = tiny_loaded()
    prompt = own_answers().examples[0].prompt
    ids = loaded.encode_prompt(prompt)
    generated = loaded.backend.model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[
        0, len(ids) :
    ].tolist()
    plain, drafted = measure_prompt(loaded, prompt, PLAIN), measure_prompt(loaded, prompt, DRAFTED)
    assert list(plain.ids) == list(drafted.ids) == generated
    assert plain.text == loaded.tokenizer.decode(generated, skip_special_tokens=True)
    assert [step.tokens for step in plain.steps] == [1] * len(generated)
    assert sum(step.tokens for step in drafted.steps) == drafted.stats.new_tokens == len(generated)
    assert drafted.stats.rounds == len(drafted.steps) - 1
    assert all(step.seconds > 0 for step in drafted.steps)


def test_times_per_token():
    # 1 + 4 + 1 + 2 tokens in 1.0 + 0.8 + 2.0 + 1.0 seconds.
    outputs = outputs_of([(1, 1.0), (4, 0.8)], [(1, 2.0), (2, 1.0)])
    assert outputs.times.seconds_per_token == pytest.approx(4.8 / 8)
    assert outputs.decode_times.seconds_per_token == pytest.approx(1.8 / 6)
    assert outputs.first_token_seconds == 1.5
    # Shares: four tokens of 0.2 s, two of 0.5 s.
    assert outputs.token_seconds(0.5) == pytest.approx(0.2)
    assert outputs.token_seconds(0.95) == pytest.approx(0.5)


def test_without_tokens_times_are_nan():
    outputs = outputs_of([(1, 1.0)])
    assert math.isnan(outputs.decode_times.seconds_per_token)
    assert math.isnan(outputs.token_seconds(0.5))
    assert math.isnan(Outputs((Output(error="x"),)).times.seconds_per_token)


def test_identical_outputs_counts_samples_that_the_baseline_answered():
    steps = [(1, 1.0)]
    baseline = outputs_of(steps, steps, steps, ids=((1,), (2,), (3,)))
    assert outputs_of(steps, steps, steps, ids=((1,), (2,), (4,))).identical_outputs(baseline) == pytest.approx(2 / 3)
    failed = Outputs((*baseline.each[:2], Output(error="too long")))
    assert baseline.identical_outputs(failed) == 1.0
    assert failed.identical_outputs(baseline) == pytest.approx(2 / 3)


def test_the_order_changes_and_every_setting_answers_every_prompt(monkeypatch):
    calls = []

    def recorded(loaded, prompt, config):
        calls.append((prompt, config.exit_layer))
        return Output((config.exit_layer or 0,), steps=(Step(1, 1.0),))

    monkeypatch.setattr(runs, "measure_prompt", recorded)
    settings = [DecodingConfig("early-exit", layer) for layer in (1, 2, 3)]
    task = own_answers()
    prompts = [example.prompt for example in task.examples]
    progress, outputs = collect(measure_interleaved(None, task.examples, settings, repeats=2))
    assert calls[:3] == [(prompts[0], 1), (prompts[0], 2), (prompts[0], 3)]  # warm-up
    orders = [[layer for _, layer in calls[start : start + 3]] for start in range(3, len(calls), 3)]
    assert orders == [[1, 2, 3], [2, 1, 3], [3, 1, 2], [2, 1, 3], [3, 1, 2], [1, 3, 2]]
    assert [prompt for prompt, _ in calls[3::3]] == prompts * 2
    assert [[output.ids for output in measured.each] for repeats in outputs for measured in repeats] == [
        [(layer,)] * 3 for layer in (1, 1, 2, 2, 3, 3)
    ]
    assert progress == [Progress(done, 6, "prompts") for done in range(1, 7)]


def test_a_prompt_that_fails_is_recorded_and_the_others_go_on():
    loaded, task = tiny_loaded(), own_answers()
    _, outputs = collect(measure_interleaved(loaded, [TOO_LONG, task.examples[0]], [PLAIN, DRAFTED]))
    for (measured,) in outputs:
        (failure,) = measured.failures
        assert failure.sample == 0
        assert "the prompt must be at most 127 tokens" in failure.error
        assert measured.texts == ["", task.examples[0].completion]


def test_the_samples_of_the_largest_seed_have_seeds_of_their_own():
    loaded, task = tiny_loaded(), own_answers()
    drawn = replace(PLAIN, temperature=1.0, seed=2**32 - 1)
    _, ((outputs,),) = collect(measure_interleaved(loaded, [task.examples[0]] * 3, [drawn]))
    assert outputs.failures == () and len(set(outputs.texts)) == 3
    first = replace(PLAIN, temperature=1.0, seed=0)
    assert outputs.texts[1] == measure_prompt(loaded, task.examples[0].prompt, first).text


def test_nothing_but_failures_is_an_error():
    with pytest.raises(LayerSkipError, match=r"none of the 1 prompts could be answered; the first: the prompt must"):
        collect(measure_interleaved(tiny_loaded(), task_of(TOO_LONG).examples, [PLAIN]))
