"""GGUF files as transformers itself reads them, scaled ropes, and files that are no model."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from command_line import fails, run
from conftest import CHANGES, logits_of, random_rows, tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from text_bpe import TEXTS, text_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from layerskip_core.checkpoint.gguf_read import GgufFile
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.errors import CheckpointError
from layerskip_core.export import gguf as gguf_file
from layerskip_core.export.gguf import write_gguf
from layerskip_core.model.native.compiled import SWITCH, kernels
from layerskip_core.model.rope import rope_frequencies
from layerskip_core.model.spec import ModelSpec

# Besides what `export` writes
WRITTEN = {"gemma2": "gemma2", "phi3": "phi3", "starcoder2": "starcoder2"}
SIZES = {"qwen3": {"head_dim": 128}, "gemma3_text": {"sliding_window": 5}}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Of the 1B model: its frequencies have other factors than the tiny model's.
LLAMA32 = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}


def written(path, model_type="llama", kind="f16", **changes):
    """A tiny model of random weights, written to a GGUF file."""
    sizes = {**CHANGES.get(model_type, {}), **SIZES.get(model_type, {}), **changes}
    model = tiny_model(model_type, torch.float32, vocab_size=300, **sizes)
    tokenizer = text_bpe() if model_type.startswith("gemma") else tiny_loaded().tokenizer
    write_gguf(model, tokenizer, ModelSpec.of(model.config), path, kind)
    return model


def by_transformers(path):
    """transformers' own model, configuration and tokenizer of a GGUF file."""
    names = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, **names, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(path.parent, **names)


def described(config):
    """What of a configuration is the model's."""
    left_out = ("_name_or_path", "architectures", "dtype", "quantization_config")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2"]
)
def test_a_file_is_read_as_transformers_reads_it(model_type, tmp_path, monkeypatch, capfd):
    for known, name in WRITTEN.items():
        monkeypatch.setitem(gguf_file._ARCHITECTURES, known, name)
    monkeypatch.setattr(gguf_file, "_check", lambda spec: None)
    path = tmp_path / "model.gguf"
    written(path, model_type)
    model, tokenizer = by_transformers(path)
    # Which is not read
    save_file({"model.norm.weight": torch.zeros(3)}, path.with_name("model.safetensors"))
    capfd.readouterr()
    read = for_training(str(path), "cpu", "fp32")
    assert capfd.readouterr() == ("", "")
    assert described(read.model.config) == described(model.config)
    assert read.model.generation_config.to_dict() == model.generation_config.to_dict()
    for name, weight in model.named_parameters():
        assert torch.equal(read.model.get_parameter(name), weight), name
    assert type(read.tokenizer) is type(tokenizer)
    assert read.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert read.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert [read.tokenizer(text)["input_ids"] for text in TEXTS] == [
        tokenizer(text)["input_ids"] for text in TEXTS
    ]


def rewritten(path, values=(), tensors=(), stored=lambda tensor: (tensor.data, tensor.tensor_type)):
    """A copy of the file with values and tensors added or replaced; `stored`: the content and kind
    of each other tensor.
    """
    reader = gguf.GGUFReader(path)
    other = path.with_name("rewritten.gguf")
    writer = gguf.GGUFWriter(other, "llama")
    new = dict(values)
    extra = dict(tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *new):
            writer.add_key_value(
                name,
                field.contents(),
                field.types[0],
                field.types[1] if len(field.types) > 1 else None,
            )
    for name, value in new.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    for tensor in reader.tensors:
        if tensor.name not in extra:
            content, kind = stored(tensor)
            writer.add_tensor(tensor.name, content, raw_dtype=kind)
    for name, numbers in extra.items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


