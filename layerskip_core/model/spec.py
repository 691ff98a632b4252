"""What a model is: this module turns a configuration into sizes, norms, biases, windows and the names of weights. Every
backend is built from its ModelSpec.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .architectures import Architecture, architecture_of
from .config_values import LAYER_KINDS, MOST_WIDTH, check_values, rope_types

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
FULL, SLIDING = LAYER_KINDS
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding, by rope_parameters of config.json."""

    parameters: Mapping[str, Any]
    kind: str | None  # of the layers that use it, where config.json has parameters for each kind

    @property
    def type(self) -> str:
        return str(self.parameters.get("rope_type", self.parameters.get("type", "default")))

    @property
    def share(self) -> float:
        """Of a head that rotates."""
        return float(self.parameters.get("partial_rotary_factor") or 1.0)


@dataclass(frozen=True)
class ModelSpec:
    """A model's sizes and the variants of its layers, all checked."""

    model_type: str
    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    context: int  # positions
    eps: float  # of every norm
    activation: str  # transformers' name
    kinds: tuple[str, ...]  # 'full_attention' or 'sliding_attention', by layer
    window: int | None  # positions that a sliding layer sees
    ropes: tuple[RopeSpec, ...]  # the different rotary embeddings
    rope_of: tuple[int | None, ...]  # by layer: the index of its rotary embedding; None where it has no positions
    rotary: int  # dimensions of a head that rotate, from the first on
    attention_bias: tuple[str, ...]  # projections of the attention that have a bias
    mlp_bias: bool
    tied: bool  # whether the head is the embedding
    attention_scale: float
    embedding_scale: float
    residual_scale: float  # of what a block adds
    logits_divisor: float
    embedding_dropout: float  # of training
    score_cap: float | None  # c of c * tanh(score / c)
    logits_cap: float | None
    config: Any = field(repr=False, compare=False)  # the configuration itself

    @classmethod
    def of(cls, config: Any) -> "ModelSpec":
        """Reads a configuration object. Raises CheckpointError, naming the first value that is out of range."""
        architecture = architecture_of(config.model_type)
        check_values(vars(config))
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = _value(config, "num_key_value_heads", heads)
        head_dim = _head_dim(config)
        _require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}", heads)
        _require(heads * head_dim <= MOST_WIDTH, "num_attention_heads * head_dim", f"at most {MOST_WIDTH}", heads * head_dim)
        biases = architecture.attention_bias
        if isinstance(biases, str):
            biases = architecture.attention_projections if _value(config, biases, False) else ()
        rotates = _rotates(config, layers) if architecture.skips_rope else (True,) * layers
        kinds, window = _windows(config, architecture, rotates)
        ropes = _ropes(config, kinds)
        _check_longropes(ropes, head_dim)
        rope_indices = {rope.kind: index for index, rope in enumerate(ropes)}
        multipliers = architecture.multipliers
        scale = head_dim**-0.5
        if architecture.scales_queries:
            scale = _value(config, "query_pre_attn_scalar", 256) ** -0.5
        return cls(
            model_type=config.model_type,
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            context=_context(config, ropes),
            eps=float(getattr(config, architecture.norm_eps)),
            activation=_value(config, architecture.activation, architecture.default_activation),
            kinds=kinds,
            window=window,
            ropes=ropes,
            rope_of=tuple(
                rope_indices.get(kind, 0) if rotating else None for kind, rotating in zip(kinds, rotates, strict=True)
            ),
            rotary=_rotary(head_dim, ropes) if architecture.partial_rope else head_dim,
            attention_bias=biases or (),
            mlp_bias=architecture.mlp_bias is not None and bool(_value(config, architecture.mlp_bias, False)),
            tied=config.tie_word_embeddings,
            attention_scale=float(_value(config, "attention_multiplier", 1.0)) if multipliers else scale,
            embedding_scale=_embedding_scale(config, architecture),
            residual_scale=float(_value(config, "residual_multiplier", 1.0)) if multipliers else 1.0,
            logits_divisor=float(_value(config, "logits_scaling", 1.0)) if multipliers else 1.0,
            embedding_dropout=float(_value(config, "embedding_dropout", 0.0)) if architecture.drops_embeddings else 0.0,
            score_cap=_value(config, "attn_logit_softcapping", None) if architecture.caps_scores else None,
            logits_cap=_value(config, "final_logit_softcapping", None) if architecture.caps_logits else None,
            config=config,
        )

    @property
    def head_name(self) -> str:
        """The name of the head's weight; the embedding's where that is the head."""
        return EMBEDDING if self.tied else "lm_head.weight"

    @property
    def norms_blocks(self) -> bool:
        """Whether a norm comes after attention or the MLP, before their output is added."""
        return self.architecture.attention_norms.after is not None or self.architecture.mlp_norms.after is not None

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights, as in a checkpoint; a tied head is the embedding and has none."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab, self.hidden),
            **self.norm_shapes("model.norm", self.hidden),
            **({} if self.tied else {self.head_name: (self.vocab, self.hidden)}),
        }
        layer = self.layer_shapes
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    def scaled_logits(self, logits: "Tensor") -> "Tensor":
        """The output of the head after the division and the soft cap of an architecture, if it has them."""
        if self.logits_divisor != 1:
            logits = logits / self.logits_divisor
        return logits if self.logits_cap is None else (logits / self.logits_cap).tanh() * self.logits_cap

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def window_of(self, layer: int) -> int | None:
        """How many positions a layer sees; None for all."""
        return self.window_of_kind(self.kinds[layer])

    def window_of_kind(self, kind: str) -> int | None:
        return self.window if kind == SLIDING else None

    def check_weights(self, stored: Shapes) -> None:
        """Raises CheckpointError for a weight that is missing from the `stored` ones, or has another shape."""
        if missing := sorted(name for name in self.shapes if name not in stored):
            raise CheckpointError(f"{len(missing)} weights are missing, {missing[0]} the first")
        for name, shape in self.shapes.items():
            check_shape(name, shape, stored[name])

    @cached_property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of one layer, after its prefix."""
        architecture = self.architecture
        projections = {
            **_projections("self_attn.", architecture.attention_projections, (self.queries, self.keys, self.keys), self.hidden),
            **_projections("mlp.", architecture.mlp_projections, (self.inner,) * (1 + architecture.gated), self.hidden),
        }
        biased = {f"self_attn.{name}" for name in self.attention_bias}
        biased |= {name for name in projections if self.mlp_bias and name.startswith("mlp.")}
        norms = {name: self.hidden for name in (*architecture.attention_norms, *architecture.mlp_norms) if name is not None}
        if architecture.query_key_norms == "head":
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        elif architecture.query_key_norms == "projection":
            norms |= {"self_attn.q_norm": self.queries, "self_attn.k_norm": self.keys}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"{name}.bias": (shape[0],) for name, shape in projections.items() if name in biased}
        for name, size in norms.items():
            shapes |= self.norm_shapes(name, size)
        return shapes

    def norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of a norm over `size` numbers."""
        parts = ("weight", "bias") if self.architecture.norm == "layer" else ("weight",)
        return {f"{name}.{part}": (size,) for part in parts}


