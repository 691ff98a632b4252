"""An exit as a model of its own has the logits of the exit, in every architecture."""

import pytest
import torch
from conftest import ATTENTION, CHANGES, tiny_model
from exit_block_models import random_blocks
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import Trainable
from layerskip_core.errors import ConfigError
from layerskip_core.export.run import cut_config, cut_to_exit
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED
from layerskip_core.model.exit_blocks import NO_BLOCKS, ExitBlock

IDS = torch.randint(3, 67, (2, 11), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(11).expand(2, -1)
WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 5}  # from layer 2 on, counted from 0


def tiny(model_type, **changes):
    model = tiny_model(model_type, torch.float32, **CHANGES.get(model_type, {}), **changes)
    return Trainable("tiny", model, TransformersBackend(model), None, CheckpointInfo())


@torch.no_grad()
def written_logits(model, folder):
    """Those of the files, read by transformers alone."""
    model.save_pretrained(folder)
    kernels = ATTENTION.get(model.config.model_type)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernels)(IDS).logits


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_an_exit_without_a_block(model_type, tmp_path):
    loaded = tiny(model_type, **(WINDOWS if model_type in ("qwen2", "qwen3", "smollm3") else {}))
    with torch.no_grad():
        early = loaded.backend.run_layers(loaded.backend.embed(IDS), 0, 3, POSITIONS)
        expected = loaded.backend.unembed(early)
        whole = loaded.model(IDS).logits
    actual = written_logits(cut_to_exit(loaded, 3, NO_BLOCKS), tmp_path)
    torch.testing.assert_close(actual, expected)
    assert (whole - expected).abs().max() > 0.1


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_an_exit_with_a_block(model_type, tmp_path):
    """Layers of the first kind, and a block of the kind of the last, which has another window or no positions."""
    loaded = tiny(model_type, **(WINDOWS if model_type in ("qwen2", "qwen3", "smollm3") else {}))
    blocks = random_blocks(loaded.model, ExitBlock(2), ExitBlock(4))
    backend = TransformersBackend(loaded.model, blocks)
    block = backend.exit_blocks[2]
    with torch.no_grad():
        early = backend.run_layers(backend.embed(IDS), 0, 2, POSITIONS)
        expected = block.head(backend.run_layers(early, block.layer, block.layer + 1, POSITIONS))
        without = backend.unembed(early)
    actual = written_logits(cut_to_exit(loaded, 2, blocks), tmp_path)
    torch.testing.assert_close(actual, expected)
    assert (without - expected).abs().max() > 0.1


def test_a_tied_head_stays_tied(tmp_path):
    from safetensors.torch import load_file

    loaded = tiny("llama", tie_word_embeddings=True)
    written_logits(cut_to_exit(loaded, 1, NO_BLOCKS), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_values_by_layer_follow_the_layers_that_are_kept():
    sliding, full = "sliding_attention", "full_attention"
    qwen = cut_config(tiny("qwen2", **WINDOWS).model.config, [0, 5])
    assert (qwen.num_hidden_layers, qwen.layer_types, qwen.max_window_layers) == (2, [full, sliding], 1)
    listed = {"no_rope_layers": [1, 0, 1, 1, 1, 0]}
    smollm = cut_config(tiny("smollm3", **listed).model.config, [0, 1, 2, 5])
    assert (smollm.no_rope_layers, len(smollm.layer_types)) == ([1, 0, 1, 0], 4)
    gemma = cut_config(tiny("gemma3_text", layer_types=[sliding, full] * 3).model.config, [0, 1, 2])
    assert gemma.layer_types == [sliding, full, sliding]


def test_a_block_that_reads_the_final_states_is_refused():
    loaded = tiny("llama")
    blocks = random_blocks(loaded.model, ExitBlock(2, "final"))
    with pytest.raises(ConfigError, match=r"`exit_layer` 2 cannot be a model of its own: .* \(feature final\)"):
        cut_to_exit(loaded, 2, blocks)
    assert loaded.model.config.num_hidden_layers == 6
