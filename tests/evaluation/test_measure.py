"""Scores of known texts, intervals, and outputs, timed one by one in turn or in batches."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, native_or_skip
from evaluating import NEW_TOKENS, TOO_LONG, collect, outputs_of, own_answers, task_of, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.data import Example
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation import metrics
from layerskip_core.evaluation.measure import (
    Measured,
    Progress,
    differences,
    measure,
    measure_prompt,
)
from layerskip_core.evaluation.measure.bench import bench, load_baselines
from layerskip_core.evaluation.metrics import (
    Scores,
    change,
    estimate,
    exact_match,
    metric,
    pass_at_k,
    reference_losses,
    rouge,
    scores_by_exit,
    speed_ratio,
    t_quantile,
    text_losses,
)
from layerskip_core.evaluation.results import Output, Step


def test_scores_of_known_texts():
    assert exact_match([" a b ", "c", "d", "e"], [["a b"], ["c"], ["D"], ["f", " e"]]) == [
        1,
        1,
        0,
        1,
    ]
    assert exact_match(["a  b\n c"], [["a b c"]]) == [0]
    assert exact_match(["a  b\n c"], [["a b c"]], fold_whitespace=True) == [1]
    two = rouge(["the cat sat", "a b"], [["the cat sat down"], ["b a"]], ["rouge2"])["rouge2"]
    assert two == pytest.approx([0.8, 0.0])
    # Words: 3 of 3, of 4. The longest common subsequence of "sat the cat" is "the cat": 2 of 3, of
    # 4. The stem counts.
    scores = rouge(["sat the cats"], [["the cat sat down"]])
    assert [*scores["rouge1"], *scores["rouge2"], *scores["rougeL"]] == pytest.approx(
        [6 / 7, 0.4, 4 / 7]
    )
    verdicts = [[True, False, True, False, False], [False] * 5, [True] * 5]
    found = pass_at_k(verdicts, [1, 2, 4])
    assert [*found["pass@1"], *found["pass@2"], *found["pass@4"]] == pytest.approx(
        [0.4, 0, 1, 0.7, 0, 1, 1, 0, 1]
    )


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
    assert [tokens for tokens, _ in windows] == [19] * (len(ids) // 20)
    assert list(text_losses(loaded, text, 1, [2, 6])) == windows[:1]
    more = text + " call mom"
    rest = len(loaded.tokenizer(more)["input_ids"]) % 20
    assert [tokens for tokens, _ in text_losses(loaded, more, 0, [2, 6])] == [19] * len(windows) + [
        rest - 1
    ]
    assert [tokens for tokens, _ in text_losses(loaded, more, 100, [2, 6])] == [19] * len(windows)
    second = torch.tensor([ids[20:40]])
    logits = loaded.backend.model(second, use_cache=False).logits[0]
    expected = cross_entropy(logits[:-1], second[0, 1:], reduction="sum").item()
    assert windows[1][1][6] == pytest.approx(expected, rel=1e-5)


def test_losses_equal_those_of_the_truncated_model_on_the_reference_only():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt(EXAMPLE.prompt)
    reference = [*loaded.tokenizer(EXAMPLE.completion)["input_ids"], loaded.tokenizer.eos_token_id]
    tokens, nats = reference_losses(loaded, EXAMPLE, [6, 2])
    assert tokens == len(reference) and list(nats) == [2, 6]
    layers = loaded.backend.model.model.layers
    for exit_layer in (2, 6):
        loaded.backend.model.model.layers = layers[:exit_layer]
        try:
            logits = loaded.backend.model(
                torch.tensor([prompt + reference]), use_cache=False
            ).logits[0]
        finally:
            loaded.backend.model.model.layers = layers
        expected = cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(reference), reduction="sum"
        ).item()
        assert nats[exit_layer] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_by_token_over_all_samples():
    found = scores_by_exit([(2, {1: 4.0, 3: 2.0}), (0, {}), (6, {1: 4.0, 3: 2.0})])
    assert {
        exit_layer: metric(scores).value for exit_layer, scores in found.items()
    } == pytest.approx({1: math.exp(1.0), 3: math.exp(0.5)})
    assert scores_by_exit([(1, {1: 1e4, 2: math.nan})]) == scores_by_exit([]) == {}


def measured(generator, prompts=20, repeats=1, of_repeats=0.0):
    """Times of two settings; a prompt that is slow for one is slow for the other. Their ratio is 2,
    to a tenth by prompt.
    """

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(5, 40, (prompts,), generator=generator).double().expand(repeats, prompts)
    base = tokens * (0.3 * noise(prompts) + 0.03 * noise(repeats, prompts)).exp()
    faster = (
        base
        / 2
        * (
            0.1 * noise(prompts) + of_repeats * noise(repeats, 1) + 0.03 * noise(repeats, prompts)
        ).exp()
    )
    return [torch.stack([seconds, tokens]) for seconds in (base, faster)]


def times(seconds, tokens=(1, 2, 3, 4)):
    return torch.tensor([seconds, tokens], dtype=torch.float64)[:, None]


def test_quantiles_of_student_are_those_of_published_tables():
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 7: 2.3646, 12: 2.1788, 31: 2.0395, 100: 1.9840}
    assert {freedom: t_quantile(freedom) for freedom in published} == pytest.approx(
        published, abs=1e-4
    )
    assert (t_quantile(2, 0.99), t_quantile(9, 0.9)) == pytest.approx((9.9248, 1.8331), abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "repeats", "of_repeats"), [(12, 1, 0.0), (20, 3, 0.0), (20, 3, 0.05), (12, 2, 0.03)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(prompts, repeats, of_repeats):
    """Also where a repeat is slower than another for one of the settings."""
    generator = torch.Generator().manual_seed(1)
    found = [
        speed_ratio(*measured(generator, prompts, repeats, of_repeats)).bounds for _ in range(300)
    ]
    assert 0.91 <= sum(ends.low <= 2.0 <= ends.high for ends in found) / len(found) <= 0.98


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about
    the factor.
    """
    # A repeat that something disturbed
    base = times((1.0, 9.0, 3.0, 40.0))
    slow = times((0.9, 8.0, 3.1, 39.0))
    half = base.clone()
    half[0] /= 2
    assert speed_ratio(base, half) == (2.0, None, None)
    value, ends, _ = speed_ratio(base.expand(2, 3, 4), torch.cat([half, slow, half], dim=1))
    assert value == 2.0 and ends.low < 1 < 3 < ends.high


