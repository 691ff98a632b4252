"""Weights that transformers keeps in fp32, such as corrections of routers, are in fp32 wherever a
model is read or written.
"""

import shutil
from copy import deepcopy

import decoder_types
import pytest
import torch
from command_line import run
from evaluating import tiny_loaded
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.model_weights import cast_weights
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import FinetuneConfig, RecipeSettings
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock, blocks_named
from layerskip_core.training.exit_blocks import FrozenExits
from layerskip_core.training.run import execute, prepare

ROUTED = ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "nemotron_h"]
_CORRECTION = "e_score_correction_bias"


def routed_model(model_type):
    """In fp32. No weight is on the grid of bf16."""
    config = deepcopy(decoder_types.tiny(model_type).config)
    config.vocab_size = len(tiny_loaded(torch.float32).tokenizer)
    if model_type == "nemotron_h":
        config.layers_block_type = ["linear_attention", "full_attention", "moe", "full_attention"]
        config.moe_shared_expert_intermediate_size = 24
        config.moe_latent_size = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.copy_(
                1 + torch.rand_like(weight) if weight.dim() < 2 else 0.2 * torch.randn_like(weight)
            )
    return model


@pytest.fixture(params=ROUTED)
def folder(request, tmp_path):
    tokenizer = tiny_loaded(torch.float32).tokenizer
    save_checkpoint(
        routed_model(request.param),
        tokenizer,
        CheckpointInfo("{prompt}\n"),
        str(tmp_path / "fp32"),
        torch.float32,
    )
    return tmp_path / "fp32"


def by_transformers(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


def require_same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def test_a_model_is_read_and_written_as_transformers_reads_it(folder, tmp_path):
    expected = by_transformers(folder, torch.bfloat16)
    kept = {name for name, weight in expected.items() if weight.dtype == torch.float32}
    assert any(name.endswith(_CORRECTION) for name in kept) and len(kept) < len(expected) / 2
    require_same(for_training(str(folder), "cpu", "bf16").model.state_dict(), expected)
    output = tmp_path / "bf16"
    assert run(f"import {folder} --output {output} --dtype bf16").code == 0
    require_same(by_transformers(output, "auto"), expected)
    stored = {
        name: weight
        for name, weight in load_file(output / "model.safetensors").items()
        if _CORRECTION in name
    }
    assert stored and all(weight.dtype == torch.float32 for weight in stored.values())


def test_a_training_keeps_what_no_step_changes(folder, tmp_path):
    """Readers of exits are copies of layers: their routers are stored like the model's."""
    output = tmp_path / "trained"
    half = shutil.copytree(folder, tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    settings = FinetuneConfig(
        model=str(half),
        data=DataConfig(limit=8),
        recipe=RecipeSettings("auto", exits=(2,)),
        output=str(output),
        steps=1,
        batch_size=2,
        replay=0.0,
        max_length=64,
        device="cpu",
        dtype="fp32",
    )
    execute(prepare(settings))
    before = by_transformers(half, "auto")
    after = by_transformers(output, "auto")
    corrections = [name for name in before if name.endswith(_CORRECTION)]
    assert corrections and {name: weight.dtype for name, weight in before.items()} == {
        name: weight.dtype for name, weight in after.items()
    }
    for name in corrections:
        assert torch.equal(after[name], before[name])
    assert list(for_decoding(str(output), "cpu").backend.exit_blocks) == [2]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_a_block_keeps_its_router(model_type):
    model = routed_model(model_type)
    module = FrozenExits(TransformersBackend(model), [ExitBlock(2)])
    stored = load(module.files(torch.bfloat16, NO_STORED_DRAFTERS, "")[EXIT_BLOCKS_FILE])
    assert [block.exit_layer for block in blocks_named(stored, model.config.num_hidden_layers)] == [
        2
    ]
    (correction,) = (weight for name, weight in stored.items() if name.endswith(_CORRECTION))
    original = next(
        weight
        for name, weight in reversed(model.state_dict().items())
        if name.endswith(_CORRECTION)
    )
    assert torch.equal(correction, original) and {weight.dtype for weight in stored.values()} == {
        torch.float32,
        torch.bfloat16,
    }


def test_buffers_that_are_not_stored_keep_their_precision():
    model = routed_model("deepseek_v3")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    cast_weights(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(
        model.model.rotary_emb.inv_freq, frequencies
    )
