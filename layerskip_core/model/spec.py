"""What a model is: this module turns a configuration into sizes, norms, biases, windows and the names of weights. Every
backend is built from its ModelSpec.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..config.options import hints_of, needed
from ..errors import CheckpointError, shown
from .architectures import EXPERT_COUNTS, SUPPORTED, Architecture, Names, known_architecture

if TYPE_CHECKING:
    from torch import Tensor

Block = Literal["attention", "mlp"]
Shapes = Mapping[str, tuple[int, ...]]
LAYER_KINDS = FULL, SLIDING = "full_attention", "sliding_attention"
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "context_length", "seq_length")
_USUAL_CONTEXT = 2048  # of a model without a limit of its own, such as BLOOM
_MOST_WIDTH = 1 << 20  # of hidden states, all heads together and the MLP: the kernels count in 32 bits
_Width = Annotated[int, Meta(ge=1, le=_MOST_WIDTH)]
_Positions = Annotated[int, Meta(ge=1, le=1 << 27)]
_Window = Annotated[int, Meta(ge=0, le=1 << 31)]
_TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]
_ExpertCount = Annotated[int, Meta(ge=1, le=1024)]  # as the kernels have room for
_Positive = Annotated[float, Meta(ge=1e-6, le=1e6)]  # what is computed from it is finite in fp32
_Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]


@dataclass(frozen=True)
class _Values:
    """The values of config.json that are read here, with their types and ranges. Null stands for the architecture's default."""

    num_hidden_layers: Annotated[int, Meta(ge=1, le=1024)]
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    hidden_size: _Width
    intermediate_size: _Width | None
    num_attention_heads: _Width
    num_key_value_heads: _Width | None
    head_dim: Annotated[int, Meta(ge=2, le=1024, multiple_of=2, description="an even number in 2..1024")] | None
    max_position_embeddings: _Positions
    norm_eps: _Epsilon
    tie_word_embeddings: bool
    activation: str | None
    use_sliding_window: bool | None
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 31)] | None
    max_window_layers: _Window | None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None
    no_rope_layers: list[Annotated[int, Meta(ge=0, le=1)]] | None  # 1 where a layer does rotate, whatever the name says
    no_rope_layer_interval: Annotated[int, Meta(ge=1)] | None
    query_pre_attn_scalar: _Positive | None
    embedding_multiplier: _Positive | None
    attention_multiplier: _Positive | None
    residual_multiplier: _Positive | None
    logits_scaling: _Positive | None
    attn_logit_softcapping: _Positive | None
    final_logit_softcapping: _Positive | None
    logit_scale: _Positive | None
    num_experts: _ExpertCount | None
    num_local_experts: _ExpertCount | None
    num_experts_per_tok: _ExpertCount | None
    moe_intermediate_size: _Width | None
    norm_topk_prob: bool | None
    decoder_sparse_step: Annotated[int, Meta(ge=1)] | None
    mlp_only_layers: list[Annotated[int, Meta(ge=0)]] | None
    clip_qkv: _Positive | None
    eos_token_id: _TokenId | list[_TokenId] | None


