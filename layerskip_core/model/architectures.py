"""How architectures differ: one entry of ARCHITECTURES each. `ModelSpec.of` in spec.py reads a configuration by them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

# Names of the norms before and after attention, and before and after the MLP; None where there is none. All act inside the
# residual branch.
Norms = tuple[str | None, str | None, str | None, str | None]
_BEFORE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
_ONE: Norms = ("input_layernorm", None, "input_layernorm", None)
_AFTER: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND: Norms = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
# Biases of queries, keys and values, of the attention's output, and of the MLP: always, never, or where this value of
# config.json says so.
Biases = tuple[str | bool, str | bool, str | bool]
_NOWHERE: Biases = (False, False, False)
_IN_ATTENTION: Biases = ("attention_bias", "attention_bias", False)
_EVERYWHERE: Biases = ("attention_bias", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP. Names of weights follow a layer's prefix; other strings name values of
    config.json.

    A router (experts, D) scores the experts for each token. The best `num_experts_per_tok` of them are added up, weighted by
    the softmax of their scores: over these alone (`normalised`), or over all. `on_some_layers`: by `decoder_sparse_step` and
    `mlp_only_layers`; the other layers have an MLP. `stored`: the names in checkpoints where they differ from those in memory,
    with {} for the index of an expert: the parts of a weight, which stand below each other.
    """

    stored: Mapping[str, tuple[str, ...]]
    router: str = "mlp.gate"
    block: str = "mlp.experts."
    inner: str = "intermediate_size"
    normalised: bool | str = True
    on_some_layers: bool = False


@dataclass(frozen=True)
class Mixer:
    """A short convolution in place of attention in some layers, and perhaps a recurrence after it: a gated delta rule (Yang et
    al., 2024), or Mamba-2 (Dao and Gu, 2024) if its steps have `limits`.

    `projections`: of the hidden states, and of the output. Steps and decays come from `rates` and `steps`, or from what Mamba-2
    projects with the rest. `norm` is over each head, before its gate; of Mamba-2 over a group of heads, after it. `taps`,
    `biased` (projections, the convolution), `sizes` (heads of keys and of values, dimensions) and `limits` name values of
    config.json.
    """

    kind: str  # in layer_types
    projections: tuple[str, ...]
    convolution: str
    taps: str
    biased: tuple[str | bool, str | bool] = (False, False)
    steps: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    norm: str | None = None
    sizes: tuple[str, ...] = ()
    limits: str | None = None


