"""A checkpoint whose files say what cannot be is one error, the same however it is loaded; nothing is built of it first."""

import json
import shutil
import struct
from math import nan

import gguf
import pytest
import torch
from command_line import run
from conftest import tiny_model
from evaluating import tiny_loaded
from gguf_file import write_gguf
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.gguf_header import read_gguf_header
from layerskip_core.checkpoint.load import blank as blank_model
from layerskip_core.checkpoint.load import for_decoding, for_training
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.checkpoint.transformers_read import stored_dtype
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.model import GenericBackend
from layerskip_core.model.spec import SUPPORTED


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def edit(file, **changes):
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value != "absent"}))


@pytest.fixture
def refused(monkeypatch):
    """Every way of loading a folder, each of which must end with the message given."""

    def check(path, message, blank=True):
        def repacked_for_torch():
            with monkeypatch.context() as patch:
                patch.setattr("layerskip_core.checkpoint.load.can_run_native", lambda *_: False)
                for_decoding(str(path), "cpu")

        ways = [
            lambda: for_decoding(str(path), "cpu"),
            repacked_for_torch,
            lambda: for_training(str(path), "cpu"),
            *([lambda: blank_model(str(path), 0)] if blank else []),
        ]
        for way in ways:
            with pytest.raises(CheckpointError) as error:
                way()
            assert str(error.value) == f"cannot load model {path}: {message}"

    return check