def test_every_kind_of_weight_has_the_values_that_transformers_reads(tmp_path):
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    }
    written(tmp_path / "model.gguf", **sizes)
    left = list(gguf.quants._type_traits)
    random = np.random.default_rng(0)

    def stored(tensor):
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if not (
            len(shape) == 2 and shape[1] % 256 == 0 and tensor.name.startswith("blk.") and left
        ):
            return tensor.data, tensor.tensor_type
        kind = left.pop()
        return random.integers(
            0, 100, gguf.quants.quant_shape_to_byte_shape(shape, kind), np.uint8
        ), kind

    path = rewritten(tmp_path / "model.gguf", stored=stored)
    assert not left
    model, _ = by_transformers(path)
    for name, weight in GgufFile(path).weights().items():
        torch.testing.assert_close(
            weight, model.get_parameter(name).detach(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(
    "kind, exact_in, asked, expected",
    [
        ("f16", torch.bfloat16, "auto", torch.bfloat16),
        ("f16", torch.float16, "auto", torch.float16),
        ("q8_0", torch.bfloat16, "auto", torch.float32),
        ("q8_0", torch.bfloat16, "bf16", torch.bfloat16),
    ],
)
def test_the_precision_that_is_written(kind, exact_in, asked, expected, tmp_path):
    model = tiny_model("llama", torch.float32, vocab_size=300)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(exact_in).float()
    path = tmp_path / "model.gguf"
    output = tmp_path / "imported"
    write_gguf(model, tiny_loaded().tokenizer, ModelSpec.of(model.config), path, kind)
    (tmp_path / "eagle3").mkdir()  # beside the file, but not of its model
    assert run(f"import {path} --output {output} --dtype {asked}").code == 0
    stored = load_file(output / "model.safetensors")
    read = GgufFile(path).weights()
    assert {weight.dtype for weight in stored.values()} == {expected}
    assert json.loads((output / "config.json").read_text())["dtype"] == str(expected).removeprefix(
        "torch."
    )
    for name, weight in stored.items():
        assert torch.equal(weight, read[name].to(expected)), name


BIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 3,
}


def in_types(tensor, types):
    """Matrices of layers as random blocks of these types in turns; else as they are."""
    kind = gguf.GGMLQuantizationType[types[sum(map(ord, tensor.name)) % len(types)]]
    if not (len(tensor.shape) == 2 and tensor.name.startswith("blk.")):
        return tensor.data, tensor.tensor_type
    return random_rows(kind.name, *(int(size) for size in reversed(tensor.shape))).as_subclass(
        torch.Tensor
    ).numpy(), kind


@pytest.mark.parametrize(
    "model_type, kind, types",
    [
        ("llama", "q8_0", ()),
        ("qwen2", "q4_0", ()),
        ("llama", "f16", ("Q4_K", "Q6_K")),
        ("llama", "f16", ("Q5_1", "Q5_0", "Q4_1")),
    ],
)
def test_a_file_is_decoded_with_its_weights_as_they_are_stored(model_type, kind, types, tmp_path):
    """Its outputs are those of the dequantised model in fp32, also where cache and embedding are in
    bf16.
    """
    if kernels() is None:
        pytest.skip("no kernels here")
    path = tmp_path / "model.gguf"
    written(path, model_type, kind, **BIG)
    if types:
        path = rewritten(path, stored=lambda tensor: in_types(tensor, types))
    read = for_training(str(path), "cpu", "fp32").model
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected = read(ids).logits
    for dtype, most in (("fp32", 1e-3), ("bf16", 0.05)):
        decoder = for_decoding(str(path), "cpu", dtype)
        assert decoder.backend.implementation.endswith("as stored)")
        assert (logits_of(decoder.backend, ids) - expected).std() < most * expected.std()
    command = (
        "generate",
        "wake me up",
        f"--model {path} --dtype fp32 --max-new-tokens 12 --raw --stats",
    )
    stored = run(*command)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(SWITCH, "torch")
        dequantised = run(*command)
    assert (stored.code, stored.out) == (0, dequantised.out)
    assert "as stored" in stored.err and "as stored" not in dequantised.err


def put(name, code, value, skip=4):
    """Changes a number after a name: for a key, after its type."""

    def change(content):
        at = content.index(name.encode()) + len(name) + skip
        content[at : at + struct.calcsize(code)] = struct.pack(
            code, *(value if isinstance(value, tuple) else (value,))
        )

    return change


def renamed(name, other):
    def change(content):
        at = content.index(name.encode())
        content[at : at + len(name)] = other.encode()

    return change


UP = "blk.0.ffn_up.weight"
KIND = 4 + 2 * 8  # after a matrix's name: its number of dimensions and these


@pytest.mark.parametrize(
    "change, message",
    [
        (renamed("llama", "gpt-2"), "the GGUF architecture must be one of llama, qwen2, .*, found gpt-2"),
        (renamed("llama.block_count", "llama.block_kount"), r"\d+ weights are missing"),
        (renamed("tokenizer.ggml.tokens", "tokenizer.ggml.pieces"), "has no tokenizer: tokenizer.ggml.tokens is missing"),
        (renamed(UP, "blk.0.ffn_uq.weight"), r"1 weights are missing, model\.layers\.0\.mlp\.up_proj\.weight the first"),
        (put("llama.block_count", "<I", 10**7), "num_hidden_layers must be"),
        (put("llama.block_count", "<I", 900), r"\d+ weights are missing"),
        (put(UP, "<I", 77, KIND), "is damaged, or no GGUF file: .*77"),
        (put(UP, "<I", 26, KIND), "is damaged, or no GGUF file|does not read: Dequantization for I32"),
        # After an array's key: its type, then the type of its entries, then their count.
        (put("tokenizer.ggml.tokens", "<IQ", (8, 1 << 60)), "is damaged, or no GGUF file"),
        (lambda content: content.__setitem__(slice(8, 16), struct.pack("<Q", 1 << 60)), "is damaged, or no GGUF file"),
        (lambda content: content.__delitem__(slice(3000, None)), "is damaged, or no GGUF file"),
        (lambda content: content.clear(), "is damaged, or no GGUF file"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_file_is_one_error(change, message, tmp_path):
    path = tmp_path / "model.gguf"
    written(path)
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        for_training(str(path), "cpu", "fp32")
    assert "\n" not in str(error.value)


def assert_same_ropes(config, expected):
    specs = [ModelSpec.of(known) for known in (config, expected)]
    found, known = [[rope_frequencies(spec, rope) for rope in spec.ropes] for spec in specs]
    for (frequencies, scaling), (right, factor) in zip(found, known, strict=True):
        torch.testing.assert_close(frequencies, right, rtol=1e-5, atol=0)
        assert scaling == pytest.approx(factor)


@pytest.mark.parametrize("rope", [LLAMA3, LLAMA32, LINEAR], ids=["llama3", "llama3.2", "linear"])
def test_the_scaled_rope_that_export_writes_is_read_back(rope, tmp_path):
    model = written(
        tmp_path / "model.gguf", rope_parameters=rope, head_dim=64, max_position_embeddings=512
    )
    read = for_training(str(tmp_path / "model.gguf"), "cpu", "fp32").model
    assert read.config.rope_parameters == rope
    assert_same_ropes(read.config, model.config)
    ids = torch.arange(1, 200)[None]
    # Weights in f16
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)


def test_yarn_and_old_names_are_read(tmp_path):
    path = tmp_path / "model.gguf"
    written(path, rope_parameters=PLAIN)
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32.0}
    for values, expected in (
        (yarn, YARN),
        ({"scale_linear": 4.0}, LINEAR),
        ({"scaling.factor": 4.0}, LINEAR),
        ({"scaling.type": "none", "scaling.factor": 4.0}, PLAIN),
        ({"scaling.factor": 0.0}, PLAIN),
    ):
        config = GgufFile(
            rewritten(path, {f"llama.rope.{name}": value for name, value in values.items()})
        ).config
        assert config.rope_parameters == expected
        assert_same_ropes(
            config, tiny_model("llama", torch.float32, rope_parameters=expected).config
        )
    ones = rewritten(path, tensors={"rope_freqs.weight": [1.0] * 4})
    assert GgufFile(ones).config.rope_parameters == PLAIN


@pytest.mark.parametrize(
    "values, tensors, why",
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "longrope"),
        ({}, {"rope_factors_long.weight": [1.0] * 4}, "found rope_factors_long.weight"),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, "attn_factor"),
        (
            {},
            {"rope_freqs.weight": [1.0, 2.0, 3.0, 8.0]},
            "rope_freqs.weight with other factors than those of Llama 3",
        ),
        ({}, {"rope_freqs.weight": [1.0, 8.0]}, "rope_freqs.weight with other factors"),
    ],
)
def test_other_ropes_are_refused(values, tensors, why, tmp_path):
    written(tmp_path / "model.gguf", rope_parameters=PLAIN)
    path = rewritten(tmp_path / "model.gguf", values, tensors)
    with pytest.raises(CheckpointError, match=why):
        _ = GgufFile(path).spec


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    written(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(
        "a .gguf file needs the library gguf: pip install 'layerskip[gguf]'",
        f"import {tmp_path}/model.gguf --output {tmp_path}/imported",
    )


def test_only_the_full_attention_of_gemma_3_is_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_check", lambda spec: None)
    rope = {"full_attention": LINEAR, "sliding_attention": PLAIN}
    model = written(tmp_path / "model.gguf", "gemma3_text", rope_parameters=rope)
    config = GgufFile(tmp_path / "model.gguf").config
    assert config.rope_parameters == rope
    assert_same_ropes(config, model.config)
