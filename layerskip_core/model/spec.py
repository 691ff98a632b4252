"""ModelSpec: a model's sizes, norms, biases, windows and names of weights, from its configuration.
Backends build on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import CheckpointError
from .architectures import SUPPORTED, known_architecture
from .configuration import (
    LAYER_KINDS,
    MLP,
    SLIDING,
    ExpertsSpec,
    LayerSizes,
    RecurrenceSpec,
    RopeSpec,
    is_on,
    read_values,
    ropes_of,
    rotary_size,
)
from .variants import Architecture, Names, TokenInputs

if TYPE_CHECKING:
    from torch import Tensor

Sublayer = Literal["attention", "mlp", "mixer"]  # mixer: in place of attention
Shapes = Mapping[str, tuple[int, ...]]
_CONTEXTS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "n_ctx",
    "context_length",
    "seq_length",
)
_USUAL_CONTEXT = 2048  # of a model without a limit of its own, such as BLOOM


class Projections(NamedTuple):
    """The linear maps of a sublayer: inward ones, which read the hidden states, and the last, which
    gives the sublayer's output.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]  # outputs of each inward map, even if several are stored as one
    inputs: int  # of the last
    biases: tuple[bool, bool]  # of the inward maps, and of the last


@dataclass(frozen=True)
class TransformersSpec:
    """The sizes of a model that only transformers runs."""

    model_type: str
    layers: int
    hidden: int
    vocab: int
    context: int  # positions
    tied: bool  # whether the head is the embedding
    parameters: int
    shapes: Shapes = field(repr=False)  # of all weights, by their names; a tied head has none
    # Of an exit block's weights; empty if it can have none
    block_shapes: Shapes = field(repr=False)
    config: Any = field(repr=False, compare=False)  # the configuration itself

    def weights_read(self, rows: int) -> float:
        """The number of weights that a pass over `rows` tokens reads: of the layers and of the
        head.
        """
        return self.parameters - _unread_embedding(self)

    @classmethod
    def of(cls, model: Any, layers: int, block_parts: Mapping[str, Any]) -> "TransformersSpec":
        """The spec of a transformers model. `block_parts`: the modules that its exit blocks copy,
        by name.
        """
        config = model.config.get_text_config(decoder=True)
        head = model.get_output_embeddings()
        contexts = [getattr(config, name, None) for name in _CONTEXTS]
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        block_shapes: dict[str, tuple[int, ...]] = {}
        for part, module in block_parts.items():
            for name, weight in module.state_dict(prefix=f"{part}.").items():
                block_shapes[name] = tuple(weight.shape)
        return cls(
            model_type=model.config.model_type,
            layers=layers,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            context=next(filter(None, contexts), _USUAL_CONTEXT),
            tied=head is not None and head.weight is model.get_input_embeddings().weight,
            parameters=sum(map(prod, shapes.values())),
            shapes=shapes,
            block_shapes=block_shapes,
            config=model.config,
        )


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and variants of a model that our kernels run, all checked."""

    model_type: str
    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    sizes: tuple[LayerSizes, ...]  # by layer, if layers differ: see `of_layer`
    token_width: int  # of each layer's token input; 0 for none
    token_vocab: int
    experts: ExpertsSpec | None
    recurrence: RecurrenceSpec | None  # None also where no layer has the architecture's mixer
    vocab: int
    context: int  # positions
    eps: float  # of every norm
    activation: str  # transformers' name
    kinds: tuple[str, ...]  # by layer: of LAYER_KINDS, that of the architecture's mixer, or MLP
    window: int | None  # positions that a sliding layer sees
    ropes: tuple[RopeSpec, ...]  # the different rotary embeddings
    rope_of: tuple[int | None, ...]  # by layer: the index of its rotary embedding; None for none
    rotary: int  # the first dimensions of a head, which rotate
    parallel: bool  # attention and MLP read the same hidden states
    query_bias: bool  # of queries, keys and values
    output_bias: bool  # of attention's output
    mlp_bias: bool
    tied: bool  # whether the head is the embedding
    attention_scale: float
    embedding_scale: float
    residual_scale: float  # of a sublayer's output
    logits_divisor: float
    score_cap: float | None  # c of c * tanh(score / c)
    logits_cap: float | None
    clip: float | None  # largest magnitude of queries, keys and values
    # Of swiglu_clamped: alpha of gate * sigmoid(alpha * gate), and the bound
    swiglu: tuple[float, float] | None
    config: Any = field(repr=False, compare=False)  # the configuration itself
    source: int | None = None  # see LayerSizes; set by `of_layer` only

    @classmethod
    def of(cls, config: Any) -> "ModelSpec":
        """Reads a configuration object. Raises CheckpointError, naming the first value that is out
        of range.
        """
        architecture = known_architecture(config)
        if architecture is None:
            raise CheckpointError(
                f"model_type must be one of {', '.join(SUPPORTED)}, got {config.model_type!r:.60}"
            )
        # The object hides values by layer
        if "per_layer_config" in architecture.uses and hasattr(config, "to_dict"):
            config = SimpleNamespace(**config.to_dict())
        values = read_values(config, architecture)
        kv_heads, head_dim = values.head_sizes
        kinds, window, rotating = values.layers(architecture)
        ropes = ropes_of(config, architecture, kinds)
        query_bias, output_bias, mlp_bias = (
            is_on(switch, config) for switch in architecture.biases
        )
        embedding_scale = values.embedding_multiplier or 1.0
        if architecture.scales_embeddings:
            embedding_scale = sqrt(values.hidden_size)
        scale = values.attention_multiplier or (values.query_pre_attn_scalar or head_dim) ** -0.5
        token_width = 0
        if architecture.token_inputs is not None:
            token_width = values.hidden_size_per_layer_input or 0
        indices = {rope.kind: index for index, rope in enumerate(ropes)}
        rope_of: list[int | None] = []
        for kind, rotates in zip(kinds, rotating, strict=True):
            rope_of.append(indices.get(kind, 0) if rotates else None)
        contexts: list[int | None] = [values.max_position_embeddings]
        for rope in ropes:
            # A longrope changes all frequencies after its original context; keys in the cache have
            # the old ones.
            if rope.type == "longrope":
                contexts.append(rope.parameters.get("original_max_position_embeddings"))
        return cls(
            model_type=config.model_type,
            architecture=architecture,
            layers=values.num_hidden_layers,
            hidden=values.hidden_size,
            heads=values.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=values.inner,
            sizes=values.layer_sizes(architecture, kinds),
            token_width=token_width,
            token_vocab=values.vocab_size_per_layer_input or values.vocab_size,
            experts=values.experts(architecture),
            recurrence=values.recurrence(config, architecture, kinds),
            vocab=values.vocab_size,
            context=min(filter(None, contexts)),
            eps=values.norm_eps,
            activation=values.activation or architecture.default_activation,
            kinds=kinds,
            window=window,
            ropes=ropes,
            rope_of=tuple(rope_of),
            rotary=rotary_size(head_dim, ropes, architecture),
            parallel=is_on(architecture.parallel, config),
            query_bias=query_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
            tied=values.tie_word_embeddings,
            attention_scale=scale,
            embedding_scale=embedding_scale,
            residual_scale=values.residual_multiplier or 1.0,
            logits_divisor=values.logits_scaling or 1 / (values.logit_scale or 1.0),
            score_cap=values.attn_logit_softcapping,
            logits_cap=values.final_logit_softcapping,
            clip=values.clip_qkv,
            swiglu=values.swiglu(architecture),
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
        """The name of the head's weight; if tied, the embedding's."""
        return self.embedding_name if self.tied else "lm_head.weight"

    def layer_prefix(self, layer: int) -> str:
        """The beginning of the names of a layer's weights."""
        return f"{self.names.layers}.{layer}."

    def of_layer(self, layer: int) -> "ModelSpec":
        """The spec with the sizes of one layer."""
        if not self.sizes:
            return self
        head_dim, inner, source = self.sizes[layer]
        return replace(self, head_dim=head_dim, rotary=head_dim, inner=inner, source=source)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights, as in a checkpoint; a tied head is the embedding and has
        none.
        """
        shapes: dict[str, tuple[int, ...]] = {self.embedding_name: (self.vocab, self.hidden)}
        if self.names.positions is not None:
            shapes[f"{self.names.positions}.weight"] = (self.context, self.hidden)
        shapes |= self.norm_shapes(self.names.norm, self.hidden)
        shapes[self.head_name] = (self.vocab, self.hidden)  # if tied, the embedding again
        if self.architecture.head_bias:
            shapes["lm_head.bias"] = (self.vocab,)
        inputs = self.token_inputs
        if inputs is not None:
            shapes[inputs.table] = (self.token_vocab, self.layers * self.token_width)
            shapes[inputs.projection] = (self.layers * self.token_width, self.hidden)
            shapes |= self.norm_shapes(inputs.norm, self.token_width)
        for index in range(self.layers):
            for name, shape in self.shapes_of_layer(index).items():
                shapes[self.layer_prefix(index) + name] = shape
        return shapes

    @property
    def token_inputs(self) -> TokenInputs | None:
        return self.architecture.token_inputs if self.token_width else None

    @property
    def mapped(self) -> tuple[str, ...]:
        """The names of weights that stay memory-mapped: a token reads one row."""
        return () if self.token_inputs is None else (self.token_inputs.table,)

    @property
    def unread(self) -> int:
        """The number of weights in `mapped`."""
        return self.token_vocab * self.layers * self.token_width

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """The layers with keys and values of their own."""
        attending = [index for index, kind in enumerate(self.kinds) if kind in LAYER_KINDS]
        if self.sizes:
            attending = [index for index in attending if self.sizes[index].source is None]
        return tuple(attending)

    @property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an exit block's weights: a layer like the last attending one, and a
        norm.
        """
        if not self.attending:
            return {}
        shapes = {}
        for name, shape in self.shapes_of_layer(self.attending[-1]).items():
            if name != self.architecture.layer_scale:  # the block shares it
                shapes[f"layer.{name}"] = shape
        return shapes | self.norm_shapes("norm", self.hidden)

    @property
    def stored_parts(self) -> dict[str, list[list[str]]]:
        """For each weight that checkpoints store under other names or in parts: lists of part
        names, one list per expert.
        """
        parts: dict[str, list[list[str]]] = {}
        if self.names.stored_head is not None and not self.tied:
            parts[self.head_name] = [[f"{self.names.stored_head}.weight"]]
        if self.names.stored_prefix is not None:
            for name in self.shapes:
                if name.startswith("model."):
                    parts[name] = [[name.replace("model.", self.names.stored_prefix, 1)]]
        if self.experts is None:
            return parts
        for index, has_experts in enumerate(self.experts.layers):
            if not has_experts:
                continue
            prefix = self.layer_prefix(index)
            for name, stored in self.experts.names.stored.items():
                count = self.experts.count if "{}" in stored[0] else 1
                parts[prefix + name] = []
                for expert in range(count):
                    parts[prefix + name].append([prefix + part.format(expert) for part in stored])
        return parts

    def weights_read(self, rows: int) -> float:
        """The number of weights that a pass over `rows` tokens reads: of the layers and of the
        head.

        For experts, the expected number if the router chooses all equally often.
        """
        read: float = self.parameters - self.unread - _unread_embedding(self)
        experts = self.experts
        if experts is not None:
            unread = (1 - experts.chosen / experts.count) ** rows
            count = sum(experts.layers) * experts.count
            read -= unread * count * 3 * experts.inner * self.hidden
        return read

    @cached_property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def projections(self, sublayer: Sublayer) -> Projections:
        of = self.architecture
        if sublayer == "mlp":
            names = tuple(self.names.mlp + name for name in of.mlp_projections)
            widths: tuple[int, ...] = (self.inner, self.inner) if of.gated else (self.inner,)
            return Projections(names, widths, self.inner, (self.mlp_bias, self.mlp_bias))
        if sublayer == "mixer":
            sizes = self.recurrence
            assert sizes is not None
            biases = (sizes.biased, sizes.biased)
            return Projections(sizes.mixer.projections, sizes.widths, sizes.outputs, biases)
        names = tuple(self.names.attention + name for name in of.attention_projections)
        queries = self.query_width
        if of.gates_attention:
            queries *= 2
        biases = (self.query_bias, self.output_bias)
        if self.source is not None:  # another layer has its keys and values
            return Projections((names[0], names[-1]), (queries,), self.query_width, biases)
        widths = (queries, self.key_width, self.key_width)
        return Projections(names, widths, self.query_width, biases)

    def sublayers_of(self, layer: int) -> tuple[Sublayer, ...]:
        """The sublayers of a layer in order. Experts count as an MLP."""
        if self.kinds[layer] == MLP:
            return ("mlp",)
        first: Sublayer = "attention" if self.kinds[layer] in LAYER_KINDS else "mixer"
        if self.architecture.one_sublayer:
            return (first,)
        return first, "mlp"

    def norm_names(self, layer: int) -> tuple[str | None, ...]:
        """Names of a layer's norms before and after attention, before and after the MLP, of
        queries, of keys; None for none.
        """
        norms = self.architecture.norms
        attends = "attention" in self.sublayers_of(layer)
        if self.architecture.query_key_norms == "none" or not attends:
            return (*norms, None, None)
        query = self.names.attention + self.names.query_norm
        if self.of_layer(layer).source is not None:
            return (*norms, query, None)
        return (*norms, query, self.names.attention + self.names.key_norm)

    def shapes_of_layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names, after the layer's prefix, and shapes of its weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        experts = self.experts_of(index)
        of_layer = self.of_layer(index)
        sublayers = self.sublayers_of(index)
        for sublayer in sublayers:
            if sublayer != "mlp" or experts is None:
                shapes |= of_layer.sublayer_projections(sublayer)
        if self.architecture.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        if experts is not None:
            shapes |= self._expert_shapes(experts)
        if "mixer" in sublayers:
            assert self.recurrence is not None
            shapes |= self.recurrence.shapes(self.hidden)
        query = self.query_width
        key = self.key_width
        if self.architecture.query_key_norms == "head":
            query = key = of_layer.head_dim
        sizes = (*[self.hidden] * 4, query, key)
        for norm, size in zip(self.norm_names(index), sizes, strict=True):
            if norm is not None:
                shapes |= self.norm_shapes(norm, size)
        if self.architecture.sinks:
            shapes[f"{self.names.attention}sinks"] = (self.heads,)
        inputs = self.token_inputs
        if inputs is not None:
            shapes[f"{inputs.gate}.weight"] = (self.token_width, self.hidden)
            shapes[f"{inputs.output}.weight"] = (self.hidden, self.token_width)
            shapes |= self.norm_shapes(inputs.after, self.hidden)
        if self.architecture.layer_scale:
            shapes[self.architecture.layer_scale] = (1,)
        if self.activation == "xielu":
            for part in "pn":
                shapes[f"{self.names.mlp}act_fn.alpha_{part}"] = (1,)
        return shapes

    def sublayer_projections(self, sublayer: Sublayer) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of a sublayer's linear maps."""
        (*inward, back), outputs, inputs, (inner_bias, outer_bias) = self.projections(sublayer)
        is_fused = len(inward) < len(outputs)
        widths = (sum(outputs),) if is_fused else outputs
        shapes: dict[str, tuple[int, ...]] = {}
        for name, width in zip(inward, widths, strict=True):
            shapes[f"{name}.weight"] = (width, self.hidden)
            if inner_bias:
                shapes[f"{name}.bias"] = (width,)
        shapes[f"{back}.weight"] = (self.hidden, inputs)
        if outer_bias:
            shapes[f"{back}.bias"] = (self.hidden,)
        return shapes

    def _expert_shapes(self, experts: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        names = experts.names
        shapes: dict[str, tuple[int, ...]] = {
            f"{names.router}.weight": (experts.count, self.hidden)
        }
        maps = {"gate_up_proj": (2 * experts.inner, self.hidden)}
        maps["down_proj"] = (self.hidden, experts.inner)
        for name, (outputs, inputs) in maps.items():
            shape = (inputs, outputs) if names.by_inputs else (outputs, inputs)
            shapes[names.prefix + name] = (experts.count, *shape)
            if self.mlp_bias:
                shapes[f"{names.prefix}{name}_bias"] = (experts.count, outputs)
        if self.mlp_bias:
            shapes[f"{names.router}.bias"] = (experts.count,)
        if names.shared:
            *inward, back = names.shared
            for name in inward:
                width = 2 * experts.shared_inner // len(inward)
                shapes[f"{name}.weight"] = (width, self.hidden)
            shapes[f"{back}.weight"] = (self.hidden, experts.shared_inner)
        if names.shared_gate is not None:
            shapes[f"{names.shared_gate}.weight"] = (1, self.hidden)
        return shapes

    def experts_of(self, layer: int) -> ExpertsSpec | None:
        """The experts in place of a layer's MLP; None if it has an MLP."""
        if self.experts is None or not self.experts.layers[layer]:
            return None
        return self.experts

    def norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of a norm over `size` numbers."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
        if self.architecture.norm in ("layer", "layer_plus_one"):
            shapes[f"{name}.bias"] = (size,)
        return shapes

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are the products of the head's weight, and nothing else."""
        is_scaled = self.logits_divisor != 1 or self.logits_cap is not None
        return not (is_scaled or self.architecture.head_bias)

    def scaled_logits(self, logits: "Tensor") -> "Tensor":
        """Logits after the architecture's division and soft cap."""
        if self.logits_divisor != 1:
            logits = logits / self.logits_divisor
        if self.logits_cap is None:
            return logits
        return (logits / self.logits_cap).tanh() * self.logits_cap

    def window_of(self, kind: str) -> int | None:
        """The window of a layer of this kind, in positions; None: full attention."""
        return self.window if kind == SLIDING else None

    def check_weights(self, stored: Shapes) -> None:
        """Raises CheckpointError for a weight that is missing in `stored` or has another shape."""
        missing = sorted(name for name in self.shapes if name not in stored)
        if missing:
            raise CheckpointError(f"{len(missing)} weights are missing, {missing[0]} the first")
        for name, shape in self.shapes.items():
            check_shape(name, shape, stored[name])


AnySpec = ModelSpec | TransformersSpec


def _unread_embedding(spec: AnySpec) -> int:
    """The number of weights in an embedding that is not the head: a token reads one row."""
    return 0 if spec.tied else spec.vocab * spec.hidden


def check_shape(name: str, needed: tuple[int, ...], stored: tuple[int, ...]) -> None:
    """Raises CheckpointError for a weight of another shape."""
    if tuple(stored) != needed:
        raise CheckpointError(
            f"size mismatch of {name}: needed {list(needed)}, found {list(stored)}"
        )
