"""Answers in batches equal those that every method gives to each prompt alone."""

import json
from dataclasses import replace

import pytest
import torch
from evaluating import NEW_TOKENS, TOO_LONG, own_answers, task_of, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure.baselines import load_baselines
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.runs import answer_in_batches, measure_prompt
from layerskip_core.evaluation.measure.sweep import sweep

PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
SPECULATIVE = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)
CONFIG = BenchConfig(
    "tiny", exit_layer=5, num_draft_tokens=3, repeats=1, batch_size=2, baselines=("transformers", "prompt-lookup", "no-reuse")
)


def collect(generator):
    """What a generator yields, and what it returns."""
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


@pytest.mark.parametrize("stop", [(), "of an answer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_method_answers_as_it_does_alone(dtype, stop):
    loaded, examples = tiny_loaded(dtype), own_answers(5).examples
    if stop:
        stop = (measure_prompt(loaded, examples[1].prompt, PLAIN).text[4:6],)
    plain = replace(PLAIN, stop=stop)
    settings = [
        plain,
        replace(plain, strategy="early-exit", exit_layer=5),
        replace(SPECULATIVE, stop=stop),
        *load_baselines(loaded, CONFIG, replace(SPECULATIVE, stop=stop)),
    ]
    progress, answers = collect(answer_in_batches(loaded, examples, settings, batch_size=2))
    assert [event.done for event in progress] == [2, 4, 5]
    for setting, batched in zip(settings, answers, strict=True):
        alone = [measure_prompt(loaded, example.prompt, setting) for example in examples]
        assert [(output.ids, output.text, output.finish_reason) for output in batched.each] == [
            (output.ids, output.text, output.finish_reason) for output in alone
        ]
        assert [output.stats.new_tokens for output in batched.each] == [len(output.ids) for output in alone]
    assert not stop or "stop" in [output.finish_reason for output in answers[3].each]  # transformers' own


def test_a_prompt_that_does_not_fit_fails_alone():
    loaded, (first, second) = tiny_loaded(), own_answers(2).examples
    settings = [PLAIN, *load_baselines(loaded, CONFIG, SPECULATIVE)[:1]]
    _, answers = collect(answer_in_batches(loaded, [first, TOO_LONG, second], settings, batch_size=3))
    for outputs in answers:
        assert [failure.sample for failure in outputs.failures] == [1]
        assert [outputs.each[sample].text for sample in (0, 2)] == [first.completion, second.completion]
    with pytest.raises(LayerSkipError, match="none of the 1 prompts could be answered"):
        collect(answer_in_batches(loaded, [TOO_LONG], settings, batch_size=2))


def test_a_bench_with_batches_differs_in_speed_only():
    task = own_answers(5)
    *_, alone = bench(tiny_loaded(), task, replace(CONFIG, batch_size=1))
    *_, batched = bench(tiny_loaded(), task, replace(CONFIG, timed=2))
    *_, untimed = bench(tiny_loaded(), task, replace(CONFIG, timed=0))
    for single, timed, quality in zip(alone.results, batched.results, untimed.results, strict=True):
        assert single.metrics == timed.metrics == quality.metrics
        assert single.identical_outputs == timed.identical_outputs == quality.identical_outputs
        assert timed.tokens_per_second > 0
        assert (quality.tokens_per_second, quality.speedup, quality.ttft_ms, quality.peak_memory_mb) == (None, None, None, None)
    assert (batched.config["batch_size"], batched.config["timed"]) == (2, 2)
    fixed = [
        [result.acceptance_rate for result in record.results if result.strategy == "self-speculative"]
        for record in (alone, batched, untimed)
    ]
    assert fixed[0] == fixed[1] == fixed[2] != [None]
    json.dumps(untimed.document(), allow_nan=False)


def test_a_sweep_with_batches_differs_in_speed_only():
    task = own_answers(5)
    config = SweepConfig("tiny", exits=(2, 5), specs=(3,))
    *_, alone = sweep(tiny_loaded(), task, config)
    *events, batched = sweep(tiny_loaded(), task, replace(config, batch_size=4, timed=2))
    for single, timed in zip(alone.results, batched.results, strict=True):
        assert (single.metrics, single.identical_outputs) == (timed.metrics, timed.identical_outputs)
        assert single.perplexity == timed.perplexity
        # Adaptive drafts depend on measured times.
        assert single.acceptance_rate == timed.acceptance_rate or single.strategy == "adaptive"
        assert timed.speedup > 0
    assert max(event.total for event in events if event.phase == "prompts") == 2


def test_a_task_with_a_hard_row_still_has_its_row_in_order():
    task = task_of(*own_answers(3).examples, TOO_LONG)
    *_, record = bench(tiny_loaded(), task, replace(CONFIG, baselines=(), timed=1))
    assert [failure.sample for failure in record.results[0].failures] == [3]
    assert record.results[0].metrics == {"exact_match": 0.75}
