"""Scores of known texts; losses and gaps against the transformers model itself."""

import math

import pytest
import torch
from evaluating import TOO_LONG, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.data.examples import Example
from layerskip_core.evaluation.measure.comparison import first_difference, top2_gap
from layerskip_core.evaluation.metrics import exact_match, pass_at_k, quality, rouge
from layerskip_core.evaluation.perplexity import ReferenceLosses, reference_losses, text_losses

EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")


def test_exact_match_is_the_share_of_equal_texts():
    assert exact_match([" a b ", "c", "d", "e"], [["a b"], ["c"], ["D"], ["f", " e"]]) == 0.75
    assert exact_match(["a  b\n c"], [["a b c"]]) == 0.0
    assert exact_match(["a  b\n c"], [["a b c"]], fold_whitespace=True) == 1.0


def test_rouge_of_known_texts():
    # Bigrams: 2 of 2 predicted ones are among the 3 of the reference: P = 1, R = 2/3, F = 0.8. The second pair shares none.
    assert rouge(["the cat sat"], [["the cat sat down"]], ["rouge2"]) == pytest.approx({"rouge2": 0.8})
    assert rouge(["the cat sat", "a b"], [["the cat sat down"], ["b a"]], ["rouge2"]) == pytest.approx({"rouge2": 0.4})
    # Words: 3 of 3, of 4. The longest common subsequence of "sat the cat" is "the cat": 2 of 3, of 4. The stem counts.
    scores = rouge(["sat the cats"], [["a dog", "the cat sat down"][1:]])
    assert scores == pytest.approx({"rouge1": 6 / 7, "rouge2": 0.4, "rougeL": 4 / 7})


def test_the_best_reference_counts():
    assert rouge(["a b c"], [["d e f", "a b c"]]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_pass_at_k_is_the_unbiased_estimate():
    # 1 - C(n - c, k) / C(n, k): n = 5, c = 2: k = 1: 2/5, k = 2: 1 - 3/10, k = 4: no 4 wrong ones, so 1. c = 0: 0. c = 5: 1.
    verdicts = [[True, False, True, False, False], [False] * 5, [True] * 5]
    expected = {"pass@1": (0.4 + 0 + 1) / 3, "pass@2": (0.7 + 0 + 1) / 3, "pass@4": 2 / 3}
    assert pass_at_k(verdicts, [1, 2, 4]) == pytest.approx(expected)


def test_more_is_better_of_every_quality():
    assert quality({"rouge2": 0.5}, "rouge2") > quality({"rouge2": 0.25}, "rouge2") > quality({}, "rouge2")
    assert quality({"perplexity": 5.0}, "perplexity") > quality({"perplexity": 9.0}, "perplexity") > quality({}, "perplexity")


def test_losses_of_a_text_are_those_of_windows_that_cover_it():
    loaded = tiny_loaded()
    text = " ".join([EXAMPLE.completion] * 4)
    ids = loaded.tokenizer(text)["input_ids"]
    every = list(text_losses(loaded, text, 0, [2, 6], window_tokens=20))
    assert [one.tokens for one in every] == [20 - (not loaded.encode_prompt("", raw=True))] * (len(ids) // 20)
    assert list(text_losses(loaded, text, 1, [2, 6], window_tokens=20)) == every[:1]
    window = torch.tensor([ids[20:40]])
    logits = loaded.backend.model(window, use_cache=False).logits[0]
    expected = cross_entropy(logits[:-1], window[0, 1:], reduction="sum").item()
    assert every[1].summed[6] == pytest.approx(expected, rel=1e-5)


def test_losses_equal_those_of_the_truncated_model_on_the_reference_only():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt(EXAMPLE.prompt)
    reference = [*loaded.tokenizer(EXAMPLE.completion)["input_ids"], loaded.tokenizer.eos_token_id]
    losses = reference_losses(loaded, EXAMPLE, [6, 2])
    assert losses.tokens == len(reference)
    assert list(losses.summed) == [2, 6]
    layers = loaded.backend.model.model.layers
    for exit_layer in (2, 6):
        loaded.backend.model.model.layers = layers[:exit_layer]
        try:
            logits = loaded.backend.model(torch.tensor([prompt + reference]), use_cache=False).logits[0]
        finally:
            loaded.backend.model.model.layers = layers
        expected = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(reference), reduction="sum").item()
        assert losses.summed[exit_layer] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_by_token_over_all_samples():
    total = ReferenceLosses(2, {1: 4.0, 3: 2.0}) + ReferenceLosses(6, {1: 4.0, 3: 2.0})
    assert total.perplexity(1) == pytest.approx(math.exp(1.0))
    assert total.perplexity(3) == pytest.approx(math.exp(0.5))
    assert ReferenceLosses(1, {1: 1e4}).perplexity(1) is None
    assert ReferenceLosses(1, {1: math.nan}).perplexity(1) is None
    assert ReferenceLosses(0, {}).perplexity(1) is None


def test_a_prompt_that_fills_the_context_has_no_reference_tokens():
    assert reference_losses(tiny_loaded(), TOO_LONG, [2, 6]) == ReferenceLosses(0, {})


@pytest.mark.parametrize(
    ("ids", "expected", "position"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2), ([], [5], 0)],
)
def test_first_difference(ids, expected, position):
    assert first_difference(ids, expected) == position


def test_gap_is_between_the_two_best_logits():
    loaded = tiny_loaded()
    ids = loaded.encode_prompt(EXAMPLE.prompt)
    best, second = sorted(loaded.backend.model(torch.tensor([ids])).logits[0, -1].tolist(), reverse=True)[:2]
    assert top2_gap(loaded.backend, ids) == pytest.approx(best - second)
