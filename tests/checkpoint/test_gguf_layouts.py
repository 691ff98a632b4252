"""GGUF files in the layouts of llama.cpp's converter, where these are others than transformers'."""

from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from command_line import run
from conftest import CHANGES, logits_of, random_rows, require_near, tiny_model
from decodings import UnroundedDrafter, ids_of, rounds_of
from evaluating import tiny_loaded
from exit_block_models import random_blocks
from safetensors.torch import load_file

from layerskip_core.checkpoint.folder import MTP_FILE
from layerskip_core.checkpoint.gguf_read import GgufFile
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.export.gguf import add_tokenizer
from layerskip_core.model import ModelSpec, TransformersBackend
from layerskip_core.model.blocks import plain
from layerskip_core.model.exit_blocks import MTP, MTP_LAYOUTS, NO_STORED_DRAFTERS
from layerskip_core.model.native.compiled import kernels
from layerskip_core.model.weights import named_weights

NAMES = {
    "granite": "granite",
    "lfm2": "lfm2",
    "qwen3_5_text": "qwen35",
    "gpt_oss": "gpt-oss",
    "gemma4_text": "gemma4",
    "qwen3_moe": "qwen3moe",
}
_GEMMA4_ROPE = {
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    }
} | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
SIZES = {  # what a file of the type cannot say otherwise
    "granite": CHANGES["granite"],
    "lfm2": {},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 3,
        "linear_num_value_heads": 6,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
    "gemma4_text": {"vocab_size_per_layer_input": 300, "rope_parameters": _GEMMA4_ROPE},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}
NEXTN = {
    "input.weight": "eh_proj",
    "embedding_norm.weight": "enorm",
    "feature_norm.weight": "hnorm",
    "norm.weight": "shared_head_norm",
}
# Which stay in fp32 whatever a file's type
OTHERS = (".bias", "conv.weight", "conv1d.weight", "inp.weight")


