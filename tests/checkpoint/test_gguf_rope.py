"""Scaled ropes of GGUF files: those that are read give the frequencies of the original, others are refused."""

import gguf
import numpy as np
import pytest
import torch
from command_line import run
from conftest import CHANGES, tiny_model
from evaluating import tiny_loaded
from text_bpe import text_bpe

from layerskip_core.checkpoint.gguf_read import GgufModel
from layerskip_core.checkpoint.load import for_training
from layerskip_core.errors import CheckpointError
from layerskip_core.export import gguf_file
from layerskip_core.export.gguf_file import write_gguf
from layerskip_core.model.rope import llama3_factors, rope_frequencies
from layerskip_core.model.spec import ModelSpec

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# Of the 1B model: its frequencies have other factors than the tiny model's.
LLAMA32 = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}


def written(path, rope, model_type="llama", **changes):
    model = tiny_model(
        model_type, torch.float32, vocab_size=300, rope_parameters=rope, **{**CHANGES.get(model_type, {}), **changes}
    )
    tokenizer = text_bpe() if model_type.startswith("gemma") else tiny_loaded().tokenizer
    write_gguf(model, tokenizer, ModelSpec.of(model.config), path, "f16")
    return model


def changed(path, values=(), tensors=()):
    """A copy of the file with values and tensors added or replaced."""
    reader, other = gguf.GGUFReader(path), path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(other, "llama")
    new = dict(values)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *new):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for name, value in new.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    extra = dict(tensors)
    for tensor in reader.tensors:
        if tensor.name not in extra:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, numbers in extra.items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


def frequencies(config):
    spec = ModelSpec.of(config)
    return [rope_frequencies(config, spec, rope) for rope in spec.ropes]


def assert_same_ropes(config, expected):
    for (found, scaling), (known, factor) in zip(frequencies(config), frequencies(expected), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=0)
        assert scaling == pytest.approx(factor)


@pytest.mark.parametrize("rope", [LLAMA3, LLAMA32, LINEAR], ids=["llama3", "llama3.2", "linear"])
def test_what_export_writes_is_read_back(rope, tmp_path):
    model = written(tmp_path / "model.gguf", rope, head_dim=64, max_position_embeddings=512)
    read = for_training(str(tmp_path / "model.gguf"), "cpu", "fp32").model
    assert read.config.rope_parameters == rope
    assert_same_ropes(read.config, model.config)
    ids = torch.arange(1, 200)[None]
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)  # weights in f16


def test_only_the_full_attention_of_gemma_3_is_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_check", lambda spec: None)
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = written(tmp_path / "model.gguf", rope, "gemma3_text", sliding_window=5)
    config = GgufModel(tmp_path / "model.gguf").config
    assert config.rope_parameters == rope
    assert_same_ropes(config, model.config)


def test_yarn_and_old_names_are_read(tmp_path):
    written(tmp_path / "model.gguf", {"rope_type": "default", "rope_theta": 1e4})
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = changed(tmp_path / "model.gguf", {**scaling, "llama.rope.scaling.original_context_length": 32.0})
    assert GgufModel(path).config.rope_parameters == YARN
    assert_same_ropes(GgufModel(path).config, tiny_model("llama", torch.float32, rope_parameters=YARN).config)
    for values in ({"llama.rope.scale_linear": 4.0}, {"llama.rope.scaling.factor": 4.0}):
        assert GgufModel(changed(tmp_path / "model.gguf", values)).config.rope_parameters == LINEAR
    for values in ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"llama.rope.scaling.factor": 0.0}):
        plain = GgufModel(changed(tmp_path / "model.gguf", values)).config
        assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    ones = changed(tmp_path / "model.gguf", tensors={"rope_freqs.weight": [1.0] * 4})
    assert GgufModel(ones).config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("values", "tensors", "why"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "found a rope of type longrope"),
        ({}, {"rope_factors_long.weight": [1.0] * 4}, "found rope_factors_long.weight, of a longrope"),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, r"found llama.rope.scaling.attn_factor 2.0"),
        ({"llama.rope.scaling.factor": -4.0}, {}, r"rope.scaling.factor must be a number from 1 to 10000, got -4.0"),
        ({}, {"rope_freqs.weight": [1.0, 2.0, 3.0, 8.0]}, "found rope_freqs.weight with factors other than those of Llama 3"),
        ({}, {"rope_freqs.weight": [1.0, 8.0]}, r"found rope_freqs.weight of shape \(2,\), where 4 numbers in fp32"),
    ],
)
def test_other_ropes_are_refused(values, tensors, why, tmp_path):
    written(tmp_path / "model.gguf", {"rope_type": "default", "rope_theta": 1e4})
    path = changed(tmp_path / "model.gguf", values, tensors)
    with pytest.raises(CheckpointError, match=why):
        GgufModel(path)
    done = run("import", str(path), "--output", str(tmp_path / "imported"))
    assert done.code == 1 and "changed.gguf" in done.err and not (tmp_path / "imported").exists()


def test_factors_beyond_the_file_are_damage(tmp_path):
    written(tmp_path / "model.gguf", {"rope_type": "default", "rope_theta": 1e4})
    path = changed(tmp_path / "model.gguf", tensors={"rope_freqs.weight": llama3_factors(LLAMA3, 8).tolist()})
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(CheckpointError, match=r"damaged: rope_freqs.weight ends after the file"):
        GgufModel(path)
