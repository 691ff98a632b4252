"""What an architecture is: the one place that turns a configuration into layers, heads and windows, and says which weights of
which shapes belong to it. Every implementation of a model begins here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from ..errors import CheckpointError
from .config_values import MOST_WIDTH, check_values, rope_types

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """How a family of models differs from the others. `biases`: of the attention's projections, of all, some or as configured.

    `windows`: which layers see a window only: those that `layer_types` names, where the configuration says that it is used
    ("optional") or always ("listed"), all layers where there is one ("all"), or none.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: bool = False  # one of each query and key head
    projection_norms: bool = False  # one of all queries, and one of all keys
    attention_bias: tuple[str, ...] | None = ()  # projections with a bias; None: all if `attention_bias` says so
    mlp_bias: bool = False  # whether `mlp_bias` is heeded
    windows: str = "none"
    skips_rope: bool = False  # whether `no_rope_layers` is heeded


_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

# Decoders whose forward is embed, a chain of layers, a final norm and a head. Each is tested against model(...).
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(attention_bias=None, mlp_bias=True),
    "mistral": Architecture(windows="all"),
    "qwen2": Architecture(attention_bias=("q_proj", "k_proj", "v_proj"), windows="optional"),
    "qwen3": Architecture(attention_bias=None, head_norms=True, windows="optional"),
    "gemma": Architecture(attention_bias=None),
    "gemma2": Architecture(_AROUND, attention_bias=None, windows="listed"),
    "gemma3_text": Architecture(_AROUND, attention_bias=None, head_norms=True, windows="listed"),
    "smollm3": Architecture(attention_bias=None, mlp_bias=True, windows="optional", skips_rope=True),
    "olmo2": Architecture(
        ("post_attention_layernorm", "post_feedforward_layernorm"), attention_bias=None, projection_norms=True
    ),
    "granite": Architecture(attention_bias=None, mlp_bias=True),
}
SUPPORTED = tuple(ARCHITECTURES)


def architecture_of(model_type: Any) -> Architecture:
    """Raises CheckpointError, naming the model type, unless its decoder can be run in spans."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(f"model type {model_type!r} cannot be split by depth; supported: {', '.join(SUPPORTED)}")
    return ARCHITECTURES[model_type]


@dataclass(frozen=True)
class ModelSpec:
    """A model's sizes and the ways of its layers, all checked. Widths: `queries` and `keys` are those of all their heads."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    context: int
    eps: float
    kinds: tuple[str, ...]  # 'full_attention' or 'sliding_attention' by layer
    window: int | None  # positions that a sliding layer sees
    rotates: tuple[bool, ...]  # by layer: whether it has rotary positions
    attention_bias: tuple[str, ...]  # projections of the attention that have a bias
    mlp_bias: bool
    tied: bool  # whether the head is the embedding

    @classmethod
    def of(cls, config: Any) -> "ModelSpec":
        """What a configuration says, its values as attributes. Raises CheckpointError naming the first that cannot be."""
        architecture = architecture_of(config.model_type)
        check_values(vars(config))
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            _require(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads, {heads}", hidden)
            head_dim = hidden // heads
            _require(head_dim % 2 == 0, "hidden_size / num_attention_heads", "an even number", head_dim)
        _require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}", heads)
        # The base of a dynamic rope is raised to head_dim / (head_dim - 2).
        _require(head_dim > 2 or "dynamic" not in rope_types(vars(config)), "head_dim", "above 2 for a dynamic rope", head_dim)
        _require(heads * head_dim <= MOST_WIDTH, "num_attention_heads * head_dim", f"at most {MOST_WIDTH}", heads * head_dim)
        biases = architecture.attention_bias
        if biases is None:
            biases = ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()
        rotates = _rotates(config, layers) if architecture.skips_rope else (True,) * layers
        kinds, window = _windows(config, architecture, rotates)
        return cls(
            model_type=config.model_type,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            eps=float(config.rms_norm_eps),
            kinds=kinds,
            window=window,
            rotates=rotates,
            attention_bias=biases,
            mlp_bias=architecture.mlp_bias and bool(getattr(config, "mlp_bias", False)),
            tied=config.tie_word_embeddings,
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights, as in a checkpoint; a tied head is the embedding and has none."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            **({} if self.tied else {"lm_head.weight": (self.vocab, self.hidden)}),
        }
        layer = self._layer_shapes()
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def window_of(self, layer: int) -> int | None:
        """How many positions a layer sees; None for all."""
        return self.window if self.kinds[layer] == "sliding_attention" else None

    def check_weights(self, found: Shapes) -> None:
        """Raises CheckpointError for a weight that is missing from what was `found`, or has another shape."""
        if missing := sorted(name for name in self.shapes if name not in found):
            raise CheckpointError(f"{len(missing)} weights are missing, {missing[0]} the first")
        for name, shape in self.shapes.items():
            check_shape(name, shape, found[name])

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        architecture = ARCHITECTURES[self.model_type]
        projections = {
            "self_attn.q_proj": (self.queries, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.queries),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        biased = {f"self_attn.{name}" for name in self.attention_bias}
        biased |= {name for name in projections if self.mlp_bias and name.startswith("mlp.")}
        norms = dict.fromkeys(architecture.norms, self.hidden)
        if architecture.head_norms:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        if architecture.projection_norms:
            norms |= {"self_attn.q_norm": self.queries, "self_attn.k_norm": self.keys}
        return {
            **{f"{name}.weight": shape for name, shape in projections.items()},
            **{f"{name}.bias": (shape[0],) for name, shape in projections.items() if name in biased},
            **{f"{name}.weight": (size,) for name, size in norms.items()},
        }


def check_shape(name: str, needed: tuple[int, ...], found: tuple[int, ...]) -> None:
    if tuple(found) != needed:
        raise CheckpointError(f"size mismatch of {name}: needed {list(needed)}, found {list(found)}")


def _windows(config: Any, architecture: Architecture, rotates: tuple[bool, ...]) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer, and how many positions the sliding ones see."""
    layers = len(rotates)
    window = getattr(config, "sliding_window", None)
    listed = getattr(config, "layer_types", None)
    if listed is not None:
        _require(len(listed) == layers, "layer_types", f"a list of num_hidden_layers, {layers}, entries", len(listed))
    optional = architecture.windows == "optional"
    unused = window is None or (optional and not getattr(config, "use_sliding_window", False))
    if architecture.windows == "none" or (architecture.windows != "listed" and unused):
        return ("full_attention",) * layers, None
    if architecture.windows == "all":
        slides = [True] * layers
    elif listed is not None:
        slides = [kind == "sliding_attention" for kind in listed]
    elif architecture.skips_rope:
        slides = [not rotating for rotating in rotates]
    else:
        first = getattr(config, "max_window_layers", None) or 0
        slides = [layer >= first for layer in range(layers)]
    _require(window is not None or not any(slides), "sliding_window", "given for layers of sliding_attention", "null")
    return tuple("sliding_attention" if each else "full_attention" for each in slides), window


def _rotates(config: Any, layers: int) -> tuple[bool, ...]:
    rotating = getattr(config, "no_rope_layers", None)
    if rotating is None:
        interval = getattr(config, "no_rope_layer_interval", None) or 4
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    _require(
        len(rotating) >= layers, "no_rope_layers", f"a list of at least num_hidden_layers, {layers}, entries", len(rotating)
    )
    return tuple(map(bool, rotating[:layers]))


def _require(condition: bool, name: str, needed: str, found: object) -> None:
    if not condition:
        raise CheckpointError(f"{name} must be {needed}, got {found}")