def test_the_interval_of_a_share_and_what_has_none():
    value, (low, high), _ = estimate(torch.div, [[10, 5, 0, 10], [10] * 4], limits=(0.0, 1.0))
    assert value == 25 / 40 and 0 <= low < value < high == 1
    assert estimate(torch.div, [[1] * 4, [1] * 4]) == (1.0, None, None)
    assert speed_ratio(times((1.0,), (2,)), times((0.7,), (3,))).bounds is None
    assert estimate(torch.div, [[1, 2, 3], [0, 0, 0]]).value is None


def test_the_answers_to_a_prompt_count_together():
    """Ten copies of a dozen prompts say no more about other prompts than one of each: the interval
    does not shrink.
    """
    pair = measured(torch.Generator().manual_seed(2), prompts=12)
    alone = speed_ratio(*pair).bounds
    columns = torch.cat([times.repeat_interleave(10, dim=-1) for times in pair])

    def ratio(base, tokens, own, new):
        return base / tokens / (own / new)

    assert estimate(
        ratio, columns, answers_per_prompt=10, logarithmic=True
    ).bounds == pytest.approx(alone)
    low, high = estimate(ratio, columns, logarithmic=True).bounds
    assert high - low < 0.5 * (alone.high - alone.low)
    both = Measured(
        DecodingConfig(), (), [outputs_of([(1, 1.0)], [(2, 4.0)])], answers_per_prompt=2
    )
    assert both.times.tolist() == [[[5.0]], [[3.0]]]