def check_shape(name: str, needed: tuple[int, ...], stored: tuple[int, ...]) -> None:
    """Raises CheckpointError for a weight of another shape than is needed."""
    if tuple(stored) != needed:
        raise CheckpointError(f"size mismatch of {name}: needed {list(needed)}, found {list(stored)}")


def _projections(prefix: str, names: tuple[str, ...], outputs: tuple[int, ...], hidden: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of a block's projections, the last of which leads back to the hidden states."""
    *inward, back = names
    widths = outputs if len(inward) == len(outputs) else (sum(outputs),)
    inner = outputs[0]
    shapes = {prefix + name: (width, hidden) for name, width in zip(inward, widths, strict=True)}
    return {**shapes, prefix + back: (hidden, inner)}


def _value(config: Any, name: str, default: Any) -> Any:
    """A value that a configuration may leave out or set to null."""
    value = getattr(config, name, None)
    return default if value is None else value


def _head_dim(config: Any) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim: int | None = _value(config, "head_dim", None)
    if head_dim is None:
        _require(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads, {heads}", hidden)
        head_dim = hidden // heads
        _require(head_dim % 2 == 0, "hidden_size / num_attention_heads", "an even number", head_dim)
    # The base of a dynamic rope is raised to head_dim / (head_dim - 2).
    _require(head_dim > 2 or "dynamic" not in rope_types(vars(config)), "head_dim", "above 2 for a dynamic rope", head_dim)
    return head_dim


def _embedding_scale(config: Any, architecture: Architecture) -> float:
    if architecture.multipliers:
        return float(_value(config, "embedding_multiplier", 1.0))
    return sqrt(config.hidden_size) if architecture.scales_embeddings else 1.0


def _ropes(config: Any, kinds: tuple[str, ...]) -> tuple[RopeSpec, ...]:
    parameters = _value(config, "rope_parameters", {})
    if not any(kind in parameters for kind in LAYER_KINDS):
        return (RopeSpec(parameters, None),)
    return tuple(RopeSpec(parameters.get(kind) or {}, kind) for kind in dict.fromkeys(kinds))


def _check_longropes(ropes: tuple[RopeSpec, ...], head_dim: int) -> None:
    for rope in ropes:
        pairs = int(head_dim * rope.share) // 2
        for name in ("short_factor", "long_factor"):
            factors = rope.parameters.get(name)
            if rope.type == "longrope" and factors is not None:
                _require(len(factors) == pairs, f"rope_parameters.{name}", f"a list of {pairs} entries", len(factors))


def _rotary(head_dim: int, ropes: tuple[RopeSpec, ...]) -> int:
    rotary = int(head_dim * min(rope.share for rope in ropes))
    _require(rotary > 0 and rotary % 2 == 0, "head_dim * partial_rotary_factor", "an even number above 0", rotary)
    return rotary


def _context(config: Any, ropes: tuple[RopeSpec, ...]) -> int:
    """Positions that a model can have.

    A longrope changes the frequencies of all positions when a text outgrows the original context, so keys that are cached
    would no longer fit: such a model ends there.
    """
    limits: list[int] = [config.max_position_embeddings]
    for rope in ropes:
        if rope.type == "longrope" and (original := rope.parameters.get("original_max_position_embeddings")) is not None:
            limits.append(original)
    return min(limits)


def _windows(config: Any, architecture: Architecture, rotates: tuple[bool, ...]) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer, and how many positions the sliding ones see."""
    layers = len(rotates)
    window = _value(config, "sliding_window", None)
    listed = _value(config, "layer_types", None)
    if listed is not None:
        _require(len(listed) == layers, "layer_types", f"a list of num_hidden_layers, {layers}, entries", len(listed))
    optional = architecture.windows == "optional"
    unused = window is None or (optional and not _value(config, "use_sliding_window", False))
    if architecture.windows == "none" or (architecture.windows != "listed" and unused):
        return (FULL,) * layers, None
    if architecture.windows == "all":
        slides = [True] * layers
    elif listed is not None:
        slides = [kind == SLIDING for kind in listed]
    elif architecture.skips_rope:
        slides = [not rotating for rotating in rotates]
    else:
        first = _value(config, "max_window_layers", 0)
        slides = [layer >= first for layer in range(layers)]
    _require(window is not None or not any(slides), "sliding_window", "given for layers of sliding_attention", "null")
    return tuple(SLIDING if sliding else FULL for sliding in slides), window


def _rotates(config: Any, layers: int) -> tuple[bool, ...]:
    listed = _value(config, "no_rope_layers", None)  # 1 where a layer does rotate, whatever the name says
    if listed is None:
        interval = _value(config, "no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    _require(len(listed) >= layers, "no_rope_layers", f"a list of at least num_hidden_layers, {layers}, entries", len(listed))
    return tuple(map(bool, listed[:layers]))


def _require(condition: bool, name: str, needed: str, found: object) -> None:
    if not condition:
        raise CheckpointError(f"{name} must be {needed}, got {found}")
