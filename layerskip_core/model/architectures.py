"""The architectures that our kernels run: `ModelSpec.of` reads a configuration by its entry in
ARCHITECTURES.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from .variants import EXPERT_COUNTS, Architecture, Biases, Experts, Mixer, Names, Norms, TokenInputs

_ONE: Norms = ("input_layernorm", None, "input_layernorm", None)
_AFTER: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_NOWHERE: Biases = (False, False, False)
_EVERYWHERE: Biases = ("attention_bias", "attention_bias", "mlp_bias")

_GELU = "gelu_pytorch_tanh"
_GEMMA = Architecture(
    norm="rms_plus_one", default_activation=_GELU, uses=("head_dim",), scales_embeddings=True
)
_GEMMA3 = replace(
    _GEMMA,
    norms=_AROUND,
    activation="hidden_activation",
    windows="listed",
    uses=("head_dim", "query_pre_attn_scalar", "final_logit_softcapping"),
)
_LAYER_SIZES = ("per_layer_config", "num_kv_shared_layers", "use_double_wide_mlp")
_TOKEN_SIZES = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
_GLM = Architecture(
    mlp_projections=("gate_up_proj", "down_proj"),
    biases=("attention_bias", False, False),
    uses=("head_dim",),
    partial_rope=True,
    interleaved_rope=True,
)
_COHERE = Architecture(
    norms=_ONE,
    parallel=True,
    norm="layer_without_bias",
    norm_eps="layer_norm_eps",
    interleaved_rope=True,
    uses=("logit_scale",),
)
_STABLELM = Architecture(
    values={"head_dim": None},
    norm="layer",
    norm_eps="layer_norm_eps",
    biases=("use_qkv_bias", False, False),
    partial_rope=True,
)
_FALCON = Architecture(
    names=Names(
        "transformer.word_embeddings", None, "transformer.h", "transformer.ln_f", "self_attention."
    ),
    values={
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": None,
    },
    norms=_ONE,
    parallel=True,
    norm="layer",
    norm_eps="layer_norm_epsilon",
    attention_projections=("query_key_value", "dense"),
    mlp_projections=("dense_h_to_4h", "dense_4h_to_h"),
    fused_by_head=True,
    biases=("bias",) * 3,
    gated=False,
    activation="activation",
)


def _mamba2(
    block: str, kernel_size: str, biased: tuple[str, str], sizes: tuple[str, ...], limits: str
) -> Mixer:
    return Mixer(
        "linear_attention",
        (f"{block}.in_proj", f"{block}.out_proj"),
        f"{block}.conv1d",
        kernel_size,
        biased,
        rates=(f"{block}.A_log", f"{block}.dt_bias", f"{block}.D"),
        norm=f"{block}.norm",
        sizes=sizes,
        limits=limits,
    )


_MAMBA2 = _mamba2(
    "mamba",
    "mamba_d_conv",
    biased=("mamba_proj_bias", "mamba_conv_bias"),
    sizes=("mamba_n_groups", "mamba_n_heads", "mamba_d_state", "mamba_d_head"),
    limits="time_step_limit",
)
_HYBRID = frozenset({"full_attention", "linear_attention"})  # kinds of layers
_MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_EXPERTS = Experts(
    {
        "mlp.experts.gate_up_proj": (
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
        ),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
    },
    normalised="norm_topk_prob",
)
_QWEN_EXPERTS = replace(
    _EXPERTS,
    inner="moe_intermediate_size",
    shared=(
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
    ),
    shared_inner="shared_expert_intermediate_size",
    shared_gate="mlp.shared_expert_gate",
)
_MIXTRAL_EXPERTS = Experts(
    {
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    }
)
_GATED_DELTA = Mixer(
    "linear_attention",
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
    "linear_attn.conv1d",
    "linear_conv_kernel_dim",
    steps=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    rates=("linear_attn.A_log", "linear_attn.dt_bias"),
    norm="linear_attn.norm",
    sizes=(
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
    ),
)
_QWEN3_5 = Architecture(
    norm="rms_plus_one",
    query_key_norms="head",
    mixer=_GATED_DELTA,
    uses=("head_dim",),
    partial_rope=True,
    gates_attention=True,
)
_GRANITE_HYBRID = Architecture(
    names=Names(mlp="shared_mlp."),
    values={
        "intermediate_size": "shared_intermediate_size",
        "num_local_experts": None,
        "num_experts_per_tok": None,
    },
    needs={"num_local_experts": 0, "hidden_act": "silu", "layer_types": _HYBRID},
    mlp_projections=("input_linear", "output_linear"),
    mixer=_MAMBA2,
    uses=_MULTIPLIERS,
    rope="none",
)
_GRANITE_EXPERTS = Experts(
    {
        "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
        "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
        "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    },
    router="block_sparse_moe.router",
    prefix="block_sparse_moe.experts.",
)

_GRANITE_MOE_HYBRID = replace(
    _GRANITE_HYBRID,
    values={},
    needs={"hidden_act": "silu", "layer_types": _HYBRID},
    uses=(*_MULTIPLIERS, "shared_intermediate_size"),
    experts=replace(
        _GRANITE_EXPERTS,
        shared=("shared_mlp.input_linear", "shared_mlp.output_linear"),
        shared_inner="shared_intermediate_size",
    ),
)


def _with_rope(hybrid: Architecture, otherwise: Architecture | None = None) -> Architecture:
    """With rotary positions if the configuration says so, else without."""
    needs = {**hybrid.needs, "position_embedding_type": "rope"}
    return replace(hybrid, needs=needs, rope="all", otherwise=replace(hybrid, otherwise=otherwise))


# Decoders whose forward is embed, a chain of layers, a final norm and a head. Each is tested
# against model(...).
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(biases=_EVERYWHERE),
    "mistral": Architecture(biases=_NOWHERE, windows="all"),
    "ministral": Architecture(biases=_NOWHERE, windows="listed"),
    "mixtral": Architecture(biases=_NOWHERE, windows="all", experts=_MIXTRAL_EXPERTS),
    "qwen2": Architecture(biases=(True, False, False), windows="optional"),
    "qwen3": Architecture(query_key_norms="head", windows="optional", uses=("head_dim",)),
    "qwen3_moe": Architecture(
        query_key_norms="head",
        windows="all",
        experts=replace(_EXPERTS, inner="moe_intermediate_size", on_some_layers=True),
    ),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": replace(
        _QWEN3_5,
        values={"intermediate_size": None},
        uses=("head_dim", "shared_expert_intermediate_size"),
        experts=replace(_QWEN_EXPERTS, normalised=True),
    ),
    "qwen3_next": replace(
        _QWEN3_5,
        uses=("head_dim", "shared_expert_intermediate_size"),
        experts=replace(_QWEN_EXPERTS, on_some_layers=True),
        mixer=replace(
            _GATED_DELTA,
            projections=("linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
            steps=("linear_attn.in_proj_ba",),
            by_head=True,
        ),
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA3, uses=(*_GEMMA3.uses, "attn_logit_softcapping")),
    "gemma3_text": replace(_GEMMA3, query_key_norms="head"),
    "gemma4_text": replace(
        _GEMMA3,
        values={"attention_multiplier": 1},
        needs={"enable_moe_block": False, "attention_k_eq_v": False},
        norm="rms",
        query_key_norms="head",
        uses=("head_dim", "final_logit_softcapping", *_LAYER_SIZES, *_TOKEN_SIZES),
        norms_values=True,
        layer_scale="layer_scalar",
        token_inputs=TokenInputs(),
    ),
    "smollm3": Architecture(
        biases=_EVERYWHERE, windows="optional", rope="listed", uses=("no_rope_layers",)
    ),
    "olmo2": Architecture(norms=_AFTER, query_key_norms="projection"),
    "olmo3": Architecture(norms=_AFTER, query_key_norms="projection", windows="listed"),
    "olmoe": Architecture(query_key_norms="projection", uses=("clip_qkv",), experts=_EXPERTS),
    "gpt_oss": Architecture(
        biases=("attention_bias", "attention_bias", True),
        experts=Experts({}, router="mlp.router", by_inputs=True),
        activation=None,
        default_activation="swiglu_clamped",
        windows="listed",
        uses=("head_dim", "swiglu_alpha", "swiglu_limit"),
        sinks=True,
    ),
    "granite": Architecture(biases=_EVERYWHERE, uses=_MULTIPLIERS),
    "granitemoe": Architecture(uses=_MULTIPLIERS, experts=_GRANITE_EXPERTS),
    "granitemoehybrid": _with_rope(_GRANITE_HYBRID, _with_rope(_GRANITE_MOE_HYBRID)),
    "bamba": Architecture(
        names=Names(norm="model.final_layernorm", mlp="feed_forward."),
        values={"layer_types": None},
        needs={"hidden_act": "silu"},
        norms=("input_layernorm", None, "pre_ff_layernorm", None),
        biases=_EVERYWHERE,
        mixer=_MAMBA2,
        uses=("attn_layer_indices",),
        partial_rope=True,
    ),
    "nemotron_h": Architecture(
        names=Names(
            "model.embeddings",
            None,
            "model.layers",
            "model.norm_f",
            "mixer.",
            "mixer.",
            stored_prefix="backbone.",
        ),
        values={
            "num_hidden_layers": "layers_block_type",
            "layer_types": "layers_block_type",
            "tie_word_embeddings": False,
        },
        needs={"mamba_hidden_act": "silu", "layers_block_type": _HYBRID | {"mlp"}},
        norms=("norm", None, "norm", None),
        norm_eps="layer_norm_epsilon",
        mlp_projections=("up_proj", "down_proj"),
        biases=(False, False, "mlp_bias"),
        mixer=_mamba2(
            "mixer",
            "conv_kernel",
            biased=("use_bias", "use_conv_bias"),
            sizes=("n_groups", "mamba_num_heads", "ssm_state_size", "mamba_head_dim"),
            limits="time_step_min",
        ),
        one_sublayer=True,
        gated=False,
        activation="mlp_hidden_act",
        uses=("head_dim",),
        rope="none",
    ),
    "phi3": Architecture(
        attention_projections=("qkv_proj", "o_proj"),
        mlp_projections=("gate_up_proj", "down_proj"),
        biases=_NOWHERE,
        windows="all",
        partial_rope=True,
    ),
    "starcoder2": Architecture(
        norm="layer",
        norm_eps="norm_epsilon",
        mlp_projections=("c_fc", "c_proj"),
        biases=("use_bias",) * 3,
        gated=False,
        default_activation=_GELU,
        windows="all",
    ),
    "seed_oss": Architecture(
        biases=("attention_bias", "attention_out_bias", "mlp_bias"), uses=("head_dim",)
    ),
    "ernie4_5": Architecture(biases=("use_bias",) * 3, uses=("head_dim",), interleaved_rope=True),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        norms=(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
    ),
    "hunyuan_v1_dense": Architecture(
        names=Names(query_norm="query_layernorm", key_norm="key_layernorm"),
        query_key_norms="head",
        norms_rotated=True,
    ),
    "exaone4": Architecture(
        norms=_AFTER, query_key_norms="head", biases=_NOWHERE, windows="listed", rope="sliding"
    ),
    "cohere": replace(_COHERE, needs={"use_qk_norm": False}),
    "cohere2": replace(_COHERE, windows="listed", rope="sliding"),
    "stablelm": replace(
        _STABLELM,
        needs={"qk_layernorm": False, "use_parallel_residual": False},
        otherwise=replace(
            _STABLELM,
            needs={"qk_layernorm": False, "use_parallel_residual": True},
            norms=_ONE,
            parallel=True,
        ),
    ),
    "phi": Architecture(
        names=Names(norm="model.final_layernorm"),
        needs={"qk_layernorm": False},
        norms=_ONE,
        parallel=True,
        norm="layer",
        norm_eps="layer_norm_eps",
        attention_projections=("q_proj", "k_proj", "v_proj", "dense"),
        mlp_projections=("fc1", "fc2"),
        biases=(True, True, True),
        gated=False,
        partial_rope=True,
        head_bias=True,
    ),
    "nemotron": Architecture(
        norm="layer_plus_one",
        norm_eps="norm_eps",
        mlp_projections=("up_proj", "down_proj"),
        biases=_EVERYWHERE,
        gated=False,
        partial_rope=True,
    ),
    "lfm2": Architecture(
        names=Names(
            norm="model.embedding_norm",
            mlp="feed_forward.",
            query_norm="q_layernorm",
            key_norm="k_layernorm",
        ),
        norms=("operator_norm", None, "ffn_norm", None),
        norm_eps="norm_eps",
        query_key_norms="head",
        attention_projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp_projections=("w1", "w3", "w2"),
        biases=_NOWHERE,
        mixer=Mixer(
            "conv",
            ("conv.in_proj", "conv.out_proj"),
            "conv.conv",
            "conv_L_cache",
            ("conv_bias",) * 2,
        ),
        activation=None,
        uses=("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
    ),
    "apertus": Architecture(
        norms=("attention_layernorm", None, "feedforward_layernorm", None),
        query_key_norms="head",
        mlp_projections=("up_proj", "down_proj"),
        gated=False,
        default_activation="xielu",
    ),
    "falcon": replace(
        _FALCON,
        values={**_FALCON.values, "num_key_value_heads": 1},
        needs={
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
        },
        otherwise=replace(
            _FALCON,
            needs={
                "alibi": False,
                "new_decoder_architecture": True,
                "parallel_attn": True,
                "num_ln_in_parallel_attn": 2,
            },
            norms=("ln_attn", None, "ln_mlp", None),
        ),
    ),
    "gpt_neox": Architecture(
        names=Names(
            "gpt_neox.embed_in",
            None,
            "gpt_neox.layers",
            "gpt_neox.final_layer_norm",
            "attention.",
            stored_head="embed_out",
        ),
        values={"num_key_value_heads": None, "head_dim": None},
        parallel="use_parallel_residual",
        norm="layer",
        norm_eps="layer_norm_eps",
        attention_projections=("query_key_value", "dense"),
        mlp_projections=("dense_h_to_4h", "dense_4h_to_h"),
        fused_by_head=True,
        biases=("attention_bias", "attention_bias", True),
        gated=False,
        partial_rope=True,
    ),
    "gpt2": Architecture(
        names=Names(
            "transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "attn."
        ),
        values={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": None,
            "max_position_embeddings": "n_positions",
            "head_dim": None,
        },
        needs={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        norms=("ln_1", None, "ln_2", None),
        norm="layer",
        norm_eps="layer_norm_epsilon",
        attention_projections=("c_attn", "c_proj"),
        mlp_projections=("c_fc", "c_proj"),
        transposed=True,
        biases=(True, True, True),
        gated=False,
        activation="activation_function",
        rope="none",
    ),
}
SUPPORTED = tuple(ARCHITECTURES)
# Multimodal types. On text, their text model alone (`text_config`) gives the same logits.
MULTIMODAL = ("gemma3", "gemma4", "lfm2_vl", "llava", "mistral3", "qwen3_5", "qwen3_5_moe")


def known_architecture(config: Any) -> Architecture | None:
    """The architecture of a configuration; None if our kernels do not run it."""
    found = ARCHITECTURES.get(str(config.model_type))
    while found is not None and not _suits(config, found.needs):
        found = found.otherwise
    return found


def _suits(config: Any, needs: Mapping[str, object]) -> bool:
    """Whether a configuration has the values of `Architecture.needs`."""
    for name, needed in needs.items():
        found = getattr(config, name, None)
        if isinstance(needed, frozenset):
            if not isinstance(found, list) or not needed.issuperset(found):
                return False
        elif found != needed:
            return False
    return True


def is_complete(config: Mapping[str, Any]) -> bool:
    """Whether a config.json holds all values that `ModelSpec.of` reads, without transformers'
    defaults.
    """
    if "model_type" not in config:
        return False
    architecture = known_architecture(SimpleNamespace(**config))
    if architecture is None:
        return False
    if architecture.experts is not None and config.keys().isdisjoint(EXPERT_COUNTS):
        return False
    return config.keys() >= architecture.reads
