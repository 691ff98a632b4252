"""A tiny random model of every decoder-only model type of transformers."""

from functools import cache

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

VOCABULARY = 67
LAYERS = 4

# Of whatever name: a configuration takes those that it knows.
_SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "dim_model_base"), 32
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "dim_ff",
            "dff",
        ),
        48,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"),
        4,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24
    ),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    # As for the texts of the tests: kernels of transformers compute whole chunks
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 5,
    "rotary_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
} | {
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_INDEXED = _LATENT | {
    "index_topk": 3,
    "index_head_dim": 8,
    "index_n_heads": 16,
}  # with fewer, scores are often all 0, and equal
_SHARED = _SLIDING | {"num_kv_shared_layers": 2}
# Elsewhere the kernel of many tokens has a limit that the kernel of one token lacks
_UNLIMITED = {"time_step_min": 1e-9}
_CHANGES: dict[str, dict[str, object]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "cpmant": {"dim_head": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24},
    },
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _INDEXED),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "vaultgemma", "olmo3", "granite_swa", "cohere2", "exaone4"),
        _SLIDING,
    ),
    "deepseek_v4": {
        "q_lora_rank": 12,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "gemma3n_text": _SHARED | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": _SHARED | {"global_head_dim": 16},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "num_layers": LAYERS,
        "num_heads": 4,
    },
    "granitemoehybrid": {
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "inkling_text": {
        "d_rel": 4,
        "rel_extent": 64,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 5,
        "unpadded_vocab_size": VOCABULARY,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"attention_chunk_size": 5, "intermediate_size_mlp": 48},
    "longcat_flash": _LATENT
    | {"num_layers": LAYERS, "num_hidden_layers": 2 * LAYERS, "zero_expert_num": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "modernbert-decoder": {"local_attention": 5},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"] * 2,
        "n_groups": 2,
        "mamba_head_dim": 8,
        **_UNLIMITED,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
    }
    | {"indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, **_UNLIMITED},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


@cache
def tiny(model_type: str):
    """In fp32. Its weights are larger than usual, so that layers and positions matter."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in known} | _CHANGES.get(
        model_type, {}
    )
    model = AutoModelForCausalLM.from_config(kind(**sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(0.25 / weight.std().clamp_min(1e-3))
            elif weight.dim() == 1:  # where some are 0 before training
                weight.add_(0.1 * torch.randn_like(weight))
    return model
