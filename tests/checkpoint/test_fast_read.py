"""A folder read without transformers gives the same results as with transformers, or is left to transformers."""

import pytest
import torch
from conftest import edit_json, run_texts, tiny_model
from evaluating import tiny_loaded
from transformers import AutoTokenizer

from layerskip_core.checkpoint.folder import lean_spec, lean_tokenizer
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED
from layerskip_core.prompting import Tokenizer, special_ids

TEXTS = ["wake me up", "", "né ☃\n  two  spaces", "<|eos|> inside <|bos|>"]


@pytest.fixture
def folder(tmp_path):
    def make(model_type="llama", **changes):
        tokenizer = tiny_loaded(torch.float32).tokenizer
        model = tiny_model(model_type, torch.float32, vocab_size=len(tokenizer), **changes)
        save_checkpoint(model, tokenizer, CheckpointInfo("{prompt}\n"), str(tmp_path), torch.float32)
        return tmp_path

    return make


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_logits_and_ids_equal_transformers(folder, model_type):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if model_type == "apertus" else {}
    path = str(folder(model_type, tie_word_embeddings=model_type == "qwen2", **rope))
    assert lean_spec(path) is not None
    trainable, lean = for_training(path, "cpu", "fp32"), for_decoding(path, "cpu", "fp32")
    expected = decoder_of(trainable)
    assert not isinstance(lean.backend, TransformersBackend) and isinstance(lean.tokenizer, Tokenizer)
    ids = torch.tensor([expected.encode_prompt("wake me up")])
    assert lean.encode_prompt("wake me up") == ids[0].tolist()
    with torch.inference_mode():
        hidden = run_texts(lean.backend, lean.backend.embed(ids), 0, 6)
        wanted = trainable.model(ids).logits
    torch.testing.assert_close(lean.backend.unembed(hidden), wanted, atol=1e-4 * float(wanted.std()), rtol=0)
    assert (lean.eos_ids, lean.info, lean.backend.dtype) == (expected.eos_ids, expected.info, torch.float32)


def test_the_tokenizer_is_the_same(folder):
    path = str(folder())
    expected, lean = AutoTokenizer.from_pretrained(path), lean_tokenizer(path)
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert lean(text)["input_ids"] == ids
        assert lean.decode(ids, skip_special_tokens=True) == expected.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert lean(TEXTS, add_special_tokens=False)["input_ids"] == expected(TEXTS, add_special_tokens=False)["input_ids"]
    assert (lean.eos_token_id, lean.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)
    assert (lean.chat_template, lean.special_tokens_map) == (expected.chat_template, expected.special_tokens_map)
    assert (lean.vocab_size, len(lean), lean.get_vocab()) == (expected.vocab_size, len(expected), expected.get_vocab())
    assert special_ids(lean) == special_ids(expected)
    assert lean.added_tokens_decoder.keys() == expected.added_tokens_decoder.keys()
    assert lean.convert_ids_to_tokens(299) == expected.convert_ids_to_tokens(299)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.45.0"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"model_type": "granite"},
        {"quantization_config": {}},
        {"hidden_act": "tanh"},
    ],
)
def test_configurations_that_need_transformers(folder, changes):
    path = folder()
    edit_json(path / "config.json", **changes)
    assert lean_spec(str(path)) is None


def test_files_beside_the_weights_are_no_weights(folder):
    path = folder()
    (path / "model.safetensors").rename(path / "int4.safetensors")
    assert lean_spec(str(path)) is None


def test_a_tokenizer_that_needs_transformers(folder):
    path = folder()
    edit_json(path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert lean_tokenizer(str(path)) is None