CONFIGS = [
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number in 1..1024, got 0"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers must be a whole number in 1..1024, got 10000000"),
    ({"vocab_size": 10**12}, "vocab_size must be a whole number in 1..16777216, got 1000000000000"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number in 1e-30..1, got 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number in 1e-30..1, got '1e-6'"),
    ({"sliding_window": -5}, "sliding_window must be a whole number in 1..2147483648, or null, got -5"),
    ({"layer_types": ["full_attention"]}, "layer_types must be a list of num_hidden_layers, 6, entries, got 1"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_parameters.rope_theta must be a number in 1..1e+15, got 0",
    ),
    ({"rope_parameters": "default"}, "rope_parameters must be an object, or null, got 'default'"),
    ({"layer_types": ["other"] * 6},
     "layer_types must be a list of at most 1024 entries, each one of full_attention, sliding_attention, or null, "
     "got ['other', 'other', 'other', 'other', 'other', 'other']"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, 3, got 4"),
    ({"head_dim": 7}, "head_dim must be an even number in 2..1024, or null, got 7"),
    ({"max_position_embeddings": None}, "max_position_embeddings must be a whole number in 1..134217728, got None"),
    ({"eos_token_id": [2, True]}, "eos_token_id must be a token id, a list of them, or null, got [2, True]"),
    ({"eos_token_id": 300}, "eos_token_id must be below vocab_size, got 300 (vocab_size is 300)"),
    ({"dtype": "int8"}, "dtype must be one of auto, float64, float32, float16, bfloat16, or null, got 'int8'"),
    ({"model_type": "gpt2"}, f"model type 'gpt2' cannot be split by depth; supported: {', '.join(SUPPORTED)}"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configurations(folder, refused, changes, message):
    edit(folder / "config.json", **changes)
    refused(folder, message)
    with pytest.raises(CheckpointError, match="cannot load model"):
        stored_dtype(str(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[]", "needed a JSON object, found list"),
        ('{"a": NaN}', "not valid JSON: NaN"),
    ],
    ids=["deep", "list", "NaN"],
)  # fmt: skip
def test_damaged_files(folder, name, content, reason):
    (folder / name).write_text(content)
    for load in (for_decoding, for_training):
        with pytest.raises(CheckpointError, match=rf"cannot load model {folder}: {folder}/{name}: {reason}"):
            load(str(folder), "cpu")


def test_a_generation_config_with_a_token_that_is_none(folder, refused):
    edit(folder / "generation_config.json", eos_token_id="</s>")
    refused(folder, "generation_config.json: eos_token_id must be a token id, a list of them, or null, got '</s>'")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', "[" * 100_000])
def test_a_damaged_tokenizer_is_one_line(folder, content):
    (folder / "tokenizer.json").write_text(content)
    for load in (for_decoding, for_training):
        with pytest.raises(CheckpointError, match=f"cannot load model {folder}: ") as error:
            load(str(folder), "cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": []}, {"type": "BPE", "vocab": {}, "merges": []}], ids=str)
def test_a_tokenizer_without_a_vocabulary(folder, model):
    edit(folder / "tokenizer.json", model=model)
    with pytest.raises(CheckpointError, match=f"cannot load model {folder}: the tokenizer has no vocabulary"):
        for_training(str(folder), "cpu")
    with pytest.raises(CheckpointError, match=f"cannot load model {folder}: "):
        for_decoding(str(folder), "cpu")


def change_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        weights[name] = change(weights[name].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM, DOWN = "model.layers.2.input_layernorm.weight", "model.layers.4.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
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
def test_weights(folder, refused, name, change, message):
    change_weights(folder, **{name: change})
    refused(folder, message, blank=False)


def test_missing_weights_are_told_before_room_is_made_for_them(folder, refused):
    edit(folder / "config.json", num_hidden_layers=1000)
    refused(folder, "8946 weights are missing, model.layers.10.input_layernorm.weight the first", blank=False)


def test_a_blank_model_that_does_not_fit_into_memory_is_not_begun(folder):
    edit(folder / "config.json", vocab_size=1 << 24, hidden_size=1 << 20, num_attention_heads=1 << 17)
    with pytest.raises(CheckpointError, match=r"its \d+ weights need \d+ MB in fp32, this machine has \d+"):
        blank_model(str(folder), 0)


def test_windows_of_qwen_that_are_not_used(tmp_path):
    """As older checkpoints of Qwen2 say it; the lean way took the window for every layer's."""
    tokenizer = tiny_loaded(torch.float32).tokenizer
    model = tiny_model("qwen2", torch.float32, vocab_size=len(tokenizer))
    save_checkpoint(model, tokenizer, tiny_loaded().info, str(tmp_path), torch.float32)
    edit(tmp_path / "config.json", use_sliding_window=False, sliding_window=2, layer_types="absent")
    loaded = for_decoding(str(tmp_path), "cpu", "fp32")
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = loaded.backend.run_layers(loaded.backend.embed(ids), 0, 6, torch.arange(9)[None])
        expected = tiny_model("qwen2", torch.float32, vocab_size=len(tokenizer))(ids).logits
    assert not isinstance(loaded.backend, GenericBackend)
    torch.testing.assert_close(loaded.backend.unembed(hidden), expected, atol=1e-4 * float(expected.std()), rtol=0)


def test_a_tokenizer_larger_than_the_embedding(checkpoint, tmp_path):
    loaded = for_training(checkpoint, "cpu")
    model = tiny_model("llama", torch.float32, vocab_size=290, eos_token_id=2, pad_token_id=0)
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(tmp_path), torch.float32)
    message = r"the tokenizer has 300 tokens, the model embeddings of 290 \(vocab_size\): '.+' is token 290"
    for load in (for_decoding, for_training):
        with pytest.raises(CheckpointError, match=message):
            load(str(tmp_path), "cpu")


def test_special_tokens_beyond_the_embedding_are_refused_in_a_prompt_alone(checkpoint, tmp_path):
    """Gemma 3's tokenizer has one, for images."""
    loaded = for_training(checkpoint, "cpu")
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    save_checkpoint(loaded.model, loaded.tokenizer, loaded.info, str(tmp_path), torch.float32)
    for again in (for_decoding(str(tmp_path), "cpu"), decoder_of(for_training(str(tmp_path), "cpu"))):
        assert again.encode_prompt("wake me up") == decoder_of(loaded).encode_prompt("wake me up")
        with pytest.raises(ConfigError, match="tokens of the model, of which there are 300, got '<image>', id 300"):
            again.encode_prompt("an <image>", raw=True)


def adapter(folder, base, rank=4, **changes):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "task_type": "CAUSAL_LM", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_that_stand_on_each_other_in_a_circle(tmp_path):
    one, other = adapter(tmp_path / "one", tmp_path / "other"), adapter(tmp_path / "other", tmp_path / "one")
    alone = adapter(tmp_path / "alone", tmp_path / "alone")
    for folder in (one, other, alone):
        for load in (for_training, stored_dtype):
            with pytest.raises(CheckpointError, match=r"adapter_config\.json names a base that needs this adapter itself"):
                load(str(folder))


def test_a_long_chain_of_adapters(tmp_path):
    for number in range(20):
        adapter(tmp_path / str(number), tmp_path / str(number + 1))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/0 is a chain of more than 8 adapters"):
        for_training(str(tmp_path / "0"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ("{}", "base_model_name_or_path must be the name of a model, got None"),
        ('{"base_model_name_or_path": 7}', "base_model_name_or_path must be the name of a model, got 7"),
        (
            '{"base_model_name_or_path": "x", "r": 1000000000}',
            r"the rank must be a whole number in 1\.\.4, as its",
        ),
    ],
)
def test_damaged_adapters(tmp_path, content, message):
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/adapter_config\.json: {message}"):
        for_training(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights, name: weights.pop(name),
            r"the adapter is incomplete: 1 weights are missing, .*q_proj\.lora_B\.weight the",
        ),
        (
            lambda weights, name: weights.update({name: weights[name].int()}),
            r"lora_B\.weight must be one of F64, .*, found I32",
        ),
    ],
)
def test_weights_of_an_adapter(checkpoint, tmp_path, change, message):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(for_training(checkpoint, "cpu", "fp32").model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path=checkpoint)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    change(weights, next(name for name in weights if "lora_B" in name))
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        for_training(str(tmp_path), "cpu")


