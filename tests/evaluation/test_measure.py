"""Outputs, timed one by one in turn or in batches, and where those of two settings differ."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, native_or_skip
from evaluating import NEW_TOKENS, TOO_LONG, collect, own_answers, task_of, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure import (
    Measured,
    Progress,
    differences,
    first_difference,
    measure,
    measure_prompt,
)
from layerskip_core.evaluation.measure.bench import bench, load_baselines
from layerskip_core.evaluation.results import Difference, Output, Step

PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
DRAFTED = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)
ONE_BY_ONE = SweepConfig("tiny")
DRAFTS = {"exit_layer": 5, "num_draft_tokens": 3}
BASELINES = ("transformers", "prompt-lookup", "no-reuse")
CONFIG = BenchConfig("tiny", generation=DRAFTS, repeats=1, batch_size=2, baselines=BASELINES)


def test_an_output_is_what_transformers_generates():
    loaded, prompt = tiny_loaded(), own_answers().examples[0].prompt
    ids = torch.tensor([loaded.encode_prompt(prompt)])
    generated = loaded.backend.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    plain, drafted = measure_prompt(loaded, prompt, PLAIN), measure_prompt(loaded, prompt, DRAFTED)
    assert list(plain.ids) == list(drafted.ids) == generated
    assert plain.text == loaded.tokenizer.decode(generated, skip_special_tokens=True)
    assert [step.tokens for step in plain.steps] == [1] * len(generated)
    assert sum(step.tokens for step in drafted.steps) == drafted.stats.new_tokens == len(generated)
    assert drafted.stats.rounds == len(drafted.steps) - 1
    assert all(step.seconds > 0 for step in drafted.steps)
    assert plain.peak_memory_mb is None or 50 < plain.peak_memory_mb < 100_000  # None where the system cannot reset it


def test_the_order_changes_and_every_setting_answers_every_prompt():
    calls, task = [], own_answers()

    def recorded(loaded, prompt_ids, setting):
        calls.append((tuple(prompt_ids), setting.exit_layer))
        return Output((setting.exit_layer,), steps=(Step(1, 1.0),))

    settings = [DecodingConfig("fake", layer) for layer in (1, 2, 3)]
    events = measure(tiny_loaded(), task, settings, ONE_BY_ONE, repeats=2, baselines={"fake": recorded})
    progress, measured = collect(events)
    prompts = [tuple(tiny_loaded().encode_prompt(example.prompt)) for example in task.examples]
    assert calls[:3] == [(prompts[0], 1), (prompts[0], 2), (prompts[0], 3)]  # warm-up
    orders = [[layer for _, layer in calls[start : start + 3]] for start in range(3, len(calls), 3)]
    assert orders == [[1, 2, 3], [2, 1, 3], [3, 1, 2], [2, 1, 3], [3, 1, 2], [1, 3, 2]]
    assert [prompt for prompt, _ in calls[3::3]] == prompts * 2
    assert [[output.ids for output in repeat] for each in measured for repeat in each.repeats] == [
        [(layer,)] * 3 for layer in (1, 1, 2, 2, 3, 3)
    ]
    assert progress == [Progress(done, 6, "prompts") for done in range(1, 7)]


def test_the_samples_of_the_largest_seed_have_seeds_of_their_own():
    loaded, task = tiny_loaded(), own_answers(1)
    drawn = replace(PLAIN, temperature=1.0, seed=2**32 - 1)
    _, (measured,) = collect(measure(loaded, task_of(*task.examples * 3), [drawn], ONE_BY_ONE))
    assert None not in measured.texts and len(set(measured.texts)) == 3
    assert measured.texts[1] == measure_prompt(loaded, task.examples[0].prompt, replace(drawn, seed=0)).text


@pytest.mark.parametrize(("dtype", "stop"), [(torch.float64, "of an answer"), (torch.float32, ())])
def test_every_setting_answers_in_a_batch_as_it_does_alone(dtype, stop):
    loaded, task = tiny_loaded(dtype), own_answers(5)
    if stop:
        stop = (measure_prompt(loaded, task.examples[1].prompt, PLAIN).text[4:6],)
    plain, drafted = replace(PLAIN, stop=stop), replace(DRAFTED, stop=stop)
    baselines = load_baselines(loaded, CONFIG, drafted)
    settings = [plain, replace(plain, strategy="early-exit", exit_layer=5), drafted]
    settings += [replace(drafted, strategy=name) for name in baselines]
    _, alone = collect(measure(loaded, task, settings, ONE_BY_ONE, baselines=baselines))
    progress, batched = collect(measure(loaded, task, settings, replace(CONFIG, timed=0), baselines=baselines))
    assert progress == [Progress(done, 5, "answers") for done in (2, 4, 5)]
    for single, together in zip(alone, batched, strict=True):
        assert [(output.ids, output.text, output.finish_reason) for output in together.answers] == [
            (output.ids, output.text, output.finish_reason) for output in single.answers
        ]
        assert [output.stats.new_tokens for output in together.answers] == [len(output.ids) for output in single.answers]
    assert not stop or "stop" in [output.finish_reason for output in batched[3].answers]  # transformers' own


@pytest.mark.parametrize("config", [ONE_BY_ONE, replace(CONFIG, batch_size=3)])
def test_a_prompt_that_does_not_fit_fails_alone(config):
    loaded, (first, second) = tiny_loaded(), own_answers(2).examples
    baselines = load_baselines(loaded, CONFIG, DRAFTED)
    settings = [PLAIN, DRAFTED, replace(DRAFTED, strategy="transformers")]
    _, measured = collect(measure(loaded, task_of(first, TOO_LONG, second), settings, config, baselines=baselines))
    for each in measured:
        assert each.texts == [first.completion, None, second.completion]
        assert "the prompt must be at most 127 tokens" in each.answers[1].error
    with pytest.raises(LayerSkipError, match="none of the 1 prompts could be answered; the first: the prompt must"):
        collect(measure(loaded, task_of(TOO_LONG), settings[:1], config))


def test_a_bench_with_batches_differs_in_speed_only():
    task = task_of(*own_answers(4).examples, TOO_LONG)
    *_, alone = bench(tiny_loaded(), task, replace(CONFIG, batch_size=1, timed=None))
    *_, batched = bench(tiny_loaded(), task, replace(CONFIG, timed=2))
    *_, untimed = bench(tiny_loaded(), task, replace(CONFIG, timed=0))
    assert [failure.sample for failure in batched.results[0].failures] == [4]
    assert batched.results[0].metrics == {"exact_match": 0.8}
    for single, timed, quality in zip(alone.results, batched.results, untimed.results, strict=True):
        assert single.metrics == timed.metrics == quality.metrics
        assert single.identical_outputs == timed.identical_outputs == quality.identical_outputs
        assert timed.tokens_per_second > 0
        assert (quality.tokens_per_second, quality.speedup, quality.ttft_ms, quality.peak_memory_mb) == (None, None, None, None)
        if single.strategy == "self-speculative":
            assert single.acceptance_rate == timed.acceptance_rate == quality.acceptance_rate > 0
    assert (batched.config["batch_size"], batched.config["timed"]) == (2, 2)
    json.dumps(untimed.document(), allow_nan=False)


def test_measurements_of_several_tasks_add_up():
    mine = Measured(PLAIN, [Output((1,)), Output((2,))], [[Output((3,))]], (Difference(1, 0, 0.5),))
    both = mine + mine
    assert [output.ids for output in both.answers] == [(1,), (2,), (1,), (2,)] and len(both.repeats[0]) == 2
    assert both.differences == (Difference(1, 0, 0.5), Difference(3, 0, 0.5))


@pytest.mark.parametrize(
    ("ids", "expected", "position"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2), ([], [5], 0)],
)
def test_first_difference(ids, expected, position):
    assert first_difference(ids, expected) == position


def test_a_difference_is_located_with_the_gap_between_the_targets_two_best_logits_there():
    loaded, task = tiny_loaded(), own_answers()
    plain = [measure_prompt(loaded, example.prompt, PLAIN) for example in task.examples]
    ids = plain[1].ids
    changed = [plain[0], Output((*ids[:4], ids[4] + 1, *ids[5:])), plain[2]]
    (difference,) = differences(loaded, task.examples, changed, plain)
    assert (difference.sample, difference.position) == (1, 4)
    prefix = loaded.encode_prompt(task.examples[1].prompt) + list(ids[:4])
    best, second = sorted(loaded.backend.model(torch.tensor([prefix])).logits[0, -1].tolist(), reverse=True)[:2]
    assert difference.top2_gap == pytest.approx(best - second)
    assert differences(loaded, task.examples, plain, plain) == ()


@pytest.mark.parametrize("remember", [0, 1000])
def test_lookups_find_the_answers_of_their_own_setting_and_repeat_only(remember):
    """Two settings, two repeats and the same prompt twice: only the second prompt's answer has been seen before."""
    backend = native_or_skip(tiny_model("llama", torch.float32, vocab_size=300, **WIDE))
    loaded, example = replace(tiny_loaded(), backend=backend), own_answers(1).examples[0]
    settings = [DecodingConfig("lookup", max_new_tokens=40, num_draft_tokens=8)] * 2
    config = BenchConfig("tiny", remember=remember)
    _, measured = collect(measure(loaded, task_of(example, example), settings, config, repeats=2))
    drafted = [[output.stats.accepted for output in outputs] for each in measured for outputs in each.repeats]
    assert drafted == [drafted[0]] * 4
    assert (drafted[0][1] > drafted[0][0]) == bool(remember)
    assert len({output.ids for each in measured for outputs in each.repeats for output in outputs}) == 1
