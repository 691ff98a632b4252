"""Impossible values in a checkpoint's files are one error, the same for every way of loading,
before anything is built.

A folder that is read without transformers gives the same results as with it, or is left to
transformers.
"""

import re
import shutil
from math import nan

import pytest
import torch
from command_line import fails, run
from conftest import OWN_LAYERS, edit_json, logits_of, require_near, tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from layerskip_core.checkpoint.folder import lean_spec, lean_tokenizer
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.checkpoint.transformers_read import blank as blank_model
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED
from layerskip_core.model.native.compiled import kernels
from layerskip_core.prompting import Tokenizer, special_ids


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def refused(path, message, blank=True):
    """Loads a folder in every way; each must fail with the message given, in one line."""
    ways = [
        for_decoding,
        for_training,
        *([lambda name, device: blank_model(name, 0)] if blank else []),
    ]
    for way in ways:
        with pytest.raises(CheckpointError, match=f"^cannot load model {path}: ") as error:
            way(str(path), "cpu")
        assert re.search(message, str(error.value)) and "\n" not in str(error.value)


CONFIGS = [
    ({"num_hidden_layers": 0}, "hidden_layers"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"layer_types": ["full_attention"]}, "layer_types|num_hidden_layers"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads must be a multiple of num_key_value_heads, 3, got 4",
    ),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"model_type": "gpt9"}, "model type `gpt9`"),
]


