"""A GGUF file's header is checked before anything is built from it."""

import struct
from math import nan

import gguf
import pytest
import torch
from command_line import run
from evaluating import tiny_loaded
from gguf_file import write_gguf
from safetensors.torch import save_file

from layerskip_core.checkpoint.gguf_header import read_gguf_header
from layerskip_core.checkpoint.load import blank as blank_model
from layerskip_core.checkpoint.load import for_training
from layerskip_core.errors import CheckpointError


@pytest.fixture
def file(checkpoint, tmp_path):
    write_gguf(checkpoint, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_header_of_a_gguf_file(file):
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.parameters == sum(weight.numel() for weight in tiny_loaded(torch.float32).backend.model.parameters())


def test_loading_a_gguf_file_prints_nothing(file, capfd):
    for_training(str(file), "cpu", "fp32")
    assert capfd.readouterr() == ("", "")


def test_other_weights_in_the_folder_of_a_gguf_file_do_not_matter(file):
    save_file({"model.norm.weight": torch.zeros(3)}, file.parent / "model.safetensors")
    loaded = for_training(str(file), "cpu", "fp32")
    torch.testing.assert_close(loaded.model.model.norm.weight, tiny_loaded(torch.float32).backend.model.model.norm.weight)


def patched(file, key, code, value):
    """Changes the number at a key of the header."""
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
        # After an array's key: its type, then the type of its entries, then their count.
        (lambda f: patched(f, "tokenizer.ggml.tokens", "<IQ", (8, 1 << 60)), "is damaged: .* texts do not fit into"),
        (lambda f: f.write_bytes(f.read_bytes()[:8] + struct.pack("<Q", 1 << 60) + f.read_bytes()[16:]), "tensors do not fit"),
        (lambda f: f.write_bytes(f.read_bytes()[:16] + struct.pack("<Q", 1 << 60) + f.read_bytes()[24:]), "entries do not fit"),
        (lambda f: f.write_bytes(f.read_bytes()[:3000]), "ends in its header, after 3000 bytes"),
        (lambda f: f.write_bytes(f.read_bytes()[:-60000]), "is damaged: tensor .* does not fit into"),
        (lambda f: f.write_bytes(b"GGUF"), r"tiny\.gguf is no GGUF file: it has 4 bytes"),
        (lambda f: f.write_bytes(b"x" * 100), r"tiny\.gguf is no GGUF file"),
    ],
)  # fmt: skip
def test_gguf_headers_that_do_not_match_the_file(file, damage, message, monkeypatch):
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("a tensor was read"))
    damage(file)
    result = run("import", str(file), "--output", str(file.parent / "out"))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1) and not (file.parent / "out").exists()
    for load in (for_training, lambda name: blank_model(name, 0)):
        with pytest.raises(CheckpointError, match=f"cannot load model {file}: .*{message}"):
            load(str(file))
