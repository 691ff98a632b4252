"""Scores of known texts, and outputs, timed one by one in turn or in batches."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, native_or_skip
from evaluating import NEW_TOKENS, TOO_LONG, collect, own_answers, task_of, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.data import Example
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation import metrics
from layerskip_core.evaluation.intervals import metric
from layerskip_core.evaluation.measure.baselines import load_baselines
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.measuring import (
    Progress,
    differences,
    measure,
    measure_prompt,
)
from layerskip_core.evaluation.metrics import (
    ROUGES,
    Losses,
    exact_match,
    pass_at_k,
    reference_losses,
    rouge,
    scores_by_exit,
    text_losses,
)
from layerskip_core.evaluation.results import Output, Step


def test_scores_of_known_texts():
    answers = [" a b ", "c", "d", "e"]
    assert exact_match(answers, [["a b"], ["c"], ["D"], ["f", " e"]]) == [1, 1, 0, 1]
    assert exact_match(["a  b\n c"], [["a b c"]]) == [0]
    assert exact_match(["a  b\n c"], [["a b c"]], fold_whitespace=True) == [1]
    two = rouge(["the cat sat", "a b"], [["the cat sat down"], ["b a"]], ["rouge2"])["rouge2"]
    assert two == pytest.approx([0.8, 0.0])
    # Words: 3 of 3, of 4. The longest common subsequence of "sat the cat" is "the cat": 2 of 3, of
    # 4. The stem counts.
    scores = rouge(["sat the cats"], [["the cat sat down"]], ROUGES)
    found = [*scores["rouge1"], *scores["rouge2"], *scores["rougeL"]]
    assert found == pytest.approx([6 / 7, 0.4, 4 / 7])
    shares = pass_at_k([[True, False, True, False, False], [False] * 5, [True] * 5], [1, 2, 4])
    found = [*shares["pass@1"], *shares["pass@2"], *shares["pass@4"]]
    assert found == pytest.approx([0.4, 0, 1, 0.7, 0, 1, 1, 0, 1])


EXAMPLE = Example(
    "remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]"
)


def test_losses_of_a_text_are_those_of_windows_that_cover_it(monkeypatch):
    monkeypatch.setattr(metrics, "_WINDOW_TOKENS", 20)
    loaded = tiny_loaded()
    text = " ".join([EXAMPLE.completion] * 4)
    ids = loaded.tokenizer(text)["input_ids"]
    windows = list(text_losses(loaded, text, 0, [2, 6]))
    assert loaded.tokenizer("")["input_ids"] == []  # so that a window's first token has no loss
    assert [window.tokens for window in windows] == [19] * (len(ids) // 20)
    assert list(text_losses(loaded, text, 1, [2, 6])) == windows[:1]
    more = text + " call mom"
    rest = len(loaded.tokenizer(more)["input_ids"]) % 20
    found = [window.tokens for window in text_losses(loaded, more, 0, [2, 6])]
    assert found == [19] * len(windows) + [rest - 1]
    found = [window.tokens for window in text_losses(loaded, more, 100, [2, 6])]
    assert found == [19] * len(windows)  # whole ones only
    second = torch.tensor([ids[20:40]])
    logits = loaded.backend.model(second, use_cache=False).logits[0]
    expected = cross_entropy(logits[:-1], second[0, 1:], reduction="sum").item()
    assert windows[1].nats[6] == pytest.approx(expected, rel=1e-5)


def test_losses_equal_those_of_the_truncated_model_on_the_reference_only():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt(EXAMPLE.prompt)
    reference = [*loaded.tokenizer(EXAMPLE.completion)["input_ids"], loaded.tokenizer.eos_token_id]
    tokens, nats = reference_losses(loaded, EXAMPLE, [6, 2])
    assert tokens == len(reference) and list(nats) == [2, 6]
    model = loaded.backend.model
    layers = model.model.layers
    for exit_layer in (2, 6):
        model.model.layers = layers[:exit_layer]
        try:
            logits = model(torch.tensor([prompt + reference]), use_cache=False).logits[0]
        finally:
            model.model.layers = layers
        predicting = logits[len(prompt) - 1 : -1]
        expected = cross_entropy(predicting, torch.tensor(reference), reduction="sum").item()
        assert nats[exit_layer] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_by_token_over_all_samples():
    texts = [Losses(2, {1: 4.0, 3: 2.0}), Losses(0, {}), Losses(6, {1: 4.0, 3: 2.0})]
    found = {layer: metric(scores).value for layer, scores in scores_by_exit(texts).items()}
    assert found == pytest.approx({1: math.exp(1.0), 3: math.exp(0.5)})
    assert scores_by_exit([Losses(1, {1: 1e4, 2: math.nan})]) == scores_by_exit([]) == {}


PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
DRAFTED = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)
ONE_BY_ONE = SweepConfig("tiny")
DRAFTS = {"exit_layer": 5, "num_draft_tokens": 3}
BASELINES = ("transformers", "prompt-lookup", "no-reuse")
CONFIG = BenchConfig("tiny", generation=DRAFTS, repeats=1, batch_size=2, baselines=BASELINES)


def test_the_order_changes_and_every_setting_answers_every_prompt():
    calls = []
    task = own_answers()

    def recorded(loaded, prompt_ids, setting):
        calls.append((tuple(prompt_ids), setting.exit_layer))
        return Output((setting.exit_layer,), steps=(Step(1, 1.0),))

    settings = [DecodingConfig("fake", layer) for layer in (1, 2, 3)]
    baselines = {"fake": recorded}
    progress, measured = collect(
        measure(tiny_loaded(), task, settings, ONE_BY_ONE, repeats=2, baselines=baselines)
    )
    prompts = [tuple(tiny_loaded().encode_prompt(example.prompt)) for example in task.examples]
    assert calls[:3] == [(prompts[0], 1), (prompts[0], 2), (prompts[0], 3)]  # warm-up
    orders = [[layer for _, layer in calls[start : start + 3]] for start in range(3, len(calls), 3)]
    assert orders == [[1, 2, 3], [2, 1, 3], [3, 1, 2], [2, 1, 3], [3, 1, 2], [1, 3, 2]]
    assert [prompt for prompt, _ in calls[3::3]] == prompts * 2
    for layer, each in enumerate(measured, start=1):
        assert [row.output.ids for row in each.table] == [(layer,)] * 6
        places = [(row.repeat, row.sample) for row in each.table]
        assert places == [(repeat, sample) for repeat in (0, 1) for sample in (0, 1, 2)]
    assert progress == [Progress(done, 6, "prompts") for done in range(1, 7)]


def test_the_samples_of_the_largest_seed_have_seeds_of_their_own():
    loaded = tiny_loaded()
    example = own_answers(1).examples[0]
    drawn = replace(PLAIN, temperature=1.0, seed=2**32 - 1)
    _, (measured,) = collect(measure(loaded, task_of(*[example] * 3), [drawn], ONE_BY_ONE))
    assert None not in measured.texts and len(set(measured.texts)) == 3
    expected = measure_prompt(loaded, example.prompt, replace(drawn, seed=0)).text
    assert measured.texts[1] == expected


def answers_of(measured):
    return [(row.output.ids, row.output.text, row.output.finish_reason) for row in measured.answers]


@pytest.mark.parametrize("dtype, stop", [(torch.float64, "of an answer"), (torch.float32, ())])
def test_every_setting_answers_in_a_batch_as_it_does_alone(dtype, stop):
    loaded = tiny_loaded(dtype)
    task = own_answers(5)
    if stop:
        stop = (measure_prompt(loaded, task.examples[1].prompt, PLAIN).text[4:6],)
    plain = replace(PLAIN, stop=stop)
    drafted = replace(DRAFTED, stop=stop)
    baselines = load_baselines(loaded, CONFIG, drafted)
    settings = [plain, replace(plain, strategy="early-exit", exit_layer=5), drafted]
    settings += [replace(drafted, strategy=name) for name in baselines]
    _, alone = collect(measure(loaded, task, settings, ONE_BY_ONE, baselines=baselines))
    untimed = replace(CONFIG, timed=0)
    progress, batched = collect(measure(loaded, task, settings, untimed, baselines=baselines))
    assert progress == [Progress(done, 5, "answers") for done in (2, 4, 5)]
    for single, together in zip(alone, batched, strict=True):
        assert answers_of(together) == answers_of(single)
        for row in together.answers:
            assert row.repeat is None and row.output.stats.new_tokens == len(row.output.ids)
    # Transformers' own
    assert not stop or "stop" in [row.output.finish_reason for row in batched[3].answers]


@pytest.mark.parametrize("config", [ONE_BY_ONE, replace(CONFIG, batch_size=3)])
def test_a_prompt_that_does_not_fit_fails_alone(config):
    loaded = tiny_loaded()
    first, second = own_answers(2).examples
    baselines = load_baselines(loaded, CONFIG, DRAFTED)
    settings = [PLAIN, DRAFTED, replace(DRAFTED, strategy="transformers")]
    task = task_of(first, TOO_LONG, second)
    _, measured = collect(measure(loaded, task, settings, config, baselines=baselines))
    for each in measured:
        assert each.texts == [first.completion, None, second.completion]
        assert "the prompt must be at most 127 tokens" in each.answers[1].output.error
    with pytest.raises(LayerSkipError, match="none of the 1 prompts could be answered; the first"):
        collect(measure(loaded, task_of(TOO_LONG), settings[:1], config))


def test_a_bench_with_batches_differs_in_speed_only():
    task = task_of(*own_answers(2).examples, TOO_LONG)
    _, alone = collect(bench(tiny_loaded(), task, replace(CONFIG, batch_size=1, timed=None)))
    _, batched = collect(bench(tiny_loaded(), task, replace(CONFIG, timed=1)))
    _, untimed = collect(bench(tiny_loaded(), task, replace(CONFIG, timed=0)))
    assert [failure.sample for failure in batched.results[0].failures] == [2]
    assert batched.results[0].metrics == {"exact_match": pytest.approx(2 / 3)}
    for single, timed, quality in zip(alone.results, batched.results, untimed.results, strict=True):
        names = ["metrics", "identical_outputs"]
        if single.strategy == "self-speculative":  # adaptive decoding chooses by times
            names.append("acceptance_rate")
        for name in names:
            assert getattr(single, name) == getattr(timed, name) == getattr(quality, name)
        assert timed.tokens_per_second > 0
        assert quality.tokens_per_second is quality.speedup is quality.ttft_ms is None
        assert quality.peak_memory_mb is None
    json.dumps(untimed.document(), allow_nan=False)


def test_a_difference_is_located_with_the_gap_between_the_targets_two_best_logits_there():
    loaded = tiny_loaded()
    task = own_answers()
    plain = [measure_prompt(loaded, example.prompt, PLAIN) for example in task.examples]
    ids = plain[1].ids
    changed = [plain[0], Output((*ids[:4], ids[4] + 1, *ids[5:])), plain[2]]
    (difference,) = differences(loaded, task.examples, changed, plain)
    assert (difference.sample, difference.position) == (1, 4)
    prefix = loaded.encode_prompt(task.examples[1].prompt) + list(ids[:4])
    logits = loaded.backend.model(torch.tensor([prefix])).logits[0, -1]
    best, second = sorted(logits.tolist(), reverse=True)[:2]
    assert difference.top2_gap == pytest.approx(best - second)
    assert differences(loaded, task.examples, plain, plain) == ()


@pytest.mark.parametrize("remember", [0, 1000])
def test_lookups_find_the_answers_of_their_own_setting_and_repeat_only(remember):
    """Two settings, two repeats and the same prompt twice: only the second prompt's answer has been
    seen before.
    """
    backend = native_or_skip(tiny_model("llama", torch.float32, vocab_size=300, **WIDE))
    loaded = replace(tiny_loaded(), backend=backend)
    example = own_answers(1).examples[0]
    settings = [DecodingConfig("lookup", max_new_tokens=40, num_draft_tokens=8)] * 2
    config = BenchConfig("tiny", remember=remember)
    _, measured = collect(measure(loaded, task_of(example, example), settings, config, repeats=2))
    outputs = [row.output for each in measured for row in each.table]
    accepted = [output.stats.accepted for output in outputs]
    assert accepted == accepted[:2] * 4
    assert (accepted[1] > accepted[0]) == bool(remember)
    assert len({output.ids for output in outputs}) == 1
