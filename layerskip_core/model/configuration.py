"""config.json: the values that are read, with their types and ranges, and the layers that they
describe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from ..config.options import hints_of, needed
from ..errors import CheckpointError, shown
from .variants import EXPERT_COUNTS, Architecture, Experts, Mixer

LAYER_KINDS = FULL, SLIDING = "full_attention", "sliding_attention"
MLP = "mlp"  # the kind of a layer that is an MLP alone
# The greatest width of hidden states, of all heads together, and of the MLP: the kernels count in
# 32 bits.
_MOST_WIDTH = 1 << 20
_Width = Annotated[int, Meta(ge=1, le=_MOST_WIDTH)]
_Positions = Annotated[int, Meta(ge=1, le=1 << 27)]
_Window = Annotated[int, Meta(ge=0, le=1 << 31)]
_TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]
_MOST_EXPERTS = 1024  # in the kernels
_ExpertCount = Annotated[int, Meta(ge=1, le=_MOST_EXPERTS)]
_Positive = Annotated[float, Meta(ge=1e-6, le=1e6)]  # results stay finite in fp32
_Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]
_Limit = Annotated[float, Meta(ge=0)]
_Number = Annotated[str, Meta(pattern=r"^\d+$")]  # perhaps with leading zeros
_HeadDim = Annotated[
    int, Meta(ge=2, le=1024, multiple_of=2, description="an even number in 2..1024")
]


class _OfLayer(msgspec.Struct, forbid_unknown_fields=True):
    """Values of one layer."""

    head_dim: _HeadDim


class LayerSizes(NamedTuple):
    """The sizes of one layer, where layers differ."""

    head_dim: int
    inner: int  # width of the MLP
    source: int | None  # the layer whose keys and values it reads; None: its own


@dataclass(frozen=True)
class Values:
    """The values of config.json, with their types and ranges. Null stands for the architecture's
    default.
    """

    num_hidden_layers: Annotated[int, Meta(ge=1, le=1024)]
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    hidden_size: _Width
    intermediate_size: _Width | None
    num_attention_heads: _Width
    num_key_value_heads: _Width | None
    head_dim: _HeadDim | None
    max_position_embeddings: _Positions
    norm_eps: _Epsilon
    tie_word_embeddings: bool
    activation: str | None
    use_sliding_window: bool | None
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 31)] | None
    max_window_layers: _Window | None
    layer_types: list[str] | None
    # Despite the name, 1 where a layer rotates
    no_rope_layers: list[Annotated[int, Meta(ge=0, le=1)]] | None
    no_rope_layer_interval: Annotated[int, Meta(ge=1)] | None
    num_experts: _ExpertCount | None
    num_local_experts: _ExpertCount | None
    num_experts_per_tok: _ExpertCount | None
    moe_intermediate_size: _Width | None
    norm_topk_prob: bool | None
    decoder_sparse_step: Annotated[int, Meta(ge=1)] | None
    mlp_only_layers: list[Annotated[int, Meta(ge=0)]] | None
    eos_token_id: _TokenId | list[_TokenId] | None
    # Read only by architectures that name them in `uses`.
    # Attention scale is this^-0.5, not head_dim^-0.5
    query_pre_attn_scalar: _Positive | None = None
    attention_multiplier: _Positive | None = None  # Granite's attention scale
    embedding_multiplier: _Positive | None = None
    residual_multiplier: _Positive | None = None
    logits_scaling: _Positive | None = None  # a divisor
    logit_scale: _Positive | None = None
    attn_logit_softcapping: _Positive | None = None
    final_logit_softcapping: _Positive | None = None
    clip_qkv: _Positive | None = None  # not in our kernels
    swiglu_alpha: _Positive | None = None  # of the clamped SwiGLU
    swiglu_limit: _Positive | None = None
    # LFM2: the MLP's width is about two thirds of `intermediate_size`
    block_auto_adjust_ff_dim: bool | None = None
    block_ffn_dim_multiplier: _Positive | None = None
    block_multiple_of: _Width | None = None
    shared_intermediate_size: _Width | None = None  # of shared experts
    shared_expert_intermediate_size: _Width | None = None
    # Bamba's layers with attention
    attn_layer_indices: list[Annotated[int, Meta(ge=0)]] | None = None
    per_layer_config: dict[_Number, _OfLayer] | None = None  # by layer index
    # The last layers, which read other layers' keys and values
    num_kv_shared_layers: Annotated[int, Meta(ge=0)] | None = None
    use_double_wide_mlp: bool | None = None  # in those layers
    # 0 for none
    hidden_size_per_layer_input: Annotated[int, Meta(ge=0, le=_MOST_WIDTH)] | None = None
    vocab_size_per_layer_input: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None

    @property
    def head_sizes(self) -> tuple[int, int]:
        """The number of key heads, and the size of a head."""
        hidden = self.hidden_size
        heads = self.num_attention_heads
        head_dim = self.head_dim
        kv_heads = self.num_key_value_heads or heads
        if head_dim is None:
            needed = f"a multiple of num_attention_heads, {heads}"
            _require(hidden % heads == 0, "hidden_size", needed, hidden)
            head_dim = hidden // heads
            _require(
                head_dim % 2 == 0, "hidden_size / num_attention_heads", "an even number", head_dim
            )
        needed = f"a multiple of num_key_value_heads, {kv_heads}"
        _require(heads % kv_heads == 0, "num_attention_heads", needed, heads)
        width = heads * head_dim
        _require(
            width <= _MOST_WIDTH, "num_attention_heads * head_dim", f"at most {_MOST_WIDTH}", width
        )
        return kv_heads, head_dim

    @property
    def inner(self) -> int:
        """The width of the MLP."""
        width = self.intermediate_size or 4 * self.hidden_size
        if not self.block_auto_adjust_ff_dim:
            return width
        width = int((self.block_ffn_dim_multiplier or 1.0) * int(2 * width / 3))
        unit = self.block_multiple_of or 1
        return -(-width // unit) * unit

    def swiglu(self, architecture: Architecture) -> tuple[float, float] | None:
        """See `ModelSpec.swiglu`."""
        if architecture.default_activation != "swiglu_clamped":
            return None
        return self.swiglu_alpha or 1.702, self.swiglu_limit or 7.0

    def layers(self, architecture: Architecture) -> tuple[tuple[str, ...], int | None, list[bool]]:
        """(kind of each layer, window of the sliding ones, whether each layer has rotary
        positions).
        """
        listed = self._listed_kinds(architecture)
        rotates = self._rotating(architecture)
        if architecture.mixer is not None:
            _require(listed is not None, "layer_types", "given", listed)
            return tuple(listed or ()), None, rotates
        if not self._has_window(architecture):
            return (FULL,) * self.num_hidden_layers, None, rotates
        slides = self._sliding(architecture, listed, rotates)
        window = self.sliding_window
        _require(
            window is not None or not any(slides),
            "sliding_window",
            "given for layers of sliding_attention",
            "null",
        )
        if architecture.rope == "sliding" and window is not None:
            rotates = slides
        return tuple(SLIDING if sliding else FULL for sliding in slides), window, rotates

    def _listed_kinds(self, architecture: Architecture) -> list[str] | None:
        """The kind of each layer, if config.json lists them."""
        layers = self.num_hidden_layers
        mixer = architecture.mixer
        if mixer is not None and "attn_layer_indices" in architecture.uses:
            kinds = [mixer.kind] * layers
            for layer in self.attn_layer_indices or ():
                if layer < layers:
                    kinds[layer] = FULL
            return kinds
        if self.layer_types is None:
            return None
        needed = f"a list of num_hidden_layers, {layers}, entries"
        _require(len(self.layer_types) == layers, "layer_types", needed, len(self.layer_types))
        known = list(LAYER_KINDS)
        if mixer is not None:
            known = [FULL, mixer.kind]
        if architecture.one_sublayer:
            known.append(MLP)
        needed = f"a list, each one of {', '.join(known)}"
        _require({*self.layer_types} <= {*known}, "layer_types", needed, self.layer_types)
        return self.layer_types

    def _rotating(self, architecture: Architecture) -> list[bool]:
        """Whether each layer has rotary positions, windows apart."""
        layers = self.num_hidden_layers
        if architecture.rope != "listed":
            return [architecture.rope != "none"] * layers
        if self.no_rope_layers is None:
            interval = self.no_rope_layer_interval or 4
            return [bool((layer + 1) % interval) for layer in range(layers)]
        rotates = [bool(rotating) for rotating in self.no_rope_layers[:layers]]
        needed = f"a list of at least num_hidden_layers, {layers}, entries"
        _require(len(rotates) == layers, "no_rope_layers", needed, len(rotates))
        return rotates

    def _has_window(self, architecture: Architecture) -> bool:
        """Whether any layer may have a sliding window."""
        if architecture.windows in ("none", "listed"):
            return architecture.windows == "listed"
        if architecture.windows == "optional" and not self.use_sliding_window:
            return False
        return self.sliding_window is not None

    def _sliding(
        self, architecture: Architecture, listed: list[str] | None, rotates: list[bool]
    ) -> list[bool]:
        """Whether each layer has a sliding window, of an architecture with windows."""
        layers = self.num_hidden_layers
        if architecture.windows == "all":
            return [True] * layers
        if listed is not None:
            return [kind == SLIDING for kind in listed]
        if architecture.rope == "listed":
            return [not rotating for rotating in rotates]
        return [layer >= (self.max_window_layers or 0) for layer in range(layers)]

    def layer_sizes(
        self, architecture: Architecture, kinds: tuple[str, ...]
    ) -> tuple[LayerSizes, ...]:
        """By layer; empty if all are alike."""
        if "per_layer_config" not in architecture.uses:
            return ()
        own = len(kinds) - (self.num_kv_shared_layers or 0)
        last = {kind: index for index, kind in enumerate(kinds[: max(own, 0)])}
        needed = "so few that a layer of each kind has keys and values"
        _require(last.keys() == {*kinds}, "num_kv_shared_layers", needed, self.num_kv_shared_layers)
        dims = [self.head_sizes[1]] * len(kinds)
        for layer, values in (self.per_layer_config or {}).items():
            if int(layer) < len(kinds):
                dims[int(layer)] = values.head_dim
        alike = all(dims[index] == dims[last[kind]] for index, kind in enumerate(kinds))
        _require(alike, "head_dim in per_layer_config", "the same in all layers of a kind", dims)
        most = self.num_attention_heads * max(dims)
        _require(
            most <= _MOST_WIDTH, "num_attention_heads * head_dim", f"at most {_MOST_WIDTH}", most
        )
        shared_inner = self.inner
        if self.use_double_wide_mlp:
            shared_inner *= 2
        sizes = []
        for index, kind in enumerate(kinds):
            if index < own:
                sizes.append(LayerSizes(dims[index], self.inner, None))
            else:
                sizes.append(LayerSizes(dims[index], shared_inner, last[kind]))
        return tuple(sizes)

    def recurrence(
        self, config: Any, architecture: Architecture, kinds: tuple[str, ...]
    ) -> "RecurrenceSpec | None":
        mixer = architecture.mixer
        if mixer is None or mixer.kind not in kinds:
            return None

        def width(name: str) -> Any:
            return _checked(getattr(config, name, None), _Width, name)

        sizes = RecurrenceSpec(
            mixer,
            kernel_size=width(mixer.kernel_size),
            value_dim=self.hidden_size,
            biased=is_on(mixer.biased[0], config),
            biased_convolution=is_on(mixer.biased[1], config),
        )
        if not mixer.sizes:
            return sizes
        key_heads, heads, key_dim, value_dim = map(width, mixer.sizes)
        needed = f"a multiple of {mixer.sizes[0]}, {key_heads}"
        _require(heads % key_heads == 0, mixer.sizes[1], needed, heads)
        sizes = replace(
            sizes, key_heads=key_heads, heads=heads, key_dim=key_dim, value_dim=value_dim
        )
        if mixer.limits is not None:
            sizes = replace(sizes, limits=_limits(config, mixer.limits))
        channels = sizes.channels
        _require(
            channels <= _MOST_WIDTH,
            f"the width of {mixer.kind}",
            f"at most {_MOST_WIDTH}",
            channels,
        )
        return sizes

    def experts(self, architecture: Architecture) -> "ExpertsSpec | None":
        names = architecture.experts
        if names is None:
            return None
        count = _given(" or ".join(EXPERT_COUNTS), self.num_local_experts or self.num_experts)
        chosen = _given("num_experts_per_tok", self.num_experts_per_tok)
        needed = f"at most the number of experts, {count}"
        _require(chosen <= count, "num_experts_per_tok", needed, chosen)
        layers = [True] * self.num_hidden_layers
        if names.on_some_layers:
            dense = self.mlp_only_layers or []
            step = self.decoder_sparse_step or 1
            for layer in range(len(layers)):
                layers[layer] = layer not in dense and (layer + 1) % step == 0
        normalised = names.normalised
        if isinstance(normalised, str):
            normalised = bool(getattr(self, normalised))
        shared_inner = 0
        if names.shared_inner is not None:
            shared_inner = _given(names.shared_inner, getattr(self, names.shared_inner))
        return ExpertsSpec(
            names,
            layers=tuple(layers),
            count=count,
            chosen=chosen,
            inner=_given(names.inner, getattr(self, names.inner)),
            normalised=normalised,
            shared_inner=shared_inner,
        )


# The checked values of rope_parameters; transformers reads those of rarer types.
_ROPE_VALUES: dict[str, Any] = {
    "rope_type": str | None,
    "type": str | None,
    "factor": _Positive | None,
    "alpha": _Positive | None,
    "rope_theta": Annotated[float, Meta(ge=1, le=1e15)] | None,
    "partial_rotary_factor": Annotated[float, Meta(ge=1e-3, le=1)] | None,
    "original_max_position_embeddings": _Positions | None,
}


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding, by rope_parameters of config.json."""

    parameters: Mapping[str, Any]
    kind: str | None  # of its layers, if config.json has parameters by kind

    @property
    def type(self) -> str:
        stated = str(self.parameters.get("rope_type", self.parameters.get("type", "default")))
        if stated == "dynamic" and self.parameters.get("alpha"):
            return "default"  # Hunyuan's factor of the base
        return stated

    @property
    def share(self) -> float:
        """The share of a head that rotates: all of it in a proportional rope, where some pairs have
        frequency 0.
        """
        if self.type == "proportional":
            return 1.0
        return float(self.parameters.get("partial_rotary_factor") or 1.0)


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a model."""

    names: Experts  # of their weights
    layers: tuple[bool, ...]  # whether each layer has experts
    count: int
    chosen: int  # by each token
    inner: int  # width of an expert
    normalised: bool  # whether the weights of a token's experts sum to 1
    shared_inner: int  # width of the shared MLP, which runs for every token; 0 for none

    @property
    def gates_shared(self) -> bool:
        """Whether the shared MLP has a gate."""
        return self.names.shared_gate is not None

    @property
    def shared(self) -> int:
        """How many experts the shared MLP is split into."""
        return self.shared_inner // self.inner

    @property
    def choices(self) -> int:
        """The number of experts that run for a token."""
        return self.chosen + self.shared

    @property
    def are_equal(self) -> bool:
        """Whether the shared MLP splits into experts of `inner`, and the kernels can run so
        many.
        """
        return self.shared_inner % self.inner == 0 and self.count + self.shared <= _MOST_EXPERTS


@dataclass(frozen=True)
class RecurrenceSpec:
    """The short convolutions and recurrences of a model, in layers without attention."""

    mixer: Mixer  # the names of their weights
    kernel_size: int
    value_dim: int  # of a convolution alone: the hidden size
    biased: bool  # projections
    biased_convolution: bool
    key_heads: int = 0  # 0 where there is no recurrence
    heads: int = 1
    key_dim: int = 0
    limits: tuple[float, float] | None = None  # of Mamba-2's steps

    @property
    def key_width(self) -> int:
        """Width of all key heads together."""
        return self.key_heads * self.key_dim

    @property
    def outputs(self) -> int:
        """Width of the last projection's input."""
        return self.heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return 2 * self.key_width + self.outputs

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the projections:

        - of Mamba-2: gates; values, keys and queries; steps
        - of a gated delta rule: queries, keys and values; gates
        - of a convolution alone: gates of its inputs, gates of its outputs, inputs
        """
        if self.limits is not None:
            return self.outputs, self.channels, self.heads
        if self.key_heads:
            return self.channels, self.outputs
        return (3 * self.channels,)

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a layer's weights between its projections."""
        mixer = self.mixer
        shapes: dict[str, tuple[int, ...]] = {
            f"{mixer.convolution}.weight": (self.channels, 1, self.kernel_size)
        }
        if self.biased_convolution:
            shapes[f"{mixer.convolution}.bias"] = (self.channels,)
        for name in mixer.steps:
            shapes[f"{name}.weight"] = (2 * self.heads // len(mixer.steps), hidden)
        for name in mixer.rates:
            shapes[name] = (self.heads,)
        if mixer.norm is not None:
            # Mamba-2 norms groups of heads, with factors for all of them
            per_head = self.limits is None
            shapes[f"{mixer.norm}.weight"] = (self.value_dim if per_head else self.outputs,)
        return shapes


def read_values(config: Any, architecture: Architecture) -> Values:
    """Reads a configuration object. Raises CheckpointError for the first value of a wrong type or
    out of range.
    """
    names = {
        **architecture.values,
        "norm_eps": architecture.norm_eps,
        "activation": architecture.activation,
    }
    hints = hints_of(Values)
    values = dict[str, Any]()
    for field in fields(Values):
        name = names.get(field.name, field.name)
        if not isinstance(name, str):  # a fixed value
            values[field.name] = name
        elif field.default is not None or field.name in architecture.uses:
            found = getattr(config, name, None)
            if field.name == "num_hidden_layers" and isinstance(found, list):
                found = len(found)
            values[field.name] = _checked(found, hints[field.name], name)
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    causal = not bidirectional or bidirectional == "vision"  # vision: among an image's tokens only
    needed = "false, because generation is causal"
    _require(causal, "use_bidirectional_attention", needed, bidirectional)
    return Values(**values)


def is_on(switch: str | bool, config: Any) -> bool:
    """Whether a `str | bool` field of Architecture holds: always, never, or by a value of the
    configuration.
    """
    if isinstance(switch, bool):
        return switch
    return bool(_checked(getattr(config, switch, None), bool | None, switch))


def _limits(config: Any, name: str) -> tuple[float, float]:
    """The least and the greatest step; a single number is the least."""
    least = getattr(config, name, None)
    most: Any = inf
    if isinstance(least, list | tuple) and len(least) == 2:
        least, most = least
    if most == {"__float__": "Infinity"}:  # as transformers writes it
        most = inf
    return _checked(least, _Limit, name), _checked(most, _Limit, name)


def _checked(value: Any, hint: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise CheckpointError(f"{name} must be {needed(hint)}, got {shown(value)}") from None


def ropes_of(
    config: Any, architecture: Architecture, kinds: tuple[str, ...]
) -> tuple[RopeSpec, ...]:
    """The rotary embeddings: one for all layers, or one by kind of layer (Gemma 3)."""
    if architecture.rope == "none":
        return ()
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind: dict[str | None, Any] = {None: parameters}
    if isinstance(parameters, Mapping) and any(kind in parameters for kind in LAYER_KINDS):
        by_kind = {kind: parameters.get(kind) or {} for kind in dict.fromkeys(kinds)}
    for kind, values in by_kind.items():
        where = "rope_parameters"
        if kind is not None:
            where += f".{kind}"
        _require(isinstance(values, Mapping), where, "an object", values)
        for name, hint in _ROPE_VALUES.items():
            _checked(values.get(name), hint, f"{where}.{name}")
    return tuple(RopeSpec(values, kind) for kind, values in by_kind.items())


def rotary_size(head_dim: int, ropes: Sequence[RopeSpec], architecture: Architecture) -> int:
    """The number of a head's dimensions that rotate."""
    rotary = head_dim
    if architecture.partial_rope:
        rotary = int(head_dim * min(rope.share for rope in ropes))
    _require(
        rotary > 0 and rotary % 2 == 0,
        "head_dim * partial_rotary_factor",
        "an even number above 0",
        rotary,
    )
    return rotary


def _given(name: str, value: int | None) -> int:
    _require(value is not None, name, "a whole number", value)
    return value or 0


def _require(condition: bool, name: str, needed: str, found: object) -> None:
    if not condition:
        raise CheckpointError(f"{name} must be {needed}, got {shown(found)}")