def test_changes_are_paired_and_times_have_the_prefill():
    full = Scores((0.0, 1.0) * 20)
    worse = Scores((0.0, 0.9) * 20)
    assert change(full, full) == (0.0, None, None)
    paired = change(worse, full).bounds
    own = metric(worse).bounds
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    texts = metric(Scores((10.0, 40.0, 30.0), (10, 20, 10)))
    assert (
        texts.value == pytest.approx(math.exp(2.0))
        and 0 < texts.bounds.low < texts.value < texts.bounds.high
    )
    measured = Measured(DecodingConfig(), (), [outputs_of([(1, 2.0), (3, 1.0)], [(1, 4.0)])])
    assert measured.times[:, 0].tolist() == [[3.0, 4.0], [4, 1]]


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
    events = measure(
        tiny_loaded(), task, settings, ONE_BY_ONE, repeats=2, baselines={"fake": recorded}
    )
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
    loaded = tiny_loaded()
    task = own_answers(1)
    drawn = replace(PLAIN, temperature=1.0, seed=2**32 - 1)
    _, (measured,) = collect(measure(loaded, task_of(*task.examples * 3), [drawn], ONE_BY_ONE))
    assert None not in measured.texts and len(set(measured.texts)) == 3
    assert (
        measured.texts[1]
        == measure_prompt(loaded, task.examples[0].prompt, replace(drawn, seed=0)).text
    )


@pytest.mark.parametrize(("dtype", "stop"), [(torch.float64, "of an answer"), (torch.float32, ())])
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
    progress, batched = collect(
        measure(loaded, task, settings, replace(CONFIG, timed=0), baselines=baselines)
    )
    assert progress == [Progress(done, 5, "answers") for done in (2, 4, 5)]
    for single, together in zip(alone, batched, strict=True):
        assert [(output.ids, output.text, output.finish_reason) for output in together.answers] == [
            (output.ids, output.text, output.finish_reason) for output in single.answers
        ]
        assert [output.stats.new_tokens for output in together.answers] == [
            len(output.ids) for output in single.answers
        ]
    # Transformers' own
    assert not stop or "stop" in [output.finish_reason for output in batched[3].answers]


@pytest.mark.parametrize("config", [ONE_BY_ONE, replace(CONFIG, batch_size=3)])
def test_a_prompt_that_does_not_fit_fails_alone(config):
    loaded, (first, second) = tiny_loaded(), own_answers(2).examples
    baselines = load_baselines(loaded, CONFIG, DRAFTED)
    settings = [PLAIN, DRAFTED, replace(DRAFTED, strategy="transformers")]
    _, measured = collect(
        measure(loaded, task_of(first, TOO_LONG, second), settings, config, baselines=baselines)
    )
    for each in measured:
        assert each.texts == [first.completion, None, second.completion]
        assert "the prompt must be at most 127 tokens" in each.answers[1].error
    with pytest.raises(
        LayerSkipError, match="none of the 1 prompts could be answered; the first: the prompt must"
    ):
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
        assert (
            quality.tokens_per_second,
            quality.speedup,
            quality.ttft_ms,
            quality.peak_memory_mb,
        ) == (None, None, None, None)
        if single.strategy == "self-speculative":
            assert single.acceptance_rate == timed.acceptance_rate == quality.acceptance_rate > 0
    assert (batched.config["batch_size"], batched.config["timed"]) == (2, 2)
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
    best, second = sorted(
        loaded.backend.model(torch.tensor([prefix])).logits[0, -1].tolist(), reverse=True
    )[:2]
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
    drafted = [
        [output.stats.accepted for output in outputs]
        for each in measured
        for outputs in each.repeats
    ]
    assert drafted == [drafted[0]] * 4
    assert (drafted[0][1] > drafted[0][0]) == bool(remember)
    assert (
        len({output.ids for each in measured for outputs in each.repeats for output in outputs})
        == 1
    )