@dataclass(frozen=True)
class Names:
    """Under which names a checkpoint has the parts of a model. `attention` and `mlp` are prefixes within a layer."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None  # those that are learned, added to the embedding
    layers: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn."
    mlp: str = "mlp."
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    stored_head: str | None = None  # in files, where it is another than lm_head in memory
    stored_prefix: str | None = None  # of names in some files, in the place of "model."


@dataclass(frozen=True)
class Architecture:
    """How a family of models differs from Llama, whose layers the defaults describe. Strings name values of config.json.

    `norm`: the factors of "plus_one" are 1 + the stored weights; "layer" is LayerNorm, with biases. `query_key_norms`: over
    each head, or over all heads together. Projections that read the hidden states come first; fewer names than matrices mean
    that they are stored as one. A field of `str | bool` holds always, never, or where that value of config.json says so.
    `needs` has a set where a list may have no other entries. `windows`, which layers have a sliding window: all if `sliding_window` is set ("all"), those of `layer_types` if
    `use_sliding_window` says so ("optional"), or always those ("listed"). `rope`, which layers have rotary positions: those of
    `no_rope_layers` ("listed"), or those with a window, and all where no window is set ("sliding").
    """

    names: Names = Names()
    values: Mapping[str, str | int | None] = field(default_factory=dict)  # by Llama's names: other names, or what is not read
    needs: Mapping[str, object] = field(default_factory=dict)  # values of config.json without which it is not this
    otherwise: "Architecture | None" = None  # what it is then; None: nothing that our kernels run
    norms: Norms = _BEFORE
    parallel: str | bool = False  # attention and MLP read the same hidden states
    norm: Literal["rms", "rms_plus_one", "layer", "layer_plus_one", "layer_without_bias"] = "rms"
    norm_eps: str = "rms_norm_eps"
    query_key_norms: Literal["none", "head", "projection"] = "none"
    norms_rotated: bool = False  # queries and keys are normed after their rotation
    attention_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused_by_head: bool = False  # stored as one: for each key head its queries, key and value; otherwise all queries first
    transposed: bool = False  # weights are stored as (inputs, outputs)
    biases: Biases = _IN_ATTENTION
    experts: Experts | None = None
    mixer: Mixer | None = None
    one_block: bool = False  # in a layer: attention, the mixer, or an MLP
    gated: bool = True  # act(gate) * up; otherwise the MLP is act(first projection)
    activation: str | None = "hidden_act"
    default_activation: str = "silu"
    windows: Literal["none", "all", "optional", "listed"] = "none"
    uses: tuple[str, ...] = ()  # further values: see `Values`; head_dim, if its default is another than for Llama
    rope: Literal["all", "none", "listed", "sliding"] = "all"
    partial_rope: bool = False  # only `partial_rotary_factor` of a head rotates
    gates_attention: bool = False  # what a query gets, by numbers that are projected with it
    interleaved_rope: bool = False  # neighbours rotate together, not one of each half
    scales_embeddings: bool = False  # by sqrt(hidden_size)
    head_bias: bool = False

    @property
    def reads(self) -> set[str]:
        """The values of config.json that a model is read from."""
        read = {*_ALWAYS_READ, *_READ_FOR_WINDOWS[self.windows], *self.uses}
        read |= {"rope_parameters"} if self.rope != "none" else set()
        switches = [*self.biases, self.parallel, self.norm_eps, self.activation]
        if self.experts is not None:
            read |= {"num_experts_per_tok"}
            read |= {"decoder_sparse_step", "mlp_only_layers"} if self.experts.on_some_layers else set()
            switches += [self.experts.inner, self.experts.normalised]
        if self.mixer is not None:
            read |= {"layer_types"}
            switches += [self.mixer.taps, *self.mixer.biased, *self.mixer.sizes, self.mixer.limits]
        named = (self.values.get(name, name) for name in read)
        return {name for name in (*named, *switches, *self.needs) if isinstance(name, str)}


_GELU = "gelu_pytorch_tanh"
_GEMMA = Architecture(norm="rms_plus_one", default_activation=_GELU, uses=("head_dim",), scales_embeddings=True)
_GEMMA3 = replace(
    _GEMMA,
    norms=_AROUND,
    activation="hidden_activation",
    windows="listed",
    uses=("head_dim", "query_pre_attn_scalar", "final_logit_softcapping"),
)
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
    names=Names("transformer.word_embeddings", None, "transformer.h", "transformer.ln_f", "self_attention."),
    values={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "head_dim": None},
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



def _mamba2(block: str, taps: str, biased: tuple[str, str], sizes: tuple[str, ...], limits: str) -> Mixer:
    return Mixer(
        "linear_attention",
        (f"{block}.in_proj", f"{block}.out_proj"),
        f"{block}.conv1d",
        taps,
        biased,
        rates=(f"{block}.A_log", f"{block}.dt_bias", f"{block}.D"),
        norm=f"{block}.norm",
        sizes=sizes,
        limits=limits,
    )


_MAMBA2 = _mamba2(
    *("mamba", "mamba_d_conv", ("mamba_proj_bias", "mamba_conv_bias")),
    *(("mamba_n_groups", "mamba_n_heads", "mamba_d_state", "mamba_d_head"), "time_step_limit"),
)
_HYBRID = frozenset({"full_attention", "linear_attention"})  # kinds of layers
_MULTIPLIERS = "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"
_EXPERTS = Experts(
    {
        "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
    },
    normalised="norm_topk_prob",
)
_MIXTRAL_EXPERTS = Experts(
    {
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    }
)
_GRANITE_HYBRID = Architecture(
    names=Names(mlp="shared_mlp."),
    values={"intermediate_size": "shared_intermediate_size", "num_local_experts": None, "num_experts_per_tok": None},
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
    block="block_sparse_moe.experts.",
)

# Decoders whose forward is embed, a chain of layers, a final norm and a head. Each is tested against model(...).
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
    "qwen3_5_text": Architecture(
        names=Names(stored_prefix="model.language_model."),
        norm="rms_plus_one",
        query_key_norms="head",
        mixer=Mixer(
            "linear_attention",
            ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
            "linear_attn.conv1d",
            "linear_conv_kernel_dim",
            steps=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
            rates=("linear_attn.A_log", "linear_attn.dt_bias"),
            norm="linear_attn.norm",
            sizes=tuple(f"linear_{size}" for size in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")),
        ),
        uses=("head_dim",),
        partial_rope=True,
        gates_attention=True,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA3, uses=(*_GEMMA3.uses, "attn_logit_softcapping")),
    "gemma3_text": replace(_GEMMA3, query_key_norms="head"),
    "smollm3": Architecture(biases=_EVERYWHERE, windows="optional", rope="listed", uses=("no_rope_layers",)),
    "olmo2": Architecture(norms=_AFTER, query_key_norms="projection"),
    "olmo3": Architecture(norms=_AFTER, query_key_norms="projection", windows="listed"),
    "olmoe": Architecture(query_key_norms="projection", uses=("clip_qkv",), experts=_EXPERTS),
    "granite": Architecture(biases=_EVERYWHERE, uses=_MULTIPLIERS),
    "granitemoe": Architecture(uses=_MULTIPLIERS, experts=_GRANITE_EXPERTS),
    "granitemoehybrid": replace(
        _GRANITE_HYBRID,
        needs={**_GRANITE_HYBRID.needs, "position_embedding_type": "rope"},
        rope="all",
        otherwise=_GRANITE_HYBRID,
    ),
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
        names=Names("model.embeddings", None, "model.layers", "model.norm_f", "mixer.", "mixer.", stored_prefix="backbone."),
        values={"num_hidden_layers": "layers_block_type", "layer_types": "layers_block_type", "tie_word_embeddings": False},
        needs={"mamba_hidden_act": "silu", "layers_block_type": _HYBRID | {"mlp"}},
        norms=("norm", None, "norm", None),
        norm_eps="layer_norm_epsilon",
        mlp_projections=("up_proj", "down_proj"),
        biases=(False, False, "mlp_bias"),
        mixer=_mamba2(
            *("mixer", "conv_kernel", ("use_bias", "use_conv_bias")),
            *(("n_groups", "mamba_num_heads", "ssm_state_size", "mamba_head_dim"), "time_step_min"),
        ),
        one_block=True,
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
    "seed_oss": Architecture(biases=("attention_bias", "attention_out_bias", "mlp_bias"), uses=("head_dim",)),
    "ernie4_5": Architecture(biases=("use_bias",) * 3, uses=("head_dim",), interleaved_rope=True),
    "glm": _GLM,
    "glm4": replace(
        _GLM, norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    ),
    "hunyuan_v1_dense": Architecture(
        names=Names(query_norm="query_layernorm", key_norm="key_layernorm"), query_key_norms="head", norms_rotated=True
    ),
    "exaone4": Architecture(norms=_AFTER, query_key_norms="head", biases=_NOWHERE, windows="listed", rope="sliding"),
    "cohere": replace(_COHERE, needs={"use_qk_norm": False}),
    "cohere2": replace(_COHERE, windows="listed", rope="sliding"),
    "stablelm": replace(
        _STABLELM,
        needs={"qk_layernorm": False, "use_parallel_residual": False},
        otherwise=replace(_STABLELM, needs={"qk_layernorm": False, "use_parallel_residual": True}, norms=_ONE, parallel=True),
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
        names=Names(norm="model.embedding_norm", mlp="feed_forward.", query_norm="q_layernorm", key_norm="k_layernorm"),
        norms=("operator_norm", None, "ffn_norm", None),
        norm_eps="norm_eps",
        query_key_norms="head",
        attention_projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp_projections=("w1", "w3", "w2"),
        biases=_NOWHERE,
        mixer=Mixer("conv", ("conv.in_proj", "conv.out_proj"), "conv.conv", "conv_L_cache", ("conv_bias",) * 2),
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
        needs={"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
        otherwise=replace(
            _FALCON,
            needs={"alibi": False, "new_decoder_architecture": True, "parallel_attn": True, "num_ln_in_parallel_attn": 2},
            norms=("ln_attn", None, "ln_mlp", None),
        ),
    ),
    "gpt_neox": Architecture(
        names=Names(
            *("gpt_neox.embed_in", None, "gpt_neox.layers", "gpt_neox.final_layer_norm", "attention."),
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
        names=Names("transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "attn."),
        values={
            **{"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
            **{"num_attention_heads": "n_head", "num_key_value_heads": None, "max_position_embeddings": "n_positions"},
            "head_dim": None,
        },
        needs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
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


def known_architecture(config: Any) -> Architecture | None:
    """That of a configuration; None for one that our kernels do not run."""
    found = ARCHITECTURES.get(str(config.model_type))
    while found is not None and not all(_suits(getattr(config, name, None), value) for name, value in found.needs.items()):
        found = found.otherwise
    return found


def _suits(found: object, needed: object) -> bool:
    return isinstance(found, list) and needed.issuperset(found) if isinstance(needed, frozenset) else found == needed


EXPERT_COUNTS = ("num_local_experts", "num_experts")  # names of the number of experts, by the version of transformers too

# The values of config.json that are always read, and those that say which layers have windows.
_ALWAYS_READ = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "tie_word_embeddings", "vocab_size"),
)
_READ_FOR_WINDOWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": ("sliding_window",),
    "optional": ("sliding_window", "use_sliding_window"),
    "listed": ("sliding_window", "layer_types"),
}


def is_complete(config: Mapping[str, Any]) -> bool:
    """Whether a config.json leaves no default to transformers, so that `ModelSpec.of` can read it."""
    architecture = known_architecture(SimpleNamespace(**{"model_type": None, **config}))
    if architecture is None or (architecture.experts is not None and config.keys().isdisjoint(EXPERT_COUNTS)):
        return False
    return config.keys() >= architecture.reads