def header(model):
    """The values of a GGUFWriter, by its methods."""
    config = SimpleNamespace(**model.config.to_dict())
    rope = model.config.rope_parameters
    kind = config.model_type
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "vocab_size": 300,
        "head_count": config.num_attention_heads,
        "head_count_kv": kv_heads,
        "rope_freq_base": rope["rope_theta"],
        "layer_norm_rms_eps": config.norm_eps if kind == "lfm2" else config.rms_norm_eps,
        "rope_dimension_count": head_dim,
    }
    if kind == "granite":
        values |= {
            "attention_scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
        }
        values |= {
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if kind == "lfm2":
        values["feed_forward_length"] = model.model.layers[0].feed_forward.w1.out_features
        values["head_count_kv"] = [
            kv_heads if layer == "full_attention" else 0 for layer in config.layer_types
        ]
        values["shortconv_l_cache"] = config.conv_L_cache
    if kind == "qwen3_moe":
        values |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    if kind in ("qwen3_5_text", "gpt_oss", "qwen3_moe"):
        values |= {"key_length": head_dim, "value_length": head_dim}
    if kind == "qwen3_5_text":
        inner = config.linear_num_value_heads * config.linear_value_head_dim
        values |= {
            "ssm_conv_kernel": config.linear_conv_kernel_dim,
            "ssm_state_size": config.linear_key_head_dim,
        }
        values |= {
            "ssm_group_count": config.linear_num_key_heads,
            "ssm_time_step_rank": config.linear_num_value_heads,
        }
        values |= {"ssm_inner_size": inner, "full_attention_interval": 2, "nextn_predict_layers": 0}
        values |= {"rope_dimension_count": head_dim // 2, "rope_dimension_sections": [2, 1, 1, 0]}
    if kind == "gemma4_text":
        widths = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
        slides = [layer == "sliding_attention" for layer in config.layer_types]
        values |= {
            "key_length": 2 * head_dim,
            "value_length": 2 * head_dim,
            "key_length_swa": head_dim,
        }
        values |= {
            "value_length_swa": head_dim,
            "feed_forward_length": widths,
            "sliding_window": config.sliding_window,
        }
        values |= {
            "sliding_window_pattern": slides,
            "shared_kv_layers": config.num_kv_shared_layers,
        }
        values |= {
            "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
            "rope_freq_base_swa": 1e4,
        }
        values |= {"final_logit_softcapping": config.final_logit_softcapping}
    if kind == "gpt_oss":
        values |= {
            "sliding_window": config.sliding_window,
            "expert_feed_forward_length": config.intermediate_size,
        }
        values |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
        values |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": rope["factor"],
        }
        values["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
    return values


def in_file(name, weight, config):
    """A weight by the names that the library gguf maps, in the layout of llama.cpp's converter."""
    kind = config.model_type
    part = name.split(".")[-2]
    if kind == "granite" and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if name.endswith(("sinks", "layer_scalar")):
        name += ".weight"
    if ".conv1d." in name or ".conv.conv." in name:
        weight = weight.squeeze(1)
    if "experts." in name:
        what = "bias" if name.endswith("_bias") else "weight"
        weight = weight if what == "bias" or kind == "qwen3_moe" else weight.transpose(1, 2)
        name = f"{name.removesuffix('_bias')}.{what}"
        if "gate_up" in name:
            halves = (
                weight.chunk(2, 1) if kind == "qwen3_moe" else (weight[:, ::2], weight[:, 1::2])
            )
            return {
                name.replace("gate_up", half): rows
                for half, rows in zip(("gate", "up"), halves, strict=True)
            }
    if kind == "qwen3_5_text" and "linear_attn" not in name and name.endswith("norm.weight"):
        return {name: weight + 1}
    if "linear_attn" not in name or part == "norm":
        return {name: weight}
    heads = (
        config.linear_num_key_heads,
        config.linear_num_value_heads // config.linear_num_key_heads,
    )

    def by_turns(rows):
        return rows.unflatten(0, (*heads, -1)).transpose(0, 1).flatten(0, 2)

    if part in ("in_proj_qkv", "conv1d"):
        before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return {name: torch.cat([weight[:before], by_turns(weight[before:])])}
    if part == "out_proj":
        return {name: by_turns(weight.T).T}
    weight = -weight.exp() if name.endswith("A_log") else weight
    return {name.replace("dt_bias", "dt_proj.bias"): by_turns(weight)}


def written(path, model_type, kind="F32", experts="F32", fused=False, drafter=None, **changes):
    """A tiny model as a file, its matrices of layers in a type; those of experts are random blocks,
    if they have one.

    `fused`: gate and up of experts are one tensor. `drafter`: weights of MTP by our names, in the
    layer after the last.
    """
    model = tiny_model(
        model_type, torch.float32, **{"vocab_size": 300, **SIZES[model_type], **changes}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    writer = gguf.GGUFWriter(path, NAMES[model_type])
    layers = model.config.num_hidden_layers
    nextn = {"block_count": layers + 1, "nextn_predict_layers": 1} if drafter else {}
    for name, value in (header(model) | nextn).items():
        getattr(writer, f"add_{name}")(value)
    architecture = {name: known for known, name in gguf.MODEL_ARCH_NAMES.items()}[NAMES[model_type]]
    names = gguf.get_tensor_name_map(architecture, layers + 1)
    if model_type == "gemma4_text":
        head_dim = 2 * model.config.to_dict()["head_dim"]
        writer.add_tensor(
            "rope_freqs.weight",
            np.array([1.0] * (head_dim // 8) + [1e30] * (3 * head_dim // 8), np.float32),
        )
    for name, weight in named_weights(model).items():
        parts = in_file(name, weight.detach(), model.config)
        if fused and len(parts) > 1:
            parts = {next(iter(parts)): torch.cat([*parts.values()], 1)}
        for other, part in parts.items():
            stored = names.get_name(other, try_suffixes=(".weight", ".bias"))
            stored = stored.replace("gate_exps", "gate_up_exps") if fused else stored
            part = part.contiguous()
            form = gguf.GGMLQuantizationType.F32
            if part.dim() == 3 and experts != "F32":
                rows = random_rows(
                    experts, part.shape[0] * part.shape[1], part.shape[2], seed=len(stored)
                )
                data = rows.view(*part.shape[:2], -1).as_subclass(torch.Tensor).numpy()
                form = gguf.GGMLQuantizationType[experts]
            else:
                if (
                    part.dim() == 2
                    and stored.startswith(("blk.", "per_layer_token"))
                    and not stored.endswith(OTHERS)
                ):
                    form = gguf.GGMLQuantizationType[kind]
                data = gguf.quants.quantize(part.numpy(), form)
            writer.add_tensor(stored, data, raw_dtype=form)
    for name, weight in (drafter or {}).items():
        part = name.removeprefix("exits.0.")
        weight = weight + 1 if weight.dim() == 1 else weight
        stored = (
            f"blk.{layers}.nextn.{NEXTN[part]}.weight"
            if part in NEXTN
            else names.get_name(part.replace("layer.", f"model.layers.{layers}."), (".weight",))
        )
        writer.add_tensor(stored, weight.contiguous().numpy())
    add_tokenizer(writer, tiny_loaded().tokenizer, 300)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    "model_type, fused", [*((model_type, False) for model_type in NAMES), ("qwen3_moe", True)]
)
def test_a_file_is_read_as_the_model_that_it_was_made_of(model_type, fused, tmp_path):
    model = written(path := tmp_path / "model.gguf", model_type, fused=fused)
    weights = GgufFile(path).weights()
    assert weights.keys() == named_weights(model).keys() == ModelSpec.of(model.config).shapes.keys()
    for name, weight in named_weights(model).items():
        torch.testing.assert_close(weights[name], weight.detach(), atol=1e-5, rtol=0)
    ids = torch.randint(3, 290, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    for backend in (
        for_decoding(str(path), "cpu", "fp32").backend,
        TransformersBackend(for_training(str(path), "cpu", "fp32").model),
    ):
        require_near(logits_of(backend, ids), expected, 1e-3)
    read = for_training(str(path), "cpu", "fp32").tokenizer
    text = "wake me up at 7"
    assert read(text)["input_ids"] == tiny_loaded().tokenizer(text)["input_ids"]


def test_the_drafter_in_the_layer_after_the_last(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, **SIZES["qwen3_5_text"]}
    made = random_blocks(tiny_model("qwen3_5_text", torch.float32, **sizes), MTP)
    spec = ModelSpec.of(tiny_model("qwen3_5_text", torch.float32, **sizes).config)
    weights = {name: made.take(name) for name in made.shapes(spec)}
    model = written(path := tmp_path / "model.gguf", "qwen3_5_text", drafter=weights, **sizes)
    config = DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=16)
    prompt = list(range(5, 25))
    right = rounds_of(
        TransformersBackend(model, replace(NO_STORED_DRAFTERS, mtp=made)), prompt, config
    )
    assert (
        rounds_of(
            for_decoding(str(path), "cpu", "fp32", UnroundedDrafter()).backend, prompt, config
        )
        == right
    )
    assert not run(f"import {path} --output {tmp_path}/imported").code
    kept = load_file(tmp_path / "imported" / MTP_FILE)
    for name, weight in weights.items():
        torch.testing.assert_close(
            kept[MTP_LAYOUTS[0].stored(name, spec.layers)], weight, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    "model_type, kind, experts, changes",
    [
        ("granite", "Q4_0", "F32", {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16}),
        ("lfm2", "Q8_0", "F32", {"hidden_size": 64, "head_dim": 16}),
        ("qwen3_5_text", "Q8_0", "F32", {"linear_value_head_dim": 32, "intermediate_size": 64}),
        (
            "qwen3_5_text",
            "Q5_1",
            "F32",
            {"linear_value_head_dim": 16, "intermediate_size": 64},
        ),  # a block has inputs of two heads
        ("gpt_oss", "Q8_0", "MXFP4", {"head_dim": 16}),
        ("gpt_oss", "F32", "Q5_0", {}),
        ("qwen3_moe", "Q8_0", "Q5_0", {"hidden_size": 64, "head_dim": 16}),
        ("qwen3_moe", "Q8_0", "Q4_1", {"hidden_size": 64, "head_dim": 16, "fused": True}),
        (
            "gemma4_text",
            "Q8_0",
            "F32",
            {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64},
        ),
    ],
)
def test_blocks_stay_as_they_are(model_type, kind, experts, changes, tmp_path):
    """Tokens are those of the dequantised model."""
    if kernels() is None:
        pytest.skip("no kernels here")
    written(path := tmp_path / "model.gguf", model_type, kind, experts, **changes)
    decoder = for_decoding(str(path), "cpu", "fp32")
    matrices = [matrix for layer in decoder.backend._layers.layers for matrix in layer.matrices]
    types = {name for matrix in matrices for name in matrix.form.types}
    assert types == {kind, experts} - {"F32"}
    divided = [matrix for matrix in matrices if not matrix.form.types]
    assert len(divided) == {("F32", "Q5_0"): 12, ("Q5_1", "F32"): 3}.get((kind, experts), 0)
    read = for_training(str(path), "cpu", "fp32")
    prompt = list(range(5, 25))
    with torch.no_grad():
        expected = read.model(torch.tensor([prompt])).logits
    found = logits_of(decoder.backend, torch.tensor([prompt]))
    assert (found - expected).std() < 5e-3 * expected.std()
    config = DecodingConfig("autoregressive", max_new_tokens=20, ignore_eos=True)
    ids = ids_of(decode(decoder.backend, prompt, config))
    assert ids == ids_of(decode(TransformersBackend(read.model), prompt, config))


def test_experts_in_mxfp4_are_the_weights_that_the_library_reads(tmp_path):
    written(path := tmp_path / "model.gguf", "gpt_oss", experts="MXFP4")
    file = GgufFile(path)
    for name in ("gate_up_proj", "down_proj"):
        rows = file.rows(f"model.layers.0.mlp.experts.{name}")
        assert torch.equal(
            plain(rows).transpose(1, 2), file.weight(f"model.layers.0.mlp.experts.{name}")
        )
