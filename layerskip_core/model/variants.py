"""In what decoders differ: the fields of an entry of ARCHITECTURES in architectures.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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

# Names of the norms before and after attention, and before and after the MLP; None where there is none. All act inside the
# residual branch.
Norms = tuple[str | None, str | None, str | None, str | None]
_BEFORE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
# Biases of queries, keys and values, of the attention's output, and of the MLP: always, never, or where this value of
# config.json says so.
Biases = tuple[str | bool, str | bool, str | bool]
_IN_ATTENTION: Biases = ("attention_bias", "attention_bias", False)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP. Names of weights follow a layer's prefix; other strings name values of
    config.json.

    A router (experts, D) scores the experts for each token. The best `num_experts_per_tok` of them are added up, weighted by
    the softmax of their scores: over these alone (`normalised`), or over all. `on_some_layers`: by `decoder_sparse_step` and
    `mlp_only_layers`; the other layers have an MLP. `shared`: the projections of an MLP that all tokens have too, times the
    logistic function of what `shared_gate` gives, if there is one. `stored`: the names in checkpoints where they differ from
    those in memory, with {} for the index of an expert: the parts of a weight, which stand below each other. `by_inputs`:
    weights are (inputs, outputs), outputs of gate and up in turns. Biases of the MLP are those of the router and each expert.
    """

    stored: Mapping[str, tuple[str, ...]]
    router: str = "mlp.gate"
    block: str = "mlp.experts."
    inner: str = "intermediate_size"
    normalised: bool | str = True
    on_some_layers: bool = False
    shared: tuple[str, ...] = ()
    shared_inner: str | None = None
    shared_gate: str | None = None
    by_inputs: bool = False


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
    by_head: bool = False  # projections, and steps, are stored as one each, for each key head its rows


@dataclass(frozen=True)
class TokenInputs:
    """A further input of each layer, by the token alone: act(gate(h)) times it is added to h, after a projection and a norm.

    It is the sum of a slice of the token's row in a table and of a projection of its embedding, after a norm. Names of weights.
    """

    gate: str = "per_layer_input_gate"  # these in a layer
    output: str = "per_layer_projection"
    after: str = "post_per_layer_input_norm"
    table: str = "model.embed_tokens_per_layer.weight"
    projection: str = "model.per_layer_model_projection.weight"
    norm: str = "model.per_layer_projection_norm"


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
    `needs` has a set where a list may have no other entries. `windows`, which layers have a sliding window: all if
    `sliding_window` is set ("all"), those of `layer_types` if `use_sliding_window` says so ("optional"), or always those
    ("listed"). `rope`, which layers have rotary positions: those of `no_rope_layers` ("listed"), or those with a window, and
    all where no window is set ("sliding").
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
    sinks: bool = False  # queries have one more score each, whose value is 0
    gates_attention: bool = False  # what a query gets, by numbers that are projected with it
    interleaved_rope: bool = False  # neighbours rotate together, not one of each half
    scales_embeddings: bool = False  # by sqrt(hidden_size)
    norms_values: bool = False  # over each head, without factors
    layer_scale: str | None = None  # the name, in a layer, of what multiplies its output
    token_inputs: TokenInputs | None = None
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
            switches += [self.experts.inner, self.experts.normalised, self.experts.shared_inner]
        if self.mixer is not None:
            read |= {"layer_types"}
            switches += [self.mixer.taps, *self.mixer.biased, *self.mixer.sizes, self.mixer.limits]
        named = (self.values.get(name, name) for name in read)
        return {name for name in (*named, *switches, *self.needs) if isinstance(name, str)}