@dataclass(frozen=True)
class _RopeValues:
    """Those of rope_parameters that are checked here; transformers computes the rarer types and reads the others."""

    rope_type: str | None
    type: str | None
    rope_theta: Annotated[float, Meta(ge=1, le=1e15)] | None
    factor: _Positive | None
    alpha: _Positive | None
    partial_rotary_factor: Annotated[float, Meta(ge=1e-3, le=1)] | None
    original_max_position_embeddings: _Positions | None


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding, by rope_parameters of config.json."""

    parameters: Mapping[str, Any]
    kind: str | None  # of the layers that use it, where config.json has parameters for each kind

    @property
    def type(self) -> str:
        stated = str(self.parameters.get("rope_type", self.parameters.get("type", "default")))
        return "default" if stated == "dynamic" and self.parameters.get("alpha") else stated

    @property
    def share(self) -> float:
        """Of a head that rotates."""
        return float(self.parameters.get("partial_rotary_factor") or 1.0)


@dataclass(frozen=True)
class TransformersSpec:
    """What is known of a model that only transformers runs."""

    model_type: str
    layers: int
    hidden: int
    vocab: int
    context: int  # positions
    tied: bool  # whether the head is the embedding
    parameters: int
    shapes: Shapes = field(repr=False)  # of all weights, by their names; a tied head has none
    block_shapes: Shapes = field(repr=False)  # of an exit block's weights; none where it can have no exit blocks
    config: Any = field(repr=False, compare=False)  # the configuration itself

    def weights_read(self, rows: int) -> float:
        """How many weights a pass over so many tokens reads: those of the layers and of the head."""
        return self.parameters - (0 if self.tied else self.vocab * self.hidden)

    @classmethod
    def of(cls, model: Any, layers: int, block_parts: Mapping[str, Any]) -> "TransformersSpec":
        """Of a transformers model with so many layers, and the modules that its exit blocks copy, by name."""
        config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
        context = next(filter(None, (getattr(config, name, None) for name in _CONTEXTS)), _USUAL_CONTEXT)
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        parts = [named for part, module in block_parts.items() for named in module.named_parameters(part)]
        sizes = layers, config.hidden_size, config.vocab_size, context, tied, sum(map(prod, shapes.values()))
        return cls(model.config.model_type, *sizes, shapes, {name: tuple(weight.shape) for name, weight in parts}, model.config)


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a model, in the layers that have them."""

    layers: tuple[bool, ...]  # whether each layer has experts
    count: int
    chosen: int  # by each token
    inner: int  # width of an expert
    normalised: bool  # whether the weights of a token's experts sum to 1


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model that our kernels run and the variants of its layers, all checked."""

    model_type: str
    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    experts: ExpertsSpec | None
    vocab: int
    context: int  # positions
    eps: float  # of every norm
    activation: str  # transformers' name
    kinds: tuple[str, ...]  # 'full_attention' or 'sliding_attention', by layer
    window: int | None  # positions that a sliding layer sees
    ropes: tuple[RopeSpec, ...]  # the different rotary embeddings
    rope_of: tuple[int | None, ...]  # by layer: the index of its rotary embedding; None where it has no positions
    rotary: int  # dimensions of a head that rotate, from the first on
    parallel: bool  # attention and MLP read the same hidden states
    query_bias: bool  # of keys and values too
    output_bias: bool  # of the attention
    mlp_bias: bool
    tied: bool  # whether the head is the embedding
    attention_scale: float
    embedding_scale: float
    residual_scale: float  # of what a block adds
    logits_divisor: float
    score_cap: float | None  # c of c * tanh(score / c)
    logits_cap: float | None
    clip: float | None  # largest magnitude of queries, keys and values
    config: Any = field(repr=False, compare=False)  # the configuration itself

    @classmethod
    def of(cls, config: Any) -> "ModelSpec":
        """Reads a configuration object. Raises CheckpointError, naming the first value that is out of range."""
        if (architecture := known_architecture(config)) is None:
            raise CheckpointError(f"model_type must be one of {', '.join(SUPPORTED)}, got {config.model_type!r:.60}")
        names = {**architecture.values, "norm_eps": architecture.norm_eps, "activation": architecture.activation}
        values: _Values = _read(_Values, lambda name: getattr(config, name, None), names=names)

        def has(switch: str | bool) -> bool:
            return switch if isinstance(switch, bool) else bool(_checked(getattr(config, switch, None), bool | None, switch))

        bidirectional = getattr(config, "use_bidirectional_attention", None)
        _require(not bidirectional, "use_bidirectional_attention", "false, because generation is causal", bidirectional)
        layers, hidden, heads = values.num_hidden_layers, values.hidden_size, values.num_attention_heads
        kv_heads, head_dim = values.num_key_value_heads or heads, values.head_dim
        if head_dim is None:
            _require(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads, {heads}", hidden)
            head_dim = hidden // heads
            _require(head_dim % 2 == 0, "hidden_size / num_attention_heads", "an even number", head_dim)
        _require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}", heads)
        _require(heads * head_dim <= _MOST_WIDTH, "num_attention_heads * head_dim", f"at most {_MOST_WIDTH}", heads * head_dim)
        rotates = _rotates(values) if architecture.rope == "listed" else (architecture.rope != "none",) * layers
        kinds, window = _kinds_and_window(values, architecture, rotates)
        if architecture.rope == "sliding" and window is not None:
            rotates = tuple(kind == SLIDING for kind in kinds)
        ropes = () if architecture.rope == "none" else _ropes(getattr(config, "rope_parameters", None) or {}, kinds)
        context = values.max_position_embeddings
        for rope in ropes:  # a longrope changes all frequencies after its original context: cached keys would no longer fit
            original = rope.parameters.get("original_max_position_embeddings") if rope.type == "longrope" else None
            context = min(context, original or context)
        rope_indices = {rope.kind: index for index, rope in enumerate(ropes)}
        rotary = int(head_dim * min(rope.share for rope in ropes)) if architecture.partial_rope else head_dim
        _require(rotary > 0 and rotary % 2 == 0, "head_dim * partial_rotary_factor", "an even number above 0", rotary)
        attention_scale, embedding_scale, residual_scale, logits_divisor = head_dim**-0.5, 1.0, 1.0, 1.0
        if architecture.scales_queries:
            attention_scale = (values.query_pre_attn_scalar or 256) ** -0.5
        if architecture.scales_embeddings:
            embedding_scale = sqrt(hidden)
        if architecture.multipliers:
            attention_scale, embedding_scale = values.attention_multiplier or 1.0, values.embedding_multiplier or 1.0
            residual_scale, logits_divisor = values.residual_multiplier or 1.0, values.logits_scaling or 1.0
        if architecture.scales_logits:
            logits_divisor = 1 / (values.logit_scale or 1.0)
        return cls(
            model_type=config.model_type,
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=values.intermediate_size or 4 * hidden,
            experts=_experts(values, architecture),
            vocab=values.vocab_size,
            context=context,
            eps=values.norm_eps,
            activation=values.activation or architecture.default_activation,
            kinds=kinds,
            window=window,
            ropes=ropes,
            rope_of=tuple(
                rope_indices.get(kind, 0) if rotating else None for kind, rotating in zip(kinds, rotates, strict=True)
            ),
            rotary=rotary,
            parallel=has(architecture.parallel),
            query_bias=has(architecture.query_bias),
            output_bias=has(architecture.output_bias),
            mlp_bias=has(architecture.mlp_bias),
            tied=values.tie_word_embeddings,
            attention_scale=attention_scale,
            embedding_scale=embedding_scale,
            residual_scale=residual_scale,
            logits_divisor=logits_divisor,
            score_cap=values.attn_logit_softcapping if architecture.caps_scores else None,
            logits_cap=values.final_logit_softcapping if architecture.caps_logits else None,
            clip=values.clip_qkv if architecture.clips_projections else None,
            config=config,
        )

    @property
    def names(self) -> Names:
        return self.architecture.names

    @property
    def embedding_name(self) -> str:
        """The name of the embedding's weight."""
        return f"{self.names.embedding}.weight"

    @property
    def head_name(self) -> str:
        """The name of the head's weight; the embedding's where that is the head."""
        return self.embedding_name if self.tied else "lm_head.weight"

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's weights begin with."""
        return f"{self.names.layers}.{layer}."

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

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
            self.embedding_name: (self.vocab, self.hidden),
            **({} if self.names.positions is None else {f"{self.names.positions}.weight": (self.context, self.hidden)}),
            **self.norm_shapes(self.names.norm, self.hidden),
            **({} if self.tied else {self.head_name: (self.vocab, self.hidden)}),
            **({"lm_head.bias": (self.vocab,)} if self.architecture.head_bias else {}),
        }
        for index in range(self.layers):
            shapes |= {self.layer_prefix(index) + name: shape for name, shape in self.shapes_of_layer(index).items()}
        return shapes

    @property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an exit block's weights: of a layer, and of a norm."""
        last = self.shapes_of_layer(self.layers - 1)  # which the layers of exit blocks are like
        return {f"layer.{name}": shape for name, shape in last.items()} | self.norm_shapes("norm", self.hidden)

    @property
    def stored_parts(self) -> dict[str, list[list[str]]]:
        """By the name of a weight that checkpoints store under other names or in parts: these, of each expert.

        A weight without a dimension of experts has one list.
        """
        parts: dict[str, list[list[str]]] = {}
        if (head := self.names.stored_head) is not None and not self.tied:
            parts[self.head_name] = [[f"{head}.weight"]]
        if self.experts is None or self.architecture.experts is None:
            return parts
        for index in (index for index, has_experts in enumerate(self.experts.layers) if has_experts):
            prefix = self.layer_prefix(index)
            for name, stored in self.architecture.experts.stored.items():
                count = self.experts.count if "{}" in stored[0] else 1
                parts[prefix + name] = [[prefix + part.format(expert) for part in stored] for expert in range(count)]
        return parts

    def weights_read(self, rows: int) -> float:
        """How many weights a pass over so many tokens reads: those of the layers and of the head.

        Of experts the mean number, if every token chooses any of them with the same probability.
        """
        read: float = self.parameters - (0 if self.tied else self.vocab * self.hidden)
        if self.experts is not None:
            unread = (1 - self.experts.chosen / self.experts.count) ** rows
            read -= unread * sum(self.experts.layers) * self.experts.count * 3 * self.experts.inner * self.hidden
        return read

    @cached_property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def projections(self) -> dict[Block, tuple[tuple[str, ...], tuple[int, ...]]]:
        """The names of each block's projections in a layer, and the output widths of all but the last."""
        names, of = self.names, self.architecture
        return {
            "attention": (
                tuple(names.attention + name for name in of.attention_projections),
                (self.queries, self.keys, self.keys),
            ),
            "mlp": (tuple(names.mlp + name for name in of.mlp_projections), (self.inner,) * (1 + of.gated)),
        }

    @property
    def norm_names(self) -> tuple[str | None, ...]:
        """Of a layer: before and after attention, before and after the MLP, of queries, of keys; None where there is none."""
        names, normed = self.names, self.architecture.query_key_norms != "none"
        own = (names.attention + name if normed else None for name in (names.query_norm, names.key_norm))
        return *self.architecture.norms, *own

    def shapes_of_layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of a layer, after its prefix."""
        shapes: dict[str, tuple[int, ...]] = {}
        experts, names = self.experts_of(index), self.architecture.experts
        biased = {"attention": (self.query_bias, self.output_bias), "mlp": (self.mlp_bias, self.mlp_bias)}
        for block, ((*inward, back), outputs) in self.projections.items():
            if block == "mlp" and experts is not None:
                continue
            inner, outer = biased[block]
            widths = outputs if len(inward) == len(outputs) else (sum(outputs),)
            for name, width in zip(inward, widths, strict=True):
                shapes |= {f"{name}.weight": (width, self.hidden)} | ({f"{name}.bias": (width,)} if inner else {})
            shapes |= {f"{back}.weight": (self.hidden, outputs[0])} | ({f"{back}.bias": (self.hidden,)} if outer else {})
        if self.architecture.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        if experts is not None and names is not None:
            shapes |= {
                f"{names.router}.weight": (experts.count, self.hidden),
                f"{names.block}gate_up_proj": (experts.count, 2 * experts.inner, self.hidden),
                f"{names.block}down_proj": (experts.count, self.hidden, experts.inner),
            }
        per_head = self.architecture.query_key_norms == "head"
        sizes = (*(self.hidden,) * 4, *((self.head_dim,) * 2 if per_head else (self.queries, self.keys)))
        for norm, size in zip(self.norm_names, sizes, strict=True):
            shapes |= {} if norm is None else self.norm_shapes(norm, size)
        if self.activation == "xielu":
            shapes |= {f"{self.names.mlp}act_fn.alpha_{part}": (1,) for part in "pn"}
        return shapes

    def experts_of(self, layer: int) -> ExpertsSpec | None:
        """The experts in the place of a layer's MLP; None where it has one."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None

    def norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of a norm over `size` numbers."""
        parts = ("weight", "bias") if self.architecture.norm in ("layer", "layer_plus_one") else ("weight",)
        return {f"{name}.{part}": (size,) for part in parts}

    def scaled_logits(self, logits: "Tensor") -> "Tensor":
        """The output of the head after the division and the soft cap of an architecture, if it has them."""
        if self.logits_divisor != 1:
            logits = logits / self.logits_divisor
        return logits if self.logits_cap is None else (logits / self.logits_cap).tanh() * self.logits_cap

    def window_of(self, kind: str) -> int | None:
        """How many positions a layer of this kind sees; None for all."""
        return self.window if kind == SLIDING else None

    def check_weights(self, stored: Shapes) -> None:
        """Raises CheckpointError for a weight that is missing from the `stored` ones, or has another shape."""
        if missing := sorted(name for name in self.shapes if name not in stored):
            raise CheckpointError(f"{len(missing)} weights are missing, {missing[0]} the first")
        for name, shape in self.shapes.items():
            check_shape(name, shape, stored[name])


AnySpec = ModelSpec | TransformersSpec


def check_shape(name: str, needed: tuple[int, ...], stored: tuple[int, ...]) -> None:
    """Raises CheckpointError for a weight of another shape than is needed."""
    if tuple(stored) != needed:
        raise CheckpointError(f"size mismatch of {name}: needed {list(needed)}, found {list(stored)}")


def _read(
    kind: Any, value_of: Callable[[str], Any], where: str = "", names: Mapping[str, str | int | None] | None = None
) -> Any:
    """An object of `kind`. `names`: of values by field, where they have others; or a value that is not read, None among them.

    Raises CheckpointError for the first value of another type or out of range.
    """
    values = {}
    for attribute, hint in hints_of(kind).items():
        name = (names or {}).get(attribute, attribute)
        values[attribute] = _checked(value_of(name), hint, where + name) if isinstance(name, str) else name
    return kind(**values)


def _checked(value: Any, hint: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise CheckpointError(f"{name} must be {needed(hint)}, got {shown(value)}") from None


def _ropes(parameters: Any, kinds: tuple[str, ...]) -> tuple[RopeSpec, ...]:
    """One rotary embedding for all layers, or one for each kind of layer (as in Gemma 3)."""
    by_kind: dict[str | None, Any] = {None: parameters}
    if isinstance(parameters, Mapping) and any(kind in parameters for kind in LAYER_KINDS):
        by_kind = {kind: parameters.get(kind) or {} for kind in dict.fromkeys(kinds)}
    for kind, values in by_kind.items():
        where = "rope_parameters" if kind is None else f"rope_parameters.{kind}"
        _require(isinstance(values, Mapping), where, "an object", values)
        _read(_RopeValues, values.get, f"{where}.")
    return tuple(RopeSpec(values, kind) for kind, values in by_kind.items())


def _kinds_and_window(
    values: _Values, architecture: Architecture, rotates: tuple[bool, ...]
) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer, and how many positions the sliding ones see."""
    layers, window, listed = values.num_hidden_layers, values.sliding_window, values.layer_types
    if listed is not None:
        _require(len(listed) == layers, "layer_types", f"a list of num_hidden_layers, {layers}, entries", len(listed))
    unused = window is None or (architecture.windows == "optional" and not values.use_sliding_window)
    if architecture.windows == "none" or (architecture.windows != "listed" and unused):
        return (FULL,) * layers, None
    if architecture.windows == "all":
        slides = [True] * layers
    elif listed is not None:
        slides = [kind == SLIDING for kind in listed]
    elif architecture.rope == "listed":
        slides = [not rotating for rotating in rotates]
    else:
        slides = [layer >= (values.max_window_layers or 0) for layer in range(layers)]
    _require(window is not None or not any(slides), "sliding_window", "given for layers of sliding_attention", "null")
    return tuple(SLIDING if sliding else FULL for sliding in slides), window


