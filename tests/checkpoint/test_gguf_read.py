"""GGUF files as transformers itself reads them, and files that are no model."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from command_line import fails, run
from conftest import CHANGES, tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file
from text_bpe import TEXTS, text_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from layerskip_core.checkpoint import gguf_read
from layerskip_core.checkpoint.gguf_header import read_gguf_header
from layerskip_core.checkpoint.gguf_read import GgufModel
from layerskip_core.checkpoint.load import for_training
from layerskip_core.errors import CheckpointError
from layerskip_core.export import gguf_file
from layerskip_core.export.gguf_file import write_gguf
from layerskip_core.model.spec import ModelSpec

WRITTEN = {"gemma2": "gemma2", "phi3": "phi3", "starcoder2": "starcoder2"}  # besides what `export` writes
SIZES = {"qwen3": {"head_dim": 128}, "gemma3_text": {"sliding_window": 5}}


def written(model_type, path, kind="f16", **changes):
    """A tiny model of random weights as a GGUF file."""
    sizes = {**CHANGES.get(model_type, {}), **SIZES.get(model_type, {}), **changes}
    model = tiny_model(model_type, torch.float32, vocab_size=300, **sizes)
    tokenizer = text_bpe() if model_type.startswith("gemma") else tiny_loaded().tokenizer
    write_gguf(model, tokenizer, ModelSpec.of(model.config), path, kind)


def by_transformers(path):
    """transformers' own model, configuration and tokenizer of a GGUF file."""
    names = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **names, quantization_config=GgufConfig(dequantize=True))
    return model, AutoTokenizer.from_pretrained(path.parent, **names)


def described(config):
    """What of a configuration is the model's."""
    left_out = ("_name_or_path", "architectures", "dtype", "quantization_config")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2"])
def test_a_file_is_read_as_transformers_reads_it(model_type, tmp_path, monkeypatch):
    for known, name in WRITTEN.items():
        monkeypatch.setitem(gguf_file._ARCHITECTURES, known, name)
    monkeypatch.setattr(gguf_file, "_check", lambda spec: None)
    path = tmp_path / "model.gguf"
    written(model_type, path)
    model, tokenizer = by_transformers(path)
    read = for_training(str(path), "cpu", "fp32")
    assert described(read.model.config) == described(model.config)
    assert read.model.generation_config.to_dict() == model.generation_config.to_dict()
    for name, weight in model.named_parameters():
        assert torch.equal(read.model.get_parameter(name), weight), name
    assert type(read.tokenizer) is type(tokenizer)
    assert read.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert read.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert [read.tokenizer(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def retyped(path, kinds, random):
    """The file with its matrices stored as these kinds, one after another, with random content."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("retyped.gguf"), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    left = list(kinds)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) == 2 and shape[1] % 256 == 0 and tensor.name.startswith("blk.") and left:
            kind = left.pop()
            size = gguf.quants.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor(tensor.name, random.integers(0, 100, size, np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    assert not left
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("retyped.gguf")


def test_every_kind_of_weight_has_the_values_that_transformers_reads(tmp_path):
    written(
        "llama", tmp_path / "model.gguf", hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=4
    )
    kinds = list(gguf.quants._type_traits)
    path = retyped(tmp_path / "model.gguf", kinds, np.random.default_rng(0))
    model, _ = by_transformers(path)
    file = GgufModel(path)
    file.check_weights()
    weights = file.weights()
    assert {tensor.kind for tensor in read_gguf_header(path).tensors.values()} >= set(map(int, kinds))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=0, atol=0, equal_nan=True)


def test_the_file_is_read_once(tmp_path, monkeypatch):
    written("llama", tmp_path / "model.gguf")
    headers, parsed = [], []
    monkeypatch.setattr(gguf_read, "read_gguf_header", lambda path: headers.append(path) or read_gguf_header(path))
    begin = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *rest: parsed.append(rest) or begin(self, *rest))
    assert run("import", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "imported")).code == 0
    assert len(headers) == 1
    assert len(parsed) <= 1  # by transformers 5.17 for its tokenizer; by newer ones never


@pytest.mark.parametrize(
    ("kind", "exact_in", "asked", "expected"),
    [
        ("f16", torch.bfloat16, "auto", torch.bfloat16),
        ("f16", torch.float16, "auto", torch.float16),
        ("q8_0", torch.bfloat16, "auto", torch.float32),
        ("q8_0", torch.bfloat16, "bf16", torch.bfloat16),
        ("f16", torch.float16, "fp32", torch.float32),
    ],
)
def test_the_precision_that_is_written(kind, exact_in, asked, expected, tmp_path):
    model = tiny_model("llama", torch.float32, vocab_size=300)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(exact_in).float()
    path, output = tmp_path / "model.gguf", tmp_path / "imported"
    write_gguf(model, tiny_loaded().tokenizer, ModelSpec.of(model.config), path, kind)
    assert run("import", str(path), "--output", str(output), "--dtype", asked).code == 0
    stored, read = load_file(output / "model.safetensors"), GgufModel(path).weights()
    assert {weight.dtype for weight in stored.values()} == {expected}
    assert json.loads((output / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    for name, weight in stored.items():
        assert torch.equal(weight, read[name].to(expected)), name


def after(content, name):
    return content.index(name.encode()) + len(name)


def put(name, code, value, skip=4):
    """Changes a number after a name: for a key, after its type."""

    def change(content):
        at = after(content, name) + skip
        content[at : at + struct.calcsize(code)] = struct.pack(code, value)

    return change


def renamed(name, other):
    def change(content):
        at = content.index(name.encode())
        content[at : at + len(name)] = other.encode()

    return change


UP = "blk.0.ffn_up.weight"
KIND = 4 + 2 * 8  # after a matrix's name: its number of dimensions and these


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("llama", "gpt-2"), "the GGUF architecture must be one of llama, qwen2, .*, found gpt-2"),
        (renamed("llama.block_count", "llama.block_kount"), r"model\.gguf has no llama\.block_count"),
        (renamed("tokenizer.ggml.tokens", "tokenizer.ggml.pieces"), "has no tokenizer: tokenizer.ggml.tokens is missing"),
        (put("tokenizer.ggml.eos_token_id", "<I", 300), "eos_token_id must be one of 300 tokens, got 300"),
        (renamed(UP, "blk.0.ffn_uq.weight"), r"1 weights are missing, model\.layers\.0\.mlp\.up_proj\.weight the first"),
        (renamed(UP, "blk.1.ffn_up.weight"), "is damaged: two tensors have the same name"),
        (put(UP, "<I", 77, KIND), "up_proj.weight is stored in a way that the library gguf does not read: 77 is not a valid"),
        (put(UP, "<I", 26, KIND), "does not read: Dequantization for I32 is not yet implemented"),
        (put(UP, "<I", 12, KIND), "does not read: Quantized tensor row size"),
        (lambda content: content.__delitem__(slice(-40, None)), r"is damaged: \S+ ends at byte \d+ of \d+"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_file_is_one_error(change, message, tmp_path):
    path, output = tmp_path / "model.gguf", tmp_path / "imported"
    written("llama", path)
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    result = run("import", str(path), "--output", str(output))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1) and not output.exists()
    with pytest.raises(CheckpointError, match=message):
        for_training(str(path), "cpu", "fp32")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    written("llama", tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(
        "a .gguf file needs the library gguf: pip install 'layerskip[gguf]'",
        *("import", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "imported")),
    )
