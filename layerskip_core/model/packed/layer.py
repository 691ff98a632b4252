"""A decoder layer on repacked weights, in few torch operations: in a small model their number is most of the time."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.packing import Quantization
from ..cache import LayerSlots
from ..layer_weights import (
    NormWeights,
    Projection,
    attention_inputs,
    attention_output,
    layer_norms,
    mlp_inputs,
    mlp_output,
    stacked,
)
from ..spec import ModelSpec
from ..weights import Weights
from .linear import Linear, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


# Types of rope whose angles depend on the position only. Those of a dynamic rope or a longrope change where a text outgrows
# the context that a ModelSpec allows.
_STATIC_ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def missing_feature(spec: ModelSpec) -> str | None:
    """What the layers here lack for an architecture; None where they have it all."""
    if spec.activation not in ACTIVATIONS:
        return f"the activation {spec.activation}"
    for rope in spec.ropes:
        if rope.type not in _STATIC_ROPES:
            return f"rotary positions of type {rope.type}"
        if int(spec.head_dim * rope.share) != spec.rotary:
            return f"a partial_rotary_factor of {rope.share}"
    return None


class Step(NamedTuple):
    """What all layers of a call share. The dicts are by kind of layer."""

    ropes: list[Tensor]  # by index of the rotary embedding: (B, T, 1, G+2, half a head) complex, or without B
    still: Tensor  # the same for layers without rotary positions
    masks: dict[str, Tensor | None]  # added to the scores, (B or 1, 1, T, 1, S) or (S,)
    spans: dict[str, list[tuple[int, int]]] | None  # keys start..stop-1 that each token sees, to attend token by token
    stop: int | None  # filled places of the cache; None to attend to all of them, as the masks say


class Workspace:
    """Buffers of the layers for calls over B*T tokens, and their views, which are made once."""

    def __init__(self, batch: int, count: int, layer: "PackedLayer", like: Tensor) -> None:
        groups, heads, size = layer.groups, layer.kv_heads, layer.head_dim
        wide = torch.promote_types(like.dtype, torch.float32)
        self.rows, self.single = batch * count, count == 1
        self.qkv = like.new_empty(batch * count, heads * (groups + 2) * size, dtype=wide)
        slots = self.qkv.view(batch, count, heads, groups + 2, size)
        self.pairs = torch.view_as_complex(slots.view(batch, count, heads, groups + 2, size // 2, 2))
        self.rotating = slots[:, :, :, : groups + 1]  # queries and keys
        self.keys_values = slots[:, :, :, groups:].permute(3, 0, 2, 1, 4)  # (2, B, kv heads, T, head dim)
        self.rotated = slots[:, :, :, :groups].transpose(1, 2)  # queries, (B, kv heads, T, G, head dim)
        self.queries = like.new_empty(self.rotated.shape)  # where they are copied, T*G rows per head
        self.query_rows = self.queries.view(batch * heads, count * groups, size)
        self.scored = (batch, heads, count, groups, -1)  # the shape of their scores
        self.inside = like.new_empty(batch * count, layer.inside)
        self.gate = self.inside[:, : layer.inside // 2] if layer.gated else None
        self.up = self.inside[:, layer.inside // 2 :] if layer.gated else self.inside


class PackedLayer:
    """A decoder layer over rows (B*T, D).

    Query, key and value are one matrix, gate and up another. Rows of the first are ordered (kv head, slot, head dim); the slots
    are the G queries of a key's group, the key and the value. So the queries of T tokens are T*G rows of one attention call,
    its output for one token needs no transposition, and the token's key and value are one copy into the cache. The two halves
    of the rotating part of a head interleave as complex numbers, so that rope and the scale of attention are one product.
    """

    def __init__(self, weights: Weights, spec: ModelSpec, index: int, quantization: Quantization | None, exact: bool) -> None:
        self.head_dim, self.kv_heads = spec.head_dim, spec.kv_heads
        self.groups = spec.heads // spec.kv_heads
        self.gated = spec.architecture.gated
        self.inside = spec.inner * (1 + self.gated)
        self._rope, self._rotary = spec.rope_of[index], spec.rotary
        self._score_cap, self._residual_scale = spec.score_cap, spec.residual_scale
        self._activation = ACTIVATIONS[spec.activation]
        norms, qkv = layer_norms(weights, spec), attention_inputs(weights, spec)
        folds = quantization is None and qkv[0].weight.dtype.itemsize >= 4
        self._before_attention = _norm(norms.before_attention, spec.eps, folds)
        self._after_attention = _norm(norms.after_attention, spec.eps, False)
        self._before_mlp = _norm(norms.before_mlp, spec.eps, folds)
        self._after_mlp = _norm(norms.after_mlp, spec.eps, False)
        self._query_key_norm = self._norm_of_slots(norms.query, norms.key, spec)
        packed = partial(_packed, quantization=quantization, exact=exact)
        biases = [part.bias for part in qkv if part.bias is not None]
        slots = Projection(self._slots(*(part.weight for part in qkv)), self._slots(*biases) if biases else None)
        self._qkv = packed(slots, self._before_attention)
        self._output = packed(attention_output(weights, spec), None)
        self._up = packed(stacked([*mlp_inputs(weights, spec)]), self._before_mlp)
        self._down = packed(mlp_output(weights, spec), None)
        self.linears = (self._qkv, self._output, self._up, self._down)

    def run_(self, hidden: Tensor, step: Step, kind: str, held: LayerSlots, space: Workspace) -> None:
        """The layer over `hidden` (B*T, D), in place."""
        self.write(hidden, step, held, space)
        space.queries.copy_(space.rotated)
        self._add(self._output, self._attended(step, kind, held, space), self._after_attention, hidden)
        self._up.write(hidden if self._before_mlp is None else self._before_mlp(hidden), space.inside)
        inside = self._activation(space.up) if space.gate is None else self._activation(space.gate).mul_(space.up)
        self._add(self._down, inside, self._after_mlp, hidden)

    def write(self, hidden: Tensor, step: Step, held: LayerSlots, space: Workspace) -> None:
        """Keys and values of `hidden` (B*T, D) to the cache, and queries to the workspace."""
        self._qkv.write(hidden if self._before_attention is None else self._before_attention(hidden), space.qkv)
        if self._query_key_norm is not None:
            self._query_key_norm.apply_(space.rotating)
        space.pairs.mul_(step.still if self._rope is None else step.ropes[self._rope])
        held.write(space.keys_values)

    def _add(self, layer: Linear, rows: Tensor, after: "Norm | None", hidden: Tensor) -> None:
        """Adds a block's output to `hidden`, in place."""
        if after is None and self._residual_scale == 1:
            layer.add(rows, hidden)
        else:
            output = layer(rows)
            hidden.add_(output if after is None else after(output), alpha=self._residual_scale)

    def _attended(self, step: Step, kind: str, held: LayerSlots, space: Workspace) -> Tensor:
        """Attention of the workspace's queries, (B*T, heads * head dim)."""
        mask = step.masks[kind]
        if step.stop is None:
            # In bf16 and at 2,048 keys two products take a third of the time of scaled_dot_product_attention.
            assert mask is not None
            scores = self._capped(torch.bmm(space.query_rows, held.keys))
            (scores if mask.dim() == 1 else scores.view(space.scored)).add_(mask)
            mixed = torch.bmm(scores.softmax(-1), held.values)
            if space.single:
                return mixed.view(space.rows, -1)
        else:
            queries, (keys, values) = space.queries.flatten(2, 3), held.filled(step.stop)
            if step.spans is None:
                mask = None if mask is None else mask.expand(-1, -1, -1, self.groups, -1).flatten(2, 3)
                mixed = self._attention(queries, keys, values, mask)
            else:
                tokens = [
                    self._attention(token, keys[:, :, start:stop], values[:, :, start:stop], None)
                    for token, (start, stop) in zip(torch.split(queries, self.groups, 2), step.spans[kind], strict=True)
                ]
                mixed = torch.cat(tokens, dim=2)
        return mixed.view(space.queries.shape).transpose(1, 2).reshape(space.rows, -1)

    def _attention(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self._score_cap is None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
        scores = self._capped(queries @ keys.transpose(2, 3))
        return (scores if mask is None else scores.add_(mask)).softmax(-1) @ values

    def _capped(self, scores: Tensor) -> Tensor:
        """In place."""
        return scores if self._score_cap is None else scores.div_(self._score_cap).tanh_().mul_(self._score_cap)

    def _slots(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Weights (out, D) or biases (out,) of the three projections as those of one, by kv head and slot."""
        rest = query.shape[1:]
        queries = self._interleaved(query.view(self.kv_heads, self.groups, self.head_dim, *rest), dim=2)
        keys = self._interleaved(key.view(self.kv_heads, 1, self.head_dim, *rest), dim=2)
        return torch.cat([queries, keys, value.view_as(keys)], dim=1).reshape(-1, *rest)

    def _norm_of_slots(self, query: NormWeights | None, key: NormWeights | None, spec: ModelSpec) -> "_SlotNorm | None":
        if query is None or key is None:
            return None
        per_head = spec.architecture.query_key_norms == "head"
        shape = (self.kv_heads, self.groups, self.head_dim)
        queries = query.weight.expand(shape) if per_head else query.weight.view(shape)
        keys = key.weight.expand(self.kv_heads, 1, -1) if per_head else key.weight.view(self.kv_heads, 1, -1)
        return _SlotNorm(self._interleaved(torch.cat([queries, keys], dim=1), dim=2), spec.eps, per_head)

    def _interleaved(self, tensor: Tensor, dim: int) -> Tensor:
        """The halves of the rotating part of a head, which rope pairs, alternate along `dim`; the rest follows."""
        rotating, rest = torch.split(tensor, [self._rotary, self.head_dim - self._rotary], dim)
        halves = torch.stack(rotating.chunk(2, dim), dim + 1)
        return torch.cat([halves.flatten(dim, dim + 1), rest], dim)


class Norm:
    """RMSNorm over the last dimension, for which torch.rms_norm takes some eight passes on the CPU; LayerNorm with a bias.

    Where it `folds`, in fp32 and fp64, the weight becomes part of the linear layer after the norm, and three passes remain.
    Otherwise, as in bf16, where that would round the weights of the layer again, layer_norm is one pass: over a row and its
    negative, whose mean is 0 and whose mean square is the row's.
    """

    def __init__(self, weights: NormWeights, eps: float, folds: bool) -> None:
        self._weight, self._bias, self._eps = weights.weight, weights.bias, eps
        size = self._weight.numel()
        self._on_cpu = self._weight.device.type == "cpu"
        self._folds = self._on_cpu and folds and self._bias is None
        self._twice = torch.cat((self._weight, self._weight))
        self._floor = self._weight.new_tensor(math.sqrt(size * eps))

    def folded_into(self, weight: Tensor) -> Tensor:
        """`weight` (out, D) of the linear layer after this norm as another (out, D), to be used instead of it."""
        return weight * (self._weight * math.sqrt(self._weight.numel())) if self._folds else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if self._folds:
            # sqrt(mean(x^2) + eps) is hypot(|x|, sqrt(D eps)) / sqrt(D)
            length: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return hidden / length.hypot_(self._floor)
        if self._bias is not None:
            return F.layer_norm(hidden, self._weight.shape, self._weight, self._bias, self._eps)
        if not self._on_cpu:
            return torch.rms_norm(hidden, self._weight.shape, self._weight, self._eps).to(hidden.dtype)
        both: Tensor = torch.layer_norm(torch.cat((hidden, -hidden), dim=-1), self._twice.shape, self._twice, None, self._eps)
        return both[..., : self._weight.numel()].contiguous()


class _SlotNorm:
    """RMSNorm of queries and keys, over each head or over all heads, in place over (B, T, kv heads, G+1, head dim)."""

    def __init__(self, weights: Tensor, eps: float, per_head: bool) -> None:
        """`weights` (kv heads, G+1, head dim)."""
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        self._groups = weights.shape[1] - 1
        self._per_head = per_head
        self._parts = [wide] if per_head else list(torch.split(wide, [self._groups, 1], dim=1))
        sizes = [part.shape[-1] if per_head else part.numel() for part in self._parts]
        self._scales = [part * math.sqrt(size) for part, size in zip(self._parts, sizes, strict=True)]
        self._floors = [wide.new_tensor(math.sqrt(size * eps)) for size in sizes]

    def apply_(self, slots: Tensor) -> None:
        dims = (-1,) if self._per_head else (-3, -2, -1)
        parts = [slots] if self._per_head else torch.split(slots, [self._groups, 1], dim=-2)
        for part, scale, floor in zip(parts, self._scales, self._floors, strict=True):
            length = torch.linalg.vector_norm(part, dim=dims, keepdim=True).hypot_(floor)
            part.div_(length).mul_(scale)


def _norm(weights: NormWeights | None, eps: float, folds: bool) -> Norm | None:
    return None if weights is None else Norm(weights, eps, folds)


def _packed(part: Projection, norm: Norm | None, quantization: Quantization | None, exact: bool) -> Linear:
    """The linear layer of a projection, after `norm` if there is one."""
    weight = part.weight if norm is None else norm.folded_into(part.weight)
    return linear(weight, part.bias, quantization, exact)