def _rotates(values: _Values) -> tuple[bool, ...]:
    layers, listed = values.num_hidden_layers, values.no_rope_layers
    if listed is None:
        return tuple((layer + 1) % (values.no_rope_layer_interval or 4) != 0 for layer in range(layers))
    _require(len(listed) >= layers, "no_rope_layers", f"a list of at least num_hidden_layers, {layers}, entries", len(listed))
    return tuple(map(bool, listed[:layers]))


def _experts(values: _Values, architecture: Architecture) -> ExpertsSpec | None:
    if (experts := architecture.experts) is None:
        return None
    count = _given(" or ".join(EXPERT_COUNTS), values.num_local_experts or values.num_experts)
    chosen = _given("num_experts_per_tok", values.num_experts_per_tok)
    _require(chosen <= count, "num_experts_per_tok", f"at most the number of experts, {count}", chosen)
    layers, normalised = [True] * values.num_hidden_layers, experts.normalised
    if experts.on_some_layers:
        dense, step = values.mlp_only_layers or [], values.decoder_sparse_step or 1
        layers = [index not in dense and (index + 1) % step == 0 for index in range(len(layers))]
    if isinstance(normalised, str):
        normalised = bool(getattr(values, normalised))
    return ExpertsSpec(tuple(layers), count, chosen, _given(experts.inner, getattr(values, experts.inner)), normalised)


def _given(name: str, value: int | None) -> int:
    _require(value is not None, name, "a whole number", value)
    return value or 0


def _require(condition: bool, name: str, needed: str, found: object) -> None:
    if not condition:
        raise CheckpointError(f"{name} must be {needed}, got {shown(found)}")
