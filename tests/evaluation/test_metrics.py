"""Scores of known texts."""

import math

import pytest
import torch
from evaluating import TOO_LONG, outputs_of, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.data import Example
from layerskip_core.evaluation import metrics
from layerskip_core.evaluation.measure import Measured
from layerskip_core.evaluation.metrics import (
    Scores,
    change,
    estimate,
    exact_match,
    metric,
    pass_at_k,
    quality,
    reference_losses,
    rouge,
    scores_by_exit,
    speed_ratio,
    text_losses,
)


def test_exact_match_tells_equal_texts():
    assert exact_match([" a b ", "c", "d", "e"], [["a b"], ["c"], ["D"], ["f", " e"]]) == [1, 1, 0, 1]
    assert exact_match(["a  b\n c"], [["a b c"]]) == [0]
    assert exact_match(["a  b\n c"], [["a b c"]], fold_whitespace=True) == [1]


def test_rouge_of_known_texts():
    # Bigrams: 2 of 2 predicted ones are among the 3 of the reference: P = 1, R = 2/3, F = 0.8. The second pair shares none.
    two = rouge(["the cat sat", "a b"], [["the cat sat down"], ["b a"]], ["rouge2"])["rouge2"]
    assert two == pytest.approx([0.8, 0.0])
    # Words: 3 of 3, of 4. The longest common subsequence of "sat the cat" is "the cat": 2 of 3, of 4. The stem counts.
    scores = rouge(["sat the cats"], [["the cat sat down"]])
    assert [*scores["rouge1"], *scores["rouge2"], *scores["rougeL"]] == pytest.approx([6 / 7, 0.4, 4 / 7])


def test_pass_at_k_is_the_unbiased_estimate():
    # 1 - C(n - c, k) / C(n, k): n = 5, c = 2: k = 1: 2/5, k = 2: 1 - 3/10, k = 4: no 4 wrong ones, so 1. c = 0: 0. c = 5: 1.
    verdicts = [[True, False, True, False, False], [False] * 5, [True] * 5]
    found = pass_at_k(verdicts, [1, 2, 4])
    assert [*found["pass@1"], *found["pass@2"], *found["pass@4"]] == pytest.approx([0.4, 0, 1, 0.7, 0, 1, 1, 0, 1])


def test_more_is_better_of_every_quality():
    assert quality({"rouge2": 0.5}, "rouge2") > quality({"rouge2": 0.25}, "rouge2") > quality({}, "rouge2")
    assert quality({"perplexity": 5.0}, "perplexity") > quality({"perplexity": 9.0}, "perplexity") > quality({}, "perplexity")


EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")


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
    assert [tokens for tokens, _ in text_losses(loaded, more, 0, [2, 6])] == [19] * len(windows) + [rest - 1]
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
            logits = loaded.backend.model(torch.tensor([prompt + reference]), use_cache=False).logits[0]
        finally:
            loaded.backend.model.model.layers = layers
        expected = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(reference), reduction="sum").item()
        assert nats[exit_layer] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_by_token_over_all_samples():
    found = scores_by_exit([(2, {1: 4.0, 3: 2.0}), (0, {}), (6, {1: 4.0, 3: 2.0})])
    assert {exit_layer: metric(scores).value for exit_layer, scores in found.items()} == pytest.approx(
        {1: math.exp(1.0), 3: math.exp(0.5)}
    )
    assert scores_by_exit([(1, {1: 1e4, 2: math.nan})]) == scores_by_exit([]) == {}


def test_a_prompt_that_fills_the_context_has_no_reference_tokens():
    assert reference_losses(tiny_loaded(), TOO_LONG, [2, 6]) == (0, {})


PROMPTS = 60


