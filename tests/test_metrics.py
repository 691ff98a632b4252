"""Scores of known texts; losses and gaps against the transformers model itself."""

import math

import pytest
import torch
from evaluating import TOO_LONG, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.data import Example
from layerskip_core.evaluation.metrics import ReferenceLosses, exact_match, first_difference, reference_losses, rouge2, top2_gap

EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")


def test_exact_match_is_the_share_of_equal_texts():
    assert exact_match([" a b ", "c", "d", "e"], ["a b", "c", "D", "f"]) == 0.5
    assert exact_match(["a  b\n c"], ["a b c"]) == 0.0
    assert exact_match(["a  b\n c"], ["a b c"], fold_whitespace=True) == 1.0


def test_rouge2_of_known_texts():
    # Bigrams: 2 of 2 predicted ones are among the 3 of the reference: P = 1, R = 2/3, F = 0.8. The second pair shares none.
    assert rouge2(["the cat sat"], ["the cat sat down"]) == pytest.approx(0.8)
    assert rouge2(["the cat sat", "a b"], ["the cat sat down", "b a"]) == pytest.approx(0.4)


def test_losses_equal_those_of_the_truncated_model_on_the_reference_only():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt(EXAMPLE.prompt)
    reference = [*loaded.tokenizer(EXAMPLE.completion)["input_ids"], loaded.tokenizer.eos_token_id]
    losses = reference_losses(loaded, EXAMPLE, [6, 2])
    assert losses.tokens == len(reference)
    assert list(losses.summed) == [2, 6]
    layers = loaded.model.model.layers
    for exit_layer in (2, 6):
        loaded.model.model.layers = layers[:exit_layer]
        try:
            logits = loaded.model(torch.tensor([prompt + reference]), use_cache=False).logits[0]
        finally:
            loaded.model.model.layers = layers
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
    best, second = sorted(loaded.model(torch.tensor([ids])).logits[0, -1].tolist(), reverse=True)[:2]
    assert top2_gap(loaded.depth, ids) == pytest.approx(best - second)
