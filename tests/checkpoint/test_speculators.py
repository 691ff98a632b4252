"""Folders of drafters in the EAGLE-3 layout: those of other trainers are read, and what does not
fit is refused by name.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.sidecars import (
    default_layers,
    eagle3_content,
    eagle3_sidecar,
    read_eagle3,
)
from layerskip_core.errors import CheckpointError
from layerskip_core.model import ModelSpec
from layerskip_core.model.eagle3 import Eagle3, Eagle3Form, Eagle3Weights

CONFIG = tiny_model("llama", num_hidden_layers=9).config
SPEC = ModelSpec.of(CONFIG)
ROPE = {"rope_theta": 50_000.0, "rope_type": "default"}


@pytest.fixture
def folder(tmp_path):
    """As `finetune` writes it."""
    form = Eagle3Form(
        (2, 4, 6), SPEC.hidden, SPEC.heads, SPEC.kv_heads, SPEC.head_dim, 40, 11, 1e-6, ROPE
    )
    tokens = torch.arange(0, 55, 5)
    drafter = Eagle3(form, tokens)
    weights = {name: drafter.weight(name).detach() for name in form.shapes}
    stored = Eagle3Weights(form, tokens, weights)
    for name, content in eagle3_content(stored, SPEC, "the-target").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / "eagle3", stored


def changed(folder, config=lambda document: None, weights=lambda tensors: None):
    document = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    config(document)
    weights(tensors)
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")


def assert_same(found, stored):
    assert found.form == stored.form and torch.equal(found.tokens, stored.tokens)
    assert all(torch.equal(found.weights[name], weight) for name, weight in stored.weights.items())


def test_a_folder_is_read_back_unless_its_config_was_never_written(folder):
    assert_same(read_eagle3(folder[0], SPEC), folder[1])
    model = folder[0].parent
    assert_same(eagle3_sidecar(model, SPEC), folder[1])
    (model / "eagle3" / "config.json").unlink()
    assert eagle3_sidecar(model, SPEC) is None


def test_the_weights_have_the_names_and_shapes_of_sglang_s_loader(folder):
    """It leaves weights out that it does not know, without a word."""
    size = SPEC.hidden
    inner = 40
    queries = SPEC.heads * SPEC.head_dim
    keys = SPEC.kv_heads * SPEC.head_dim
    assert {
        name: tuple(weight.shape)
        for name, weight in load_file(folder[0] / "model.safetensors").items()
    } == {
        "fc.weight": (size, 3 * size),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * size),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * size),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, queries),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        "lm_head.weight": (11, size),
        "d2t": (11,),
    }
    document = json.loads((folder[0] / "config.json").read_text())
    assert (
        document["architectures"] == ["LlamaForCausalLMEagle3"]
        and document["model_type"] == "llama"
    )
    assert (
        document["hidden_size"] == size
        and document["draft_vocab_size"] == 11
        and not document["tie_word_embeddings"]
    )
    # It would have other widths, and biases
    assert "target_hidden_size" not in document and not document["attention_bias"]


@pytest.mark.parametrize("layers", [(2, 4, 6), (3, 5, 8)])
def test_vllm_and_sglang_take_states_after_the_same_layers(folder, layers):
    """They number them differently. SGLang adds 1 to each number of a list that begins with 1, in
    older versions to all.
    """
    form = replace(folder[1].form, layers=layers)
    document = json.loads(
        eagle3_content(replace(folder[1], form=form), SPEC, "the-target")["eagle3/config.json"]
    )
    of_sglang = document["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert document["eagle_aux_hidden_state_layer_ids"] == list(layers)
    assert [number + (of_sglang[0] == 1) for number in of_sglang] == list(layers)
    changed(
        folder[0],
        lambda config: (config.update(document), config.pop("eagle_aux_hidden_state_layer_ids")),
    )
    assert read_eagle3(folder[0], SPEC).form.layers == layers  # as SpecForge writes it


def test_a_drafter_of_eagle_3_1_has_the_names_that_vllm_reads(folder):
    norms = {"fc_norm": True, "norm_before_fc": True, "norm_output": True}
    weights = {f"fc_norm.{place}.weight": torch.rand(SPEC.hidden) for place in range(3)}
    weights["input_norm.weight"] = torch.rand(3 * SPEC.hidden)
    changed(
        folder[0], lambda document: document.update(norms), lambda tensors: tensors.update(weights)
    )
    stored = replace(
        folder[1], form=replace(folder[1].form, **norms), weights=folder[1].weights | weights
    )
    assert_same(read_eagle3(folder[0], SPEC), stored)
    document = json.loads(eagle3_content(stored, SPEC, "the-target")["eagle3/config.json"])
    assert {name: document[name] for name in norms} == norms


def test_other_trainers_folders_are_read(folder):
    """Those of `speculators`, and those of EAGLE, which have everything at the top and no list of
    layers.
    """
    path, stored = folder

    def of_speculators(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        tensors["t2d"] = torch.zeros(SPEC.vocab, dtype=torch.bool)
        tensors["embed_tokens.weight"] = torch.zeros(SPEC.vocab, SPEC.hidden)

    changed(path, lambda document: document.pop("norm_before_residual"), of_speculators)
    found = read_eagle3(path, SPEC)
    assert found.form.norm_before_residual
    assert torch.equal(found.weights["fc.weight"], stored.weights["fc.weight"])

    def of_eagle(document):
        for name in (
            "transformer_layer_config",
            "speculators_config",
            "eagle_config",
            "eagle_aux_hidden_state_layer_ids",
        ):
            del document[name]
        document.pop("rope_parameters")
        document["rope_scaling"] = None

    changed(path, of_eagle)
    found = read_eagle3(path, SPEC)
    assert found.form.layers == default_layers(SPEC.layers) and not found.form.norm_before_residual
    assert found.form.rope == {"rope_theta": 50_000.0, "rope_type": "default"}
    changed(path, lambda document: document.pop("rope_theta"))  # as of Vicuna
    assert read_eagle3(path, SPEC).form.rope == {"rope_theta": 10_000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "config, weights, message",
    [
        ({"draft_vocab_size": 12}, {}, r"d2t must be I64 or I32 \[12\], found I64 \[11\]"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, {}, "layers below 9"),
        (
            {"transformer_layer_config": None, "num_attention_heads": 5},
            {},
            "`num_attention_heads` must be a multiple of num_key_value_heads, 2, got 5",
        ),
        ({"fc_norm": True}, {}, r"fc_norm.0.weight"),
        ({"target_hidden_size": 64}, {}, "`target_hidden_size` must be hidden_size, got 64"),
        ({}, {"fc.weight": torch.zeros(2, 2)}, r"fc.weight must be F32 or BF16 or F16 \["),
        ({}, {"fc.bias": torch.zeros(2)}, r"fc.bias must be left out"),
        ({}, {"d2t": torch.full((11,), 90)}, "d2t` must be tokens below|d2t must be tokens below"),
        ({}, {"d2t": -torch.arange(11)}, "different tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder, config, weights, message):
    changed(
        folder[0], lambda document: document.update(config), lambda tensors: tensors.update(weights)
    )
    with pytest.raises(CheckpointError, match=message):
        read_eagle3(folder[0], SPEC)


def test_layers_of_small_models_are_different_ones():
    assert (
        default_layers(30) == (2, 15, 27)
        and default_layers(4) == (1, 2)
        and default_layers(2) == (1,)
    )


def test_a_drafter_of_all_tokens_has_no_list_of_them(folder):
    form = replace(folder[1].form, vocab=SPEC.vocab)
    stored = replace(folder[1], form=form, tokens=torch.arange(SPEC.vocab))
    stored.weights["lm_head.weight"] = torch.zeros(SPEC.vocab, SPEC.hidden)
    content = eagle3_content(stored, SPEC, "the-target")
    (folder[0] / "config.json").write_bytes(content["eagle3/config.json"])
    (folder[0] / "model.safetensors").write_bytes(content["eagle3/model.safetensors"])
    assert "d2t" not in load_file(folder[0] / "model.safetensors")
    assert_same(read_eagle3(folder[0], SPEC), stored)
