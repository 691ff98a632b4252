"""Scores of known texts."""

import pytest

from layerskip_core.evaluation.metrics import exact_match, pass_at_k, quality, rouge


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


def test_the_best_reference_counts():
    assert rouge(["a b c"], [["d e f", "a b c"]]) == {"rouge1": [1.0], "rouge2": [1.0], "rougeL": [1.0]}


def test_pass_at_k_is_the_unbiased_estimate():
    # 1 - C(n - c, k) / C(n, k): n = 5, c = 2: k = 1: 2/5, k = 2: 1 - 3/10, k = 4: no 4 wrong ones, so 1. c = 0: 0. c = 5: 1.
    verdicts = [[True, False, True, False, False], [False] * 5, [True] * 5]
    found = pass_at_k(verdicts, [1, 2, 4])
    assert [*found["pass@1"], *found["pass@2"], *found["pass@4"]] == pytest.approx([0.4, 0, 1, 0.7, 0, 1, 1, 0, 1])


def test_more_is_better_of_every_quality():
    assert quality({"rouge2": 0.5}, "rouge2") > quality({"rouge2": 0.25}, "rouge2") > quality({}, "rouge2")
    assert quality({"perplexity": 5.0}, "perplexity") > quality({"perplexity": 9.0}, "perplexity") > quality({}, "perplexity")
