"""The operations of DepthModel on repacked weights: the fast path of decoding, for the Llama family."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .cache import DepthCache, LayerSlots, SpanWriter
from .depth import layer_kinds
from .linear import Linear, OneDnnLinear, linear

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on nothing but the position
_CHUNK = 256  # tokens of a prompt that run at once: bounds the attention mask and the activations


def can_pack(config: Any) -> bool:
    """Whether PackedModel knows every part of this architecture."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


def weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that PackedModel cannot do without, as in a checkpoint."""
    size, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * _head_dim(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (size,),
        "self_attn.q_proj": (queries, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, queries),
        "post_attention_layernorm": (size,),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, size),
        "model.norm.weight": (size,),
        **({} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, size)}),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


class PackedModel:
    """The same operations and results as `DepthModel`, for inference only.

    Query, key and value are one matrix, gate and up another. Rows of the first are ordered (slot, kv head, head dim), the slots
    being the G queries of a key's group, the key and the value. So the queries of T tokens are the G*T rows of one attention
    call, its output needs no transposition (the columns of the output matrix have the same order), and a token's key and
    value are one copy into the cache. The two halves of a rotated head interleave as complex numbers: rope is one product.
    """

    def __init__(self, config: Any, take: "Take") -> None:
        """The weights of an architecture that `can_pack`, by their names in its checkpoints; each is taken once.

        Raises CheckpointError for one that is missing.
        """
        self.config = config
        weights = _Weights(take)
        self._kinds = layer_kinds(config)
        with torch.inference_mode():
            self._embedding = weights.of("model.embed_tokens.weight")
            self._rope = _Rope(config, self._embedding)
            self._norm = _Norm(weights.of("model.norm.weight"), config)
            head = None if config.tie_word_embeddings else weights.get("lm_head.weight")
            self._head = linear(self._norm.folded_into(self._embedding if head is None else head), weights.get("lm_head.bias"))
            self._layers = [_Layer(weights.below(f"model.layers.{index}."), config, index) for index in range(len(self._kinds))]
        attention = self._layers[0]
        self._groups, self._kv_heads, self._head_dim = attention.groups, attention.kv_heads, attention.head_dim

    @classmethod
    def of(cls, model: nn.Module) -> "PackedModel":
        """Takes the weights of a transformers model; its own are released, so that it can no longer run."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model.to("meta")
        return cls(model.config, lambda name: weights.pop(name, None))

    @property
    def implementation(self) -> str:
        prepacked = any(isinstance(part, OneDnnLinear) for part in (self._head, *self._layers[0].linears))
        return "packed (oneDNN)" if prepacked else "packed"

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        return self._embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        return self._embedding.shape[0]

    @property
    def max_positions(self) -> int:
        """The context limit, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> DepthCache:
        """An empty cache for this model's layers, up to the context limit unless told otherwise."""
        return DepthCache(self.num_layers, batch_size, min(max_positions or self.max_positions, self.max_positions))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D)."""
        return F.embedding(ids, self._embedding)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: DepthCache | None = None) -> Tensor:
        """Layers start..stop-1 over hidden states (B, T, D) of the tokens at `positions` (B, T), on the host.

        Without a cache the tokens see each other only. Returns the pre-norm hidden states (B, T, D).
        """
        batch, count, size = hidden.shape
        if start == stop:
            return hidden
        if cache is None:
            cache = self.new_cache(batch)
        if count > _CHUNK:
            parts = zip(torch.split(hidden, _CHUNK, 1), torch.split(positions, _CHUNK, 1), strict=True)
            return torch.cat([self.run_layers(part, start, stop, places, cache) for part, places in parts], dim=1)
        writer = cache.writer(positions)
        step = self._step(writer, positions, batch, count)
        slots = writer.layers(start, stop, self._kv_heads, self._head_dim, hidden)
        rows = hidden.reshape(batch * count, size)
        for layer, kind, held in zip(self._layers[start:stop], self._kinds[start:stop], slots, strict=True):
            rows = layer(rows, step, step.masks[kind], held)
        return rows.view(batch, count, size)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""
        *shape, size = hidden.shape
        return self._head(self._norm(hidden.reshape(-1, size))).view(*shape, -1)

    def _step(self, writer: SpanWriter, positions: Tensor, batch: int, count: int) -> "_Step":
        places = positions.to(self.device, non_blocking=True)
        rope = self._rope.at(writer, places, self._groups)
        masks = {kind: self._mask(kind, writer, places) for kind in dict.fromkeys(self._kinds)}
        return _Step(batch, count, rope, masks)

    def _mask(self, kind: str, writer: SpanWriter, places: Tensor) -> Tensor | None:
        """What is added to the scores, (B or 1, 1, T*G, S); None where every key of the filled part may be seen."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        if places.numel() == 1 and (window is None or writer.stop <= window):
            return None
        queries = (places[:1] if writer.contiguous else places)[:, None, :, None]
        keys = torch.arange(writer.stop, device=places.device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=places.device).masked_fill_(hidden, -math.inf)
        return mask.repeat_interleave(self._groups, dim=2)


