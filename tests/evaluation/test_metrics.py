"""Scores of known texts."""

import pytest

from layerskip_core.evaluation.metrics import exact_match, pass_at_k, quality, rouge


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
