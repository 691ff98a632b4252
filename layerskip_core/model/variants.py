"""How decoders differ: the fields of an entry of ARCHITECTURES in architectures.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

EXPERT_COUNTS = ("num_local_experts", "num_experts")  # by type, and by the version of transformers

# The values of config.json without which transformers' own defaults decide, which differ by type:
# always, and by `Architecture.windows`. The other fields of `Values` may be absent or null, which
# stands for the usual value.
_ALWAYS_READ = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "vocab_size",
)
_READ_FOR_WINDOWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": ("sliding_window",),
    "optional": ("sliding_window", "use_sliding_window"),
    "listed": ("sliding_window", "layer_types"),
}

# Names of the norms before and after attention, before and after the MLP; all act inside the
# residual branch.
Norms = tuple[str | None, str | None, str | None, str | None]
_BEFORE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
# Biases of queries, keys and values, of attention's output, and of the MLP: always, never, or by a
# value of config.json.
Biases = tuple[str | bool, str | bool, str | bool]
_IN_ATTENTION: Biases = ("attention_bias", "attention_bias", False)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP. Weight names follow a layer's prefix; other strings
    name values of config.json.

    A router (experts, D) scores the experts for each token; the best `num_experts_per_tok` are
    summed, weighted by the softmax of their scores. If the MLP has biases, the router and each
    expert do.
    """

    # By name: the parts in checkpoints, stacked by rows; {} is an expert's index
    stored: Mapping[str, tuple[str, ...]]
    router: str = "mlp.gate"
    prefix: str = "mlp.experts."
    inner: str = "intermediate_size"
    normalised: bool | str = True  # softmax over the chosen experts, else over all
    # By `decoder_sparse_step` and `mlp_only_layers`; other layers have an MLP
    on_some_layers: bool = False
    shared: tuple[str, ...] = ()  # projections of an MLP that runs for every token
    shared_inner: str | None = None  # its width
    shared_gate: str | None = None  # the projection whose sigmoid multiplies its output
    by_inputs: bool = False  # weights are (inputs, outputs), with gate and up interleaved


@dataclass(frozen=True)
class Mixer:
    """A short convolution in place of attention in some layers, perhaps with a recurrence: a gated
    delta rule (Yang et al., 2024), or Mamba-2 (Dao and Gu, 2024).

    `kernel_size`, `biased`, `sizes` and `limits` name values of config.json.
    """

    kind: str  # in layer_types
    projections: tuple[str, ...]  # of the hidden states; the last one of the output
    convolution: str
    kernel_size: str
    biased: tuple[str | bool, str | bool] = (False, False)  # projections, convolution
    # Projections of steps and decays; Mamba-2 projects them with the rest
    steps: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    # Over each head, before the gate; in Mamba-2 over a group of heads, after the gate
    norm: str | None = None
    sizes: tuple[str, ...] = ()  # key heads, value heads, dimensions of keys and values
    limits: str | None = None  # of Mamba-2's steps
    # One weight has all inward projections, one all steps, grouped by key head
    by_head: bool = False


@dataclass(frozen=True)
class TokenInputs:
    """Weight names of Gemma 4's per-layer inputs x: norm(output(act(gate(h)) * x)) is added to h.

    x is the layer's slice of the token's row in a table, plus the layer's slice of a normed
    projection of the embedding.
    """

    gate: str = "per_layer_input_gate"  # in each layer, like the next two
    output: str = "per_layer_projection"
    after: str = "post_per_layer_input_norm"
    table: str = "model.embed_tokens_per_layer.weight"
    projection: str = "model.per_layer_model_projection.weight"
    norm: str = "model.per_layer_projection_norm"


