"""Mixtures of experts, beside what test_native.py, test_packed.py and others ask of every
architecture.
"""

import pytest
import torch
from command_line import fails
from conftest import CHANGES, ids_of, logits_of, require_near, tiny_model
from decodings import native_or_skip
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from training_runs import recipe_module
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint.folder import open_weights
from layerskip_core.checkpoint.save import save_checkpoint, write_model
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.training import RecipeSettings
from layerskip_core.decoding.drafters.bandit import PassTimes
from layerskip_core.model import ModelSpec, TorchBackend, missing_feature
from layerskip_core.model.native import suits_kernels

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MIXTURES = ("granitemoe", "mixtral", "olmoe", "qwen3_moe")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_weights_in_parts_are_read_as_the_model_has_them(model_type, tmp_path):
    model = tiny_model(model_type, torch.float32, **CHANGES[model_type])
    model.save_pretrained(tmp_path)
    files = open_weights(tmp_path, ModelSpec.of(model.config))
    stored = open_weights(tmp_path)
    assert files.keys() == {name for name, _ in model.named_parameters()} != stored.keys()
    for name, weight in model.named_parameters():
        for read in (files[name].read, files[name].mapped):
            assert torch.equal(read(name), weight) and files[name].entries[name] == (
                "F32",
                tuple(weight.shape),
            )


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_checkpoint_of_training_has_the_weights_as_they_are(model_type, tmp_path):
    model, other = (tiny_model(model_type, torch.float32, **CHANGES[model_type]) for _ in range(2))
    for weight in other.parameters():
        torch.nn.init.zeros_(weight)
    write_model(model, tmp_path, as_it_is=True)
    recipe_module(other, RecipeSettings("none")).load(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(other.get_parameter(name), weight) and torch.equal(
            read.get_parameter(name), weight
        )


def test_a_weight_without_one_of_its_parts_is_missing(tmp_path):
    loaded = tiny_loaded(torch.float32)
    model = tiny_model("olmoe", torch.float32, **CHANGES["olmoe"])
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(tmp_path / "model"), torch.float32)
    folder = str(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    missing = "1 weights are missing, model.layers.2.mlp.experts.gate_up_proj the first"
    fails(f"cannot load model {folder}: {missing}", "generate", "a", f"--model {folder}")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_low_bit_experts_on_torchs_kernels_are_near_the_model(quantize):
    model = tiny_model("olmoe", torch.float32, **{**WIDE, **CHANGES["olmoe"]})
    with torch.no_grad():
        expected = model(ids_of(2, 12)).logits
    found = logits_of(TorchBackend.of(model, PackingConfig(quantize)), ids_of(2, 12))
    assert (found - expected).std() < {"int8": 0.1, "int4": 0.6}[quantize] * expected.std()


def test_clipped_projections_are_left_to_transformers():
    clipped = ModelSpec.of(
        tiny_model("olmoe", torch.float32, clip_qkv=2.0, **CHANGES["olmoe"]).config
    )
    assert missing_feature(clipped) == "projections clipped at 2"


def test_a_pass_of_more_tokens_reads_more_experts():
    """Of 8 experts a token chooses 3; n tokens miss an expert with probability (5/8)^n. An expert
    has 3 * 48 * 32 weights.
    """
    spec = ModelSpec.of(tiny_model("olmoe", torch.float32, **CHANGES["olmoe"]).config)
    experts = 6 * 8 * 3 * 48 * 32
    rest = spec.parameters - 67 * 32 - experts
    for rows in (1, 2, 9):
        assert spec.weights_read(rows) == pytest.approx(rest + experts * (1 - (5 / 8) ** rows))
    dense = ModelSpec.of(tiny_model("llama", torch.float32).config)
    assert dense.weights_read(1) == dense.weights_read(9) == dense.parameters - 67 * 32
    ours = PassTimes.usual(0.1, spec)
    theirs = PassTimes.usual(0.1, dense)
    assert ours.time_of(1) == theirs.time_of(1) == 1 and ours.time_of(2) > 1.3 > theirs.time_of(2)
    assert all(ours.time_of(n) > theirs.time_of(n) for n in range(2, 41))


@pytest.mark.parametrize(
    "model_type, needed", [("olmoe", "without experts"), ("gpt2", "that stores weights by outputs")]
)
def test_calibration_refuses_experts_and_transposed_weights(tmp_path, model_type, needed):
    loaded = tiny_loaded(torch.float32)
    sizes = {"vocab_size": len(loaded.tokenizer), "eos_token_id": loaded.tokenizer.eos_token_id}
    model = tiny_model(model_type, torch.float32, **{**WIDE, **CHANGES[model_type], **sizes})
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(tmp_path / "model"), torch.float32)
    fails(
        f"calibration needs a --model {needed}, got {model_type}",
        f"calibrate --model {tmp_path}/model",
    )


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "qwen3_5_moe_text", "qwen3_next"])
@pytest.mark.parametrize("changes", [{}, {"position_embedding_type": "rope"}])
def test_experts_beside_what_all_tokens_share(model_type, changes):
    """As the model has them, in any division of the text into calls; or, where these are no whole
    experts, nowhere.
    """
    shared = (
        "shared_intermediate_size"
        if model_type == "granitemoehybrid"
        else "shared_expert_intermediate_size"
    )
    sizes = {
        **WIDE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        **changes,
    }
    for width in (32, 96):
        model = tiny_model(model_type, torch.float32, **sizes, **{shared: width})
        with torch.no_grad():
            expected = model(ids_of(2, 12)).logits
        backend = native_or_skip(model)
        whole = logits_of(backend, ids_of(2, 12))
        require_near(whole, expected, 1e-3)
        assert torch.equal(logits_of(backend, ids_of(2, 12), range(1, 12)), whole)
    spec = ModelSpec.of(tiny_model(model_type, torch.float32, **sizes, **{shared: 40}).config)
    assert missing_feature(spec) and not suits_kernels(
        spec, torch.float32, torch.device("cpu"), None
    )