def test_an_adapter_on_an_adapter_is_merged_into_both(checkpoint, tmp_path, capfd):
    from peft import LoraConfig, get_peft_model

    base = for_training(checkpoint, "cpu", "fp32")
    expected = base.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    below = checkpoint
    for name in ("inner", "outer"):
        torch.manual_seed(len(name) + ord(name[0]))
        model = get_peft_model(for_training(checkpoint, "cpu", "fp32").model, LoraConfig(r=2, target_modules=["q_proj"]))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        expected += layer.get_delta_weight("default").detach()
        model.peft_config["default"].base_model_name_or_path = below
        model.save_pretrained(tmp_path / name)
        base.tokenizer.save_pretrained(tmp_path / name)
        below = str(tmp_path / name)
    capfd.readouterr()
    merged = for_training(below, "cpu", "fp32").model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, expected)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def file(checkpoint, tmp_path):
    write_gguf(checkpoint, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_header_of_a_gguf_file(file):
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.parameters == sum(weight.numel() for weight in tiny_loaded(torch.float32).backend.model.parameters())


def test_a_gguf_file_is_loaded_without_a_word(file, capfd):
    for_training(str(file), "cpu", "fp32")
    assert capfd.readouterr() == ("", "")


def patched(file, key, code, value):
    """The file with another number at a key of its header."""
    content = bytearray(file.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    content[at : at + struct.calcsize(code)] = struct.pack(code, *(value if isinstance(value, tuple) else (value,)))
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: patched(f, "llama.block_count", "<I", 10**7), r"llama\.block_count must be a whole number in 1\.\.1024"),
        (lambda f: patched(f, "llama.embedding_length", "<I", 0), r"llama\.embedding_length must be a whole number in 1"),
        (lambda f: patched(f, "llama.block_count", "<I", 900), r"needed \d+ weights, by its sizes; found \d+"),
        (lambda f: patched(f, "llama.rope.freq_base", "<f", nan), r"llama\.rope\.freq_base must be a number"),
        # Behind an array's key: its type, then that of its entries, then their count.
        (lambda f: patched(f, "tokenizer.ggml.tokens", "<IQ", (8, 1 << 60)), "is damaged: .* texts do not fit into"),
        (lambda f: f.write_bytes(f.read_bytes()[:8] + struct.pack("<Q", 1 << 60) + f.read_bytes()[16:]), "tensors do not fit"),
        (lambda f: f.write_bytes(f.read_bytes()[:16] + struct.pack("<Q", 1 << 60) + f.read_bytes()[24:]), "entries do not fit"),
        (lambda f: f.write_bytes(f.read_bytes()[:3000]), "ends in its header, after 3000 bytes"),
        (lambda f: f.write_bytes(f.read_bytes()[:-60000]), "is damaged: tensor .* does not fit into"),
        (lambda f: f.write_bytes(b"GGUF"), r"tiny\.gguf is no GGUF file: it has 4 bytes"),
        (lambda f: f.write_bytes(b"x" * 100), r"tiny\.gguf is no GGUF file"),
    ],
)  # fmt: skip
def test_gguf_files_that_promise_what_they_do_not_hold(file, damage, message, monkeypatch):
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("a tensor was read"))
    damage(file)
    result = run("import", str(file), "--output", str(file.parent / "out"))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1) and not (file.parent / "out").exists()
    for load in (for_training, lambda name: blank_model(name, 0)):
        with pytest.raises(CheckpointError, match=f"cannot load model {file}: .*{message}"):
            load(str(file))
