"""Layers that share keys and read tokens (Gemma 4): what is kept of a token, what is read, and
which layers run.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import logits_of, tiny_model
from decodings import native_or_skip, plainly, prompt_of
from evaluating import tiny_loaded

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.target import FixedTarget
from layerskip_core.errors import CheckpointError
from layerskip_core.model import ModelSpec
from layerskip_core.model.pages import PAGE


def test_pages_hold_the_layers_that_have_keys():
    """Three of six: two with heads of 16 numbers, one of 8; for 2 heads, keys and values, in
    fp32.
    """
    backend = native_or_skip(tiny_model("gemma4_text", torch.float32))
    assert backend.spec.attending == (0, 1, 2) and [
        size.source for size in backend.spec.sizes[3:]
    ] == [1, 2, 2]
    assert backend._pool.page_bytes == PAGE * 2 * 2 * (16 + 8 + 16) * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_table_stays_in_its_file(tmp_path, dtype):
    """In the precision of the file, whatever the model runs in."""
    tokenizer = tiny_loaded().tokenizer
    model = tiny_model("gemma4_text", torch.float32, vocab_size=len(tokenizer))
    save_checkpoint(model, tokenizer, tiny_loaded().info, str(tmp_path), torch.bfloat16)
    native_or_skip(model)
    backend = for_decoding(str(tmp_path), "cpu", dtype).backend
    table, _ = backend._inputs._tensors
    assert (
        table.dtype == torch.bfloat16
        and backend.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )
    if sys.platform == "linux":
        maps = [
            line.split()
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith("model.safetensors")
        ]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
        assert any(start <= table.data_ptr() < stop for start, stop in ranges)
    assert backend.spec.parameters - backend.spec.weights_read(1) == table.numel()


def test_tokens_that_are_not_scored_run_the_layers_that_keep_something(monkeypatch):
    """The first three of six, in pieces of prompts; and all layers where all states are wanted."""
    backend = native_or_skip(tiny_model("gemma4_text", torch.float32, max_position_embeddings=512))
    prompt = prompt_of(300)
    expected = logits_of(backend, torch.tensor([prompt]))[0, -1]
    seen = []
    run_layers = backend.run_layers
    monkeypatch.setattr(
        backend,
        "run_layers",
        lambda hidden, *at: seen.append((len(hidden), *at[:2])) or run_layers(hidden, *at),
    )
    target = FixedTarget(backend, DecodingConfig("autoregressive"))
    cache = backend.new_cache(2)
    with torch.inference_mode():
        assert (
            target.run_mixed(torch.tensor(prompt[:150] * 2), cache.span(0, 150), []).logits is None
        )
        output = target.run_mixed(torch.tensor(prompt[150:] * 2), cache.span(150, 300), [149, 299])
    assert seen == [(300, 0, 3), (300, 0, 3), (2, 3, 6)]
    assert torch.equal(output.logits[0], expected) and torch.equal(output.logits[1], expected)
    monkeypatch.undo()
    options = {"max_new_tokens": 5, "logprobs": 1, "prompt_logprobs": True}
    decoding = decode(backend, prompt, DecodingConfig("autoregressive", **options))
    ids = [token for [step] in decoding for token in step.ids]
    assert ids == plainly(backend, prompt, 5)


def test_layers_are_numbered_as_transformers_does():
    """Of ten and more, with zeros before."""
    config = tiny_model("gemma4_text", torch.float32, num_hidden_layers=11).config
    assert "00" in config.to_dict()["per_layer_config"]
    sizes = ModelSpec.of(config).sizes
    assert [size.head_dim for size in sizes] == [16, 8] * 5 + [16]
    assert [size.source for size in sizes] == [None] * 8 + [6, 7, 6]


def test_sizes_that_do_not_fit_together():
    config = tiny_model("gemma4_text", torch.float32).config
    for changes, message in (
        (
            {"num_kv_shared_layers": 5},
            "num_kv_shared_layers must be so few that a layer of each kind has keys and values, got 5",
        ),
        (
            {"per_layer_config": {"0": {"head_dim": 24}}},
            "head_dim in per_layer_config must be the same in all layers of a kind",
        ),
        ({"per_layer_config": {"0": {"head_dim": 7}}}, "per_layer_config must be .*"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ModelSpec.of(SimpleNamespace(**{**config.to_dict(), **changes}))
