"""Adapters are merged into their base, also in chains; damaged ones are refused before peft reads them."""

import json

import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.transformers_read import stored_dtype
from layerskip_core.errors import CheckpointError


def adapter(folder, base, rank=4, **changes):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "task_type": "CAUSAL_LM", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_circle_of_adapters(tmp_path):
    first, second = adapter(tmp_path / "first", tmp_path / "second"), adapter(tmp_path / "second", tmp_path / "first")
    alone = adapter(tmp_path / "alone", tmp_path / "alone")
    for folder in (first, second, alone):
        for load in (for_training, stored_dtype):
            with pytest.raises(CheckpointError, match=r"adapter_config\.json names a base that needs this adapter itself"):
                load(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("{}", "base_model_name_or_path must be the name of a model, got None"),
        ('{"base_model_name_or_path": 7}', "base_model_name_or_path must be the name of a model, got 7"),
    ],
)
def test_damaged_adapters(tmp_path, content, message):
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/adapter_config\.json: {message}"):
        for_training(str(tmp_path))


def test_an_adapter_without_one_of_its_weights(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(for_training(checkpoint, "cpu", "fp32").model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=checkpoint)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    message = r"the adapter is incomplete: 1 weights are missing, .*q_proj\.lora_B\.weight the"
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