@dataclass(frozen=True)
class _Step:
    """What all layers of a call share."""

    batch: int
    count: int  # T
    rope: Tensor  # (rows, G+2, 1, half a head) complex, rows = B*T, or T where all batch rows have the same positions
    masks: dict[str, Tensor | None]  # by kind of layer


class _Layer:
    """A decoder layer over rows (B*T, D)."""

    def __init__(self, weights: "_Weights", config: Any, index: int) -> None:
        self.head_dim = _head_dim(config)
        self.kv_heads = int(config.num_key_value_heads)
        self.groups = int(config.num_attention_heads) // self.kv_heads
        self._width = self.groups * self.kv_heads * self.head_dim
        self._scale = self.head_dim**-0.5
        self._rotates = bool(config.no_rope_layers[index]) if config.model_type == "smollm3" else True
        attention, mlp = weights.below("self_attn."), weights.below("mlp.")
        self._attention_norm = _Norm(weights.of("input_layernorm.weight"), config)
        self._mlp_norm = _Norm(weights.of("post_attention_layernorm.weight"), config)
        norm = attention.get("q_norm.weight")
        self._head_norm = None if norm is None else _HeadNorm(norm, attention.of("k_norm.weight"), config, self.groups)
        qkv, qkv_bias = attention.together(("q_proj", "k_proj", "v_proj"))
        up, up_bias = mlp.together(("gate_proj", "up_proj"))
        columns = attention.of("o_proj.weight").view(-1, self.kv_heads, self.groups, self.head_dim).transpose(1, 2)
        self._qkv = linear(
            self._attention_norm.folded_into(self._slots(*qkv)), None if qkv_bias is None else self._slots(*qkv_bias)
        )
        self._output = linear(columns.reshape(-1, self._width), attention.get("o_proj.bias"))
        self._up = linear(self._mlp_norm.folded_into(torch.cat(up)), None if up_bias is None else torch.cat(up_bias))
        self._down = linear(mlp.of("down_proj.weight"), mlp.get("down_proj.bias"))

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self._qkv, self._output, self._up, self._down

    def __call__(self, hidden: Tensor, step: _Step, mask: Tensor | None, held: LayerSlots) -> Tensor:
        batch, count, groups, heads, size = step.batch, step.count, self.groups, self.kv_heads, self.head_dim
        qkv = self._qkv(self._attention_norm(hidden))
        slots = self._rotated(qkv.view(-1, groups + 2, heads, size), step.rope).view(batch, count, groups + 2, heads, size)
        held.write(slots[:, :, groups:])
        queries = slots[:, :, :groups].reshape(batch, count * groups, heads, size).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            queries.to(hidden.dtype), held.keys, held.values, attn_mask=mask, scale=self._scale
        )
        hidden = self._output.add_to(hidden, mixed.transpose(1, 2).reshape(batch * count, self._width))
        gate, up = self._up(self._mlp_norm(hidden)).chunk(2, dim=1)
        return self._down.add_to(hidden, F.silu(gate).mul_(up))

    def _rotated(self, slots: Tensor, rope: Tensor) -> Tensor:
        """Head norms and rope over (B*T, G+2, kv heads, head dim), in at least fp32."""
        if self._head_norm is None and not self._rotates:
            return slots
        wide = slots.float() if slots.dtype.itemsize < 4 else slots
        if self._head_norm is not None:
            self._head_norm.apply_(wide[:, : self.groups + 1])
        if self._rotates:
            pairs = torch.view_as_complex(wide.view(-1, len(rope), *wide.shape[1:-1], self.head_dim // 2, 2))
            pairs.mul_(rope)
        return wide

    def _slots(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Weights (out, D) or biases (out,) of the three projections as those of one, by slot; see PackedModel."""
        heads, rest = (self.kv_heads, self.groups), query.shape[1:]
        queries = _interleaved(query.view(*heads, self.head_dim, *rest), dim=2).transpose(0, 1)
        keys = _interleaved(key.view(1, self.kv_heads, self.head_dim, *rest), dim=2)
        return torch.cat([queries, keys, value.view_as(keys)]).reshape(-1, *rest)


Take = Callable[[str], Tensor | None]  # the weight of a name, or None where there is none


@dataclass(frozen=True)
class _Weights:
    """Weights by name, below a prefix."""

    take: Take
    prefix: str = ""

    def below(self, prefix: str) -> "_Weights":
        return _Weights(self.take, self.prefix + prefix)

    def get(self, name: str) -> Tensor | None:
        return self.take(self.prefix + name)

    def of(self, name: str) -> Tensor:
        weight = self.get(name)
        if weight is None:
            raise CheckpointError(f"the weight {self.prefix}{name} is missing")
        return weight

    def together(self, parts: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Weights of several projections, and their biases, which all or none of them have."""
        biases = [bias for part in parts if (bias := self.get(f"{part}.bias")) is not None]
        return [self.of(f"{part}.weight") for part in parts], biases or None


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class _Rope:
    """Rotations by position as complex numbers; the table grows with the text."""

    def __init__(self, config: Any, like: Tensor) -> None:
        self._frequencies, self._scaling = _rope_frequencies(config)
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._table = self._angles(0)  # (positions, 2, 1, half a head): the rotation, and 1 for what does not rotate

    def at(self, writer: SpanWriter, places: Tensor, groups: int) -> Tensor:
        """(T, G+2, 1, half a head), or (B*T, ...) for rows that stand at different positions."""
        if len(self._table) < writer.stop:
            self._table = self._angles(2 * writer.stop)
        rotations = self._table[writer.start : writer.stop] if writer.contiguous else self._table[places.flatten()]
        one, kept = rotations[:, :1], rotations[:, 1:]
        return torch.cat([one.expand(-1, groups + 1, -1, -1), kept], dim=1)

    def _angles(self, count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
        cos, sin = ((part * self._scaling).to(self._like) for part in (angles.cos(), angles.sin()))
        rotation = torch.complex(cos, sin)
        return torch.stack([rotation, torch.ones_like(rotation)], dim=1)[:, :, None]


def _rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """Radians a position of each pair of a head, (half a head,) in fp32, and what cosine and sine are multiplied by."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":  # transformers has this one in each model's own module, which takes seconds to import
        size = _head_dim(config)
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))  # type: ignore[no-any-return]


class _Norm:
    """RMSNorm over the last dimension.

    On the CPU torch.rms_norm takes some eight passes: here they are three, and in fp32 and fp64 the weight becomes part of the
    linear layer behind the norm. (Not in bf16: the weights of that layer would be rounded once more.)
    """

    def __init__(self, weight: Tensor, config: Any) -> None:
        self._weight = weight
        self._eps = float(config.rms_norm_eps)
        size = self._weight.numel()
        self._on_cpu = self._weight.device.type == "cpu"
        self._folds = self._on_cpu and self._weight.dtype.itemsize >= 4
        self._wide = torch.promote_types(self._weight.dtype, torch.float32)
        self._scale = self._weight.to(self._wide) * math.sqrt(size)
        self._floor = self._scale.new_tensor(math.sqrt(size * self._eps))

    def folded_into(self, weight: Tensor) -> Tensor:
        """`weight` (out, D) of the linear layer behind this norm, to be used instead of the original."""
        return weight * self._scale if self._folds else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        if not self._on_cpu:
            return torch.rms_norm(hidden, self._weight.shape, self._weight, self._eps)
        # sqrt(mean(x^2) + eps) is hypot(|x|, sqrt(D eps)) / sqrt(D)
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=self._wide).hypot_(self._floor)
        normed: Tensor = hidden / length
        return normed if self._folds else normed.mul_(self._scale).to(hidden.dtype)


class _HeadNorm:
    """RMSNorm of each query and key (qwen3), in place over (rows, G+1, kv heads, head dim)."""

    def __init__(self, query: Tensor, key: Tensor, config: Any, groups: int) -> None:
        weights = torch.stack([_interleaved(norm, dim=0) for norm in [query] * groups + [key]])[:, None]
        size = weights.shape[-1]
        self._scale = weights.to(torch.promote_types(weights.dtype, torch.float32)) * math.sqrt(size)
        self._floor = self._scale.new_tensor(math.sqrt(size * config.rms_norm_eps))

    def apply_(self, slots: Tensor) -> None:
        length = torch.linalg.vector_norm(slots, dim=-1, keepdim=True).hypot_(self._floor)
        slots.div_(length).mul_(self._scale)


def _interleaved(tensor: Tensor, dim: int) -> Tensor:
    """The two halves of a head, which rope pairs, alternating along `dim`."""
    halves = torch.stack(tensor.chunk(2, dim), dim + 1)
    return halves.flatten(dim, dim + 1)