@pytest.mark.parametrize("changes, message", CONFIGS, ids=lambda value: str(value)[:40])
def test_configurations(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", ["[" * 100_000, "[]"], ids=["deep", "list"])
def test_damaged_files(folder, name, content):
    (folder / name).write_text(content)
    for load in (for_decoding, for_training):
        with pytest.raises(CheckpointError, match=f"cannot load model {folder}: ") as error:
            load(str(folder), "cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_invalid_token_that_ends_answers(folder, name):
    edit_json(folder / name, eos_token_id="</s>")
    with pytest.raises(CheckpointError, match=r"eos_token_id must be .*, got '?</s>"):
        for_decoding(str(folder), "cpu")


SAMPLING = {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    "stored, followed",
    [
        ({"do_sample": True, **SAMPLING}, SAMPLING),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        (SAMPLING, {"repetition_penalty": 1.1}),  # greedy, as in transformers
        ({"do_sample": False, "temperature": 0.6}, {}),
    ],
)
def test_sampling_is_that_of_generation_config(folder, stored, followed):
    edit_json(folder / "generation_config.json", **stored)
    assert for_decoding(str(folder), "cpu").own_sampling == followed
    assert decoder_of(for_training(str(folder), "cpu")).own_sampling == followed


def test_sampling_stays_with_a_model(wide, tmp_path):
    edit_json(wide / "generation_config.json", do_sample=True, **SAMPLING)
    lora = "--lora-rank 2 --lora-keep"
    for number, command in enumerate(
        (
            (f"import {wide}",),
            (f"export {wide} --exit 2",),
            *([(f"export {wide} --format packed",)] if kernels() else []),
            (f"finetune --model {wide} --steps 1 --samples 2 --batch-size 1", lora),
        )
    ):
        output = str(tmp_path / str(number))
        done = run(*command, f"--output {output}")
        assert done.code == 0, done.err
        assert for_decoding(output, "cpu").own_sampling == SAMPLING, command


def change_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        weights[name] = change(weights[name].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.2.input_layernorm.weight"
DOWN = "model.layers.4.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (NORM, lambda weight: weight[:-1], f"size mismatch of {NORM}: needed [32], found [31]"),
        (DOWN, lambda weight: weight.T.contiguous(), f"size mismatch of {DOWN}: needed [32, 48], found [48, 32]"),
        (DOWN, lambda weight: weight.to(torch.int8), f"the weight {DOWN} must be one of F64, F32, F16, BF16, found I8"),
        (DOWN, lambda weight: weight.index_fill_(1, torch.tensor([3]), nan),
         f"the weight {DOWN} holds NaN: it is damaged, or its training diverged"),
        (NORM, lambda weight: weight / 0, f"the weight {NORM} holds infinity: it is damaged, or its training diverged"),
    ],
    ids=["short", "transposed", "integers", "NaN", "infinity"],
)  # fmt: skip
def test_weights(folder, name, change, message):
    change_weights(folder, **{name: change})
    refused(folder, re.escape(message), blank=False)


def test_missing_weights_are_reported_before_memory_is_allocated(folder):
    edit_json(folder / "config.json", num_hidden_layers=1000)
    refused(
        folder,
        "8946 weights are missing, model.layers.10.input_layernorm.weight the first",
        blank=False,
    )


def test_the_window_of_qwen2_without_sliding_layers(tmp_path):
    """Older Qwen2 checkpoints name a window that no layer uses; reading without transformers once
    applied it to all layers.
    """
    tokenizer = tiny_loaded(torch.float32).tokenizer
    model = tiny_model("qwen2", torch.float32, vocab_size=len(tokenizer))
    save_checkpoint(model, tokenizer, tiny_loaded().info, str(tmp_path), torch.float32)
    edit_json(
        tmp_path / "config.json", use_sliding_window=False, sliding_window=2, layer_types="absent"
    )
    loaded = for_decoding(str(tmp_path), "cpu", "fp32")
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = tiny_model("qwen2", torch.float32, vocab_size=len(tokenizer))(ids).logits.detach()
    assert not isinstance(loaded.backend, TransformersBackend)
    require_near(logits_of(loaded.backend, ids), expected, 1e-4)


def test_a_tokenizer_larger_than_the_embedding(checkpoint, tmp_path):
    loaded = for_training(checkpoint, "cpu")
    model = tiny_model("llama", torch.float32, vocab_size=290, eos_token_id=2, pad_token_id=0)
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(tmp_path), torch.float32)
    message = r"the tokenizer has 300 tokens, the model embeddings of 290 \(vocab_size\): '.+' is token 290"
    for load in (for_decoding, for_training):
        with pytest.raises(CheckpointError, match=message):
            load(str(tmp_path), "cpu")


def test_special_tokens_beyond_the_embedding_are_refused_in_prompts_only(checkpoint, tmp_path):
    """Gemma 3's tokenizer has such a token, for images."""
    loaded = for_training(checkpoint, "cpu")
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    save_checkpoint(loaded.model, loaded.tokenizer, loaded.info, str(tmp_path), torch.float32)
    for again in (
        for_decoding(str(tmp_path), "cpu"),
        decoder_of(for_training(str(tmp_path), "cpu")),
    ):
        assert again.encode_prompt("wake me up") == decoder_of(loaded).encode_prompt("wake me up")
        with pytest.raises(
            ConfigError, match="tokens of the model, ids below 300, got '<image>', id 300"
        ):
            again.with_template("raw", None).encode_prompt("an <image>")


TEXTS = ["wake me up", "", "né ☃\n  two  spaces", "<|eos|> inside <|bos|>"]


@pytest.fixture
def saved(tmp_path):
    def make(model_type="llama", **changes):
        tokenizer = tiny_loaded(torch.float32).tokenizer
        model = tiny_model(model_type, torch.float32, vocab_size=len(tokenizer), **changes)
        save_checkpoint(
            model, tokenizer, CheckpointInfo("{prompt}\n"), str(tmp_path), torch.float32
        )
        return tmp_path

    return make


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_logits_and_ids_equal_transformers(saved, model_type):
    scaled = model_type in ("apertus", "gpt_oss")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if scaled else {}
    path = str(saved(model_type, tie_word_embeddings=model_type == "qwen2", **rope))
    assert lean_spec(path) is not None
    trainable = for_training(path, "cpu", "fp32")
    lean = for_decoding(path, "cpu", "fp32")
    expected = decoder_of(trainable)
    assert not isinstance(lean.backend, TransformersBackend) and isinstance(
        lean.tokenizer, Tokenizer
    )
    ids = torch.tensor([expected.encode_prompt("wake me up")])
    assert lean.encode_prompt("wake me up") == ids[0].tolist()
    wanted = trainable.model(ids).logits.detach()
    require_near(logits_of(lean.backend, ids), wanted, 1e-4)
    assert (lean.eos_ids, lean.info, lean.backend.dtype) == (
        expected.eos_ids,
        expected.info,
        torch.float32,
    )


def test_the_tokenizer_is_the_same(saved):
    path = str(saved())
    expected = AutoTokenizer.from_pretrained(path)
    lean = lean_tokenizer(path)
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert lean(text)["input_ids"] == ids
        assert lean.decode(ids, skip_special_tokens=True) == expected.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert (
        lean(TEXTS, add_special_tokens=False)["input_ids"]
        == expected(TEXTS, add_special_tokens=False)["input_ids"]
    )
    assert (lean.eos_token_id, lean.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)
    assert (lean.chat_template, lean.special_tokens_map) == (
        expected.chat_template,
        expected.special_tokens_map,
    )
    assert (lean.vocab_size, len(lean), lean.get_vocab()) == (
        expected.vocab_size,
        len(expected),
        expected.get_vocab(),
    )
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
def test_configurations_that_need_transformers(saved, changes):
    path = saved()
    edit_json(path / "config.json", **changes)
    assert lean_spec(str(path)) is None


def test_files_that_only_transformers_reads_are_left_to_it(saved):
    path = saved()
    edit_json(path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert lean_tokenizer(str(path)) is None
    (path / "model.safetensors").rename(path / "int4.safetensors")
    assert lean_spec(str(path)) is None


@pytest.mark.parametrize(
    "model", [{"type": "Unigram", "vocab": []}, {"type": "BPE", "vocab": {}, "merges": []}], ids=str
)
def test_a_tokenizer_without_a_vocabulary(folder, model):
    edit_json(folder / "tokenizer.json", model=model)
    with pytest.raises(
        CheckpointError, match=f"cannot load model {folder}: the tokenizer has no vocabulary"
    ):
        for_training(str(folder), "cpu")
    with pytest.raises(CheckpointError, match=f"cannot load model {folder}: "):
        for_decoding(str(folder), "cpu")


def test_a_wrong_value_of_sampling(folder):
    edit_json(folder / "generation_config.json", do_sample=True, top_p=1.5)
    message = f"generation_config.json of {folder}: --top-p must be a number in (0, 1], got 1.5"
    fails(message, f"chat --model {folder}")
    # Which is greedy
    assert run("generate", "hello", f"--model {folder} --max-new-tokens 4").code == 0


def test_the_names_of_a_model_with_images(saved):
    """As transformers writes the text part of a Qwen3.5 that it has read with images, and as
    published files have it.
    """
    path = saved("qwen3_5_text")
    before = logits_of(
        for_decoding(str(path), "cpu", "fp32").backend, ids := torch.arange(3, 20)[None]
    )
    weights = load_file(path / "model.safetensors")
    renamed = {
        name.replace("model.", "model.language_model.", 1): weight
        for name, weight in weights.items()
    }
    save_file(
        {**renamed, "model.visual.other": torch.zeros(1)},
        path / "model.safetensors",
        {"format": "pt"},
    )
    assert lean_spec(str(path)) is not None
    assert torch.equal(logits_of(for_decoding(str(path), "cpu", "fp32").backend, ids), before)
    generic = logits_of(for_training(str(path), "cpu", "fp32").backend, ids).detach()
    require_near(generic, before, 1e-3)


@pytest.mark.parametrize("model_type", OWN_LAYERS)
def test_without_kernels_layers_of_other_kinds_are_those_of_transformers(
    saved, model_type, monkeypatch
):
    path = str(saved(model_type))
    ids = torch.arange(3, 20)[None]
    expected = logits_of(for_decoding(path, "cpu", "fp32").backend, ids)
    monkeypatch.setenv("LAYERSKIP_KERNELS", "torch")
    loaded = for_decoding(path, "cpu", "fp32")
    assert isinstance(loaded.backend, TransformersBackend)
    require_near(logits_of(loaded.backend, ids), expected, 1e-3)
    with pytest.raises(
        ConfigError,
        match=f"a model that can be repacked, got {model_type} with (recurrent|different sizes|attention sinks)",
    ):
        for_decoding(path, "cpu", "fp32", PackingConfig("int8"))
