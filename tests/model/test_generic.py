import pytest
import torch
from conftest import CHANGES, MIXERS, at, logits_of, run_texts, tiny_model

from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 67, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_spans_equal_the_model_itself(model_type, monkeypatch):
    """Two rows without a cache, and 7 tokens, then spans of 1, 3 and 2, through one."""
    if model_type == "gemma2":
        # Its attention, the only eager one, computes the softmax in fp32 even here. Without AVX-512 the last bit of its sum
        # depends on how many masked keys follow the others. In fp64 it is as near as the rest.
        softmax = torch.nn.functional.softmax
        monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
    model, ids = tiny_model(model_type, **CHANGES.get(model_type, {})), ids_of(2, 13)
    recurs = model_type in MIXERS and model_type != "lfm2"  # which computes in fp32 even here
    near = {"atol": 1e-4, "rtol": 0} if recurs else {}
    backend = TransformersBackend(model)
    with torch.no_grad():
        expected = model(ids).logits
        early = run_texts(backend, backend.embed(ids), 0, 2)
        torch.testing.assert_close(backend.unembed(run_texts(backend, early, 2, 6)), expected, **near)
    torch.testing.assert_close(logits_of(backend, ids, [7, 8, 11]), expected, **near)
    assert expected.std() > 0.1


def test_the_context_limit_is_an_error(llama):
    backend = TransformersBackend(llama)
    with pytest.raises(ConfigError, match="context limit of 128 tokens"):
        backend.run_layers(backend.embed(ids_of(1, 1)), 0, 1, at(torch.tensor([[128]]), backend.new_cache()))


def test_what_cannot_be_cut_is_refused_by_name():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    with pytest.raises(CheckpointError, match="model_type openai-gpt cannot be cut at its layers: it has no KV cache"):
        TransformersBackend(OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_layer=2, n_embd=8, n_head=2, vocab_size=11)))