@dataclass(frozen=True)
class Names:
    """The names of a model's parts. `attention` and `mlp` are prefixes within a layer."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None  # learned, added to the embedding
    layers: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn."
    mlp: str = "mlp."
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    stored_head: str | None = None  # in files, if not lm_head
    stored_prefix: str | None = None  # in some files, in place of "model."


@dataclass(frozen=True)
class Architecture:
    """How a family of models differs from Llama, whose layers the defaults describe. Strings name
    values of config.json.

    A `str | bool` field holds always, never, or by that value of config.json. Projections that read
    the hidden states come first; fewer names than matrices mean fused weights.

    `windows`, the layers with a sliding window: all if `sliding_window` is set ("all"), those of
    `layer_types` if `use_sliding_window` is on ("optional") or always ("listed"). `rope`, the
    layers with rotary positions: by `no_rope_layers` ("listed"), or those with a window, and all if
    none is set ("sliding").
    """

    names: Names = Names()
    # Other names for Llama's values, or fixed values
    values: Mapping[str, str | int | None] = field(default_factory=dict)
    # Required values of config.json; a set: of allowed list entries
    needs: Mapping[str, object] = field(default_factory=dict)
    # If `needs` are not met; None: our kernels do not run it
    otherwise: "Architecture | None" = None
    norms: Norms = _BEFORE
    parallel: str | bool = False  # attention and MLP read the same hidden states
    # rms_plus_one and layer_plus_one: the factors are 1 + weight
    norm: Literal["rms", "rms_plus_one", "layer", "layer_plus_one", "layer_without_bias"] = "rms"
    norm_eps: str = "rms_norm_eps"
    # Over each head, or over all heads together
    query_key_norms: Literal["none", "head", "projection"] = "none"
    norms_rotated: bool = False  # queries and keys are normed after rotation
    attention_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    # Rows of the fused weight are grouped by key head; else all queries come first
    fused_by_head: bool = False
    transposed: bool = False  # weights are stored as (inputs, outputs)
    biases: Biases = _IN_ATTENTION
    experts: Experts | None = None
    mixer: Mixer | None = None
    one_sublayer: bool = False  # a layer is attention, the mixer, or an MLP alone
    gated: bool = True  # act(gate) * up; else act(first projection)
    activation: str | None = "hidden_act"
    default_activation: str = "silu"
    windows: Literal["none", "all", "optional", "listed"] = "none"
    # Further fields of `Values`; head_dim, if its default is not Llama's
    uses: tuple[str, ...] = ()
    rope: Literal["all", "none", "listed", "sliding"] = "all"
    partial_rope: bool = False  # only `partial_rotary_factor` of a head rotates
    sinks: bool = False  # attention has one more learned score per query head, with value 0
    # Attention's output is multiplied by a sigmoid gate, projected with the queries
    gates_attention: bool = False
    # Rotated pairs are neighbours (GPT-J), not one of each half (NeoX)
    interleaved_rope: bool = False
    scales_embeddings: bool = False  # by sqrt(hidden_size)
    norms_values: bool = False  # RMSNorm over each head, without weights
    layer_scale: str | None = None  # name of the factor of a layer's output
    token_inputs: TokenInputs | None = None
    head_bias: bool = False

    @property
    def reads(self) -> set[str]:
        """The values that config.json must have, to be read without transformers' defaults."""
        read = {*_ALWAYS_READ, *_READ_FOR_WINDOWS[self.windows], *self.uses}
        if self.rope != "none":
            read.add("rope_parameters")
        switches = [*self.biases, self.parallel, self.norm_eps, self.activation]
        if self.experts is not None:
            read.add("num_experts_per_tok")
            if self.experts.on_some_layers:
                read |= {"decoder_sparse_step", "mlp_only_layers"}
            switches += [self.experts.inner, self.experts.normalised, self.experts.shared_inner]
        if self.mixer is not None:
            read.add("layer_types")
            switches += [
                self.mixer.kernel_size,
                *self.mixer.biased,
                *self.mixer.sizes,
                self.mixer.limits,
            ]
        named = (self.values.get(name, name) for name in read)
        return {name for name in (*named, *switches, *self.needs) if isinstance(name, str)}
