"""Losses of references and of texts through every exit, against the transformers model itself."""

import math

import pytest
import torch
from evaluating import TOO_LONG, tiny_loaded
from torch.nn.functional import cross_entropy

from layerskip_core.data.examples import Example
from layerskip_core.evaluation import perplexity
from layerskip_core.evaluation.perplexity import ReferenceLosses, reference_losses, text_losses

EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")


def test_losses_of_a_text_are_those_of_windows_that_cover_it(monkeypatch):
    monkeypatch.setattr(perplexity, "_WINDOW_TOKENS", 20)
    loaded = tiny_loaded()
    text = " ".join([EXAMPLE.completion] * 4)
    ids = loaded.tokenizer(text)["input_ids"]
    windows = list(text_losses(loaded, text, 0, [2, 6]))
    assert loaded.with_template("raw", None).encode_prompt("") == []  # so that a window's first token has no loss
    assert [losses.tokens for losses in windows] == [(19,)] * (len(ids) // 20)
    assert list(text_losses(loaded, text, 1, [2, 6])) == windows[:1]
    more = text + " call mom"
    rest = len(loaded.tokenizer(more)["input_ids"]) % 20
    assert [losses.tokens for losses in text_losses(loaded, more, 0, [2, 6])] == [(19,)] * len(windows) + [(rest - 1,)]
    assert [losses.tokens for losses in text_losses(loaded, more, 100, [2, 6])] == [(19,)] * len(windows)
    second = torch.tensor([ids[20:40]])
    logits = loaded.backend.model(second, use_cache=False).logits[0]
    expected = cross_entropy(logits[:-1], second[0, 1:], reduction="sum").item()
    assert windows[1].summed[6][0] == pytest.approx(expected, rel=1e-5)


def test_losses_equal_those_of_the_truncated_model_on_the_reference_only():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt(EXAMPLE.prompt)
    reference = [*loaded.tokenizer(EXAMPLE.completion)["input_ids"], loaded.tokenizer.eos_token_id]
    losses = reference_losses(loaded, EXAMPLE, [6, 2])
    assert losses.tokens == (len(reference),)
    assert list(losses.summed) == [2, 6]
    layers = loaded.backend.model.model.layers
    for exit_layer in (2, 6):
        loaded.backend.model.model.layers = layers[:exit_layer]
        try:
            logits = loaded.backend.model(torch.tensor([prompt + reference]), use_cache=False).logits[0]
        finally:
            loaded.backend.model.model.layers = layers
        expected = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(reference), reduction="sum").item()
        assert losses.summed[exit_layer][0] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_by_token_over_all_samples():
    total = ReferenceLosses((2,), {1: (4.0,), 3: (2.0,)}) + ReferenceLosses((6,), {1: (4.0,), 3: (2.0,)})
    assert total.perplexity(1) == pytest.approx(math.exp(1.0))
    assert total.perplexity(3) == pytest.approx(math.exp(0.5))
    assert ReferenceLosses((1,), {1: (1e4,)}).perplexity(1) is None
    assert ReferenceLosses((1,), {1: (math.nan,)}).perplexity(1) is None
    assert ReferenceLosses().perplexity(1) is None


def test_a_prompt_that_fills_the_context_has_no_reference_tokens():
    assert reference_losses(tiny_loaded(), TOO_LONG, [2, 6]) == ReferenceLosses()
