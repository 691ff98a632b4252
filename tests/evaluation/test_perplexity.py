"""Losses of references and of texts through every exit, against the transformers model itself."""

import math

import pytest
import torch
from evaluating import TOO_LONG, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.data.examples import Example
from layerskip_core.evaluation import perplexity
from layerskip_core.evaluation.bootstrap import metric
from layerskip_core.evaluation.perplexity import reference_losses, scores_by_exit, text_losses

EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")


def test_losses_of_a_text_are_those_of_windows_that_cover_it(monkeypatch):
    monkeypatch.setattr(perplexity, "_WINDOW_TOKENS", 20)
    loaded = tiny_loaded()
    text = " ".join([EXAMPLE.completion] * 4)
    ids = loaded.tokenizer(text)["input_ids"]
    windows = list(text_losses(loaded, text, 0, [2, 6]))
    assert loaded.with_template("raw", None).encode_prompt("") == []  # so that a window's first token has no loss
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
