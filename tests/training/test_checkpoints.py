"""Weights of checkpoints that do not fit."""

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.save import write_model
from layerskip_core.errors import CheckpointError
from layerskip_core.training.checkpoints import load_weights


def adapted():
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize(("make", "file", "name"), [
    (tiny_model, "model.safetensors", "model.layers.2.mlp.up_proj.weight"),
    (adapted, "adapter_model.safetensors", "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(make, file, name, tmp_path):
    write_model(make(), tmp_path)
    weights = load_file(tmp_path / file)
    other = name.replace("layers.2", "layers.9")
    save_file({other if key == name else key: weight for key, weight in weights.items()}, tmp_path / file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not fit the model: missing {name}; unknown .*layers.9"):
        load_weights(make(), tmp_path)
