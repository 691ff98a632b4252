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
    reference_losses,
    rouge,
    scores_by_exit,
    speed_ratio,
    t_quantile,
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


def measured(generator, prompts=20, repeats=1, of_repeats=0.0):
    """Times of two settings; a prompt that is slow for one is slow for the other. Their ratio is 2, to a tenth by prompt."""

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(5, 40, (prompts,), generator=generator).double().expand(repeats, prompts)
    base = tokens * (0.3 * noise(prompts) + 0.03 * noise(repeats, prompts)).exp()
    faster = base / 2 * (0.1 * noise(prompts) + of_repeats * noise(repeats, 1) + 0.03 * noise(repeats, prompts)).exp()
    return [torch.stack([seconds, tokens]) for seconds in (base, faster)]


def times(seconds, tokens=(1, 2, 3, 4)):
    return torch.tensor([seconds, tokens], dtype=torch.float64)[:, None]


def test_quantiles_of_student_are_those_of_published_tables():
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 7: 2.3646, 12: 2.1788, 31: 2.0395, 100: 1.9840}
    assert {freedom: t_quantile(freedom) for freedom in published} == pytest.approx(published, abs=1e-4)
    assert (t_quantile(2, 0.99), t_quantile(9, 0.9)) == pytest.approx((9.9248, 1.8331), abs=1e-4)


@pytest.mark.parametrize(("prompts", "repeats", "of_repeats"), [(12, 1, 0.0), (20, 3, 0.0), (20, 3, 0.05), (12, 2, 0.03)])
def test_intervals_cover_the_truth_as_often_as_they_say(prompts, repeats, of_repeats):
    """Also where a repeat is slower than another for one of the settings."""
    generator = torch.Generator().manual_seed(1)
    found = [speed_ratio(*measured(generator, prompts, repeats, of_repeats)).bounds for _ in range(300)]
    assert 0.91 <= sum(ends.low <= 2.0 <= ends.high for ends in found) / len(found) <= 0.98


def test_how_many_rows_halve_an_interval():
    """Four times as many, if all of its width is of the prompts: their spread stays, and repeats agree."""
    columns = measured(torch.Generator().manual_seed(3), 100)
    alone, again = speed_ratio(*columns), speed_ratio(*(each.repeat(1, 1, 4) for each in columns))
    assert alone.rows == 400
    assert again.bounds.high - again.bounds.low == pytest.approx((alone.bounds.high - alone.bounds.low) / 2, rel=0.02)
    more = speed_ratio(*measured(torch.Generator().manual_seed(3), 100, 3, 0.004)).rows
    assert more > 400 and speed_ratio(*measured(torch.Generator().manual_seed(3), 100, 3, 0.1)).rows == 0


def test_prompts_are_paired_and_repeats_give_their_median():
    """Times that differ from prompt to prompt, but always by the same factor, leave no doubt about the factor."""
    base, slow = times((1.0, 9.0, 3.0, 40.0)), times((0.9, 8.0, 3.1, 39.0))  # a repeat that something disturbed
    half = base.clone()
    half[0] /= 2
    assert speed_ratio(base, half) == (2.0, None, None)
    value, ends, _ = speed_ratio(base.expand(2, 3, 4), torch.cat([half, slow, half], dim=1))
    assert value == 2.0 and ends.low < 1 < 3 < ends.high


def test_what_has_no_interval_or_no_value():
    assert speed_ratio(times((1.0,), (2,)), times((0.7,), (3,))).bounds is None
    assert estimate(torch.div, [[1, 2, 3], [0, 0, 0]]).value is None


def test_the_interval_of_a_share():
    value, (low, high), _ = estimate(torch.div, [[10, 5, 0, 10], [10] * 4], limits=(0.0, 1.0))
    assert value == 25 / 40 and 0 <= low < value < high == 1
    assert estimate(torch.div, [[1] * 4, [1] * 4]) == (1.0, None, None)


def test_the_answers_to_a_prompt_count_together():
    """Ten copies of a dozen prompts say no more about other prompts than one of each: the interval does not shrink."""
    pair = measured(torch.Generator().manual_seed(2), prompts=12)
    alone = speed_ratio(*pair).bounds
    columns = torch.cat([times.repeat_interleave(10, dim=-1) for times in pair])

    def ratio(base, tokens, own, new):
        return base / tokens / (own / new)

    assert estimate(ratio, columns, answers_per_prompt=10, logarithmic=True).bounds == pytest.approx(alone)
    low, high = estimate(ratio, columns, logarithmic=True).bounds
    assert high - low < 0.5 * (alone.high - alone.low)
    both = Measured(DecodingConfig(), (), [outputs_of([(1, 1.0)], [(2, 4.0)])], answers_per_prompt=2)
    assert both.times.tolist() == [[[5.0]], [[3.0]], [[0.0]], [[0.0]]]


def test_changes_are_paired():
    full, worse = Scores((0.0, 1.0) * 20), Scores((0.0, 0.9) * 20)
    assert change(full, full) == (0.0, None, None)
    paired, own = change(worse, full).bounds, metric(worse).bounds
    assert paired.low < -0.05 < paired.high < 0
    assert own.high - own.low > 5 * (paired.high - paired.low)
    texts = metric(Scores((10.0, 40.0, 30.0), (10, 20, 10)))
    assert texts.value == pytest.approx(math.exp(2.0)) and 0 < texts.bounds.low < texts.value < texts.bounds.high


def test_times_leave_out_the_prefill_or_not():
    measured = Measured(DecodingConfig(), (), [outputs_of([(1, 2.0), (3, 1.0)], [(1, 4.0)])])
    assert measured.times[:, 0].tolist() == [[3.0, 4.0], [4, 1], [1.0, 0.0], [3, 0]]