def measured(generator, prompts=PROMPTS):
    """Times of two settings on some prompts; a prompt that is slow for one is slow for the other. Their ratio is about 2."""
    tokens = torch.randint(5, 40, (prompts,), generator=generator)
    base = tokens * (1 + 0.3 * torch.rand(prompts, generator=generator))
    faster = base / (1.2 + 1.6 * torch.rand(prompts, generator=generator))
    return [torch.stack([seconds, tokens])[:, None].double() for seconds in (base, faster)]


def times(seconds, tokens=(1, 2, 3, 4)):
    return torch.tensor([seconds, tokens], dtype=torch.float64)[:, None]


def test_the_interval_is_as_wide_as_fresh_samples_of_prompts_differ():
    generator = torch.Generator().manual_seed(1)
    found = [speed_ratio(*measured(generator)) for _ in range(200)]
    ratios = torch.tensor([ratio for ratio, _ in found])
    truth = ratios.mean().item()
    covering = sum(ends.low <= truth <= ends.high for _, ends in found) / len(found)
    assert 0.89 <= covering <= 0.99
    widths = torch.tensor([ends.high - ends.low for _, ends in found])
    assert widths.median().item() == pytest.approx(2 * 1.96 * ratios.std().item(), rel=0.15)


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about the factor."""
    base, slow = times((1.0, 9.0, 3.0, 40.0)), times((0.9, 8.0, 3.1, 39.0))  # a repeat that something disturbed
    half = base.clone()
    half[0] /= 2
    assert speed_ratio(base, half) == (2.0, None)
    alone = speed_ratio(base, slow).bounds
    assert alone.low < alone.high
    assert speed_ratio(base.expand(2, 3, 4), torch.cat([half, slow, half], dim=1)) == (2.0, None)  # in every resample


def test_what_has_no_interval_or_no_value():
    assert speed_ratio(times((1.0,), (2,)), times((0.7,), (3,))).bounds is None
    assert estimate(torch.div, [[1, 2, 3], [0, 0, 0]]) == (None, None)


def test_the_interval_of_a_share():
    value, (low, high) = estimate(torch.div, [[10, 5, 0, 10], [10] * 4])
    assert value == 25 / 40 and 0 <= low < value < high <= 1
    assert estimate(torch.div, [[1] * 4, [1] * 4]) == (1.0, None)  # the same in every resample


def test_the_answers_to_a_prompt_are_resampled_together():
    """Ten copies of a dozen prompts say no more about other prompts than one of each: the interval does not shrink."""
    pair = measured(torch.Generator().manual_seed(2), prompts=12)
    _, alone = speed_ratio(*pair)
    columns = torch.cat([times.repeat_interleave(10, dim=-1) for times in pair])

    def ratio(base, tokens, own, new):
        return base / tokens / (own / new)

    assert estimate(ratio, columns, answers_per_prompt=10).bounds == pytest.approx(alone, rel=1e-5)
    low, high = estimate(ratio, columns).bounds
    assert high - low < 0.5 * (alone.high - alone.low)
    both = Measured(DecodingConfig(), (), [outputs_of([(1, 1.0)], [(2, 4.0)])], answers_per_prompt=2)
    assert both.times.tolist() == [[[5.0]], [[3.0]], [[0.0]], [[0.0]]]


def test_changes_are_paired():
    full, worse = Scores((0.0, 1.0) * 20), Scores((0.0, 0.9) * 20)
    assert change(full, full) == (0.0, None)
    paired, own = change(worse, full).bounds, metric(worse).bounds
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    texts = metric(Scores((10.0, 40.0, 30.0), (10, 20, 10)))
    assert texts.value == pytest.approx(math.exp(2.0))
    assert texts.bounds == pytest.approx((math.exp(1.0), math.exp(3.0)), rel=1e-3)


def test_times_leave_out_the_prefill_or_not():
    measured = Measured(DecodingConfig(), (), [outputs_of([(1, 2.0), (3, 1.0)], [(1, 4.0)])])
    assert measured.times[:, 0].tolist() == [[3.0, 4.0], [4, 1], [1.0, 0.0], [3, 0]]
