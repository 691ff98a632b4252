"""A decoder layer of the Llama family on repacked weights, in few operations: of a small model they are most of the time."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.packing import Quantization
from ..cache import LayerSlots
from ..spec import ModelSpec
from ..weights import Weights
from .linear import linear


class Step(NamedTuple):
    """What all layers of a call share."""

    rope: Tensor  # (B, T, 1, G+2, half a head) complex, or without B
    still: Tensor  # the same for layers that do not rotate
    masks: dict[str, Tensor | None]  # by kind of layer: added to the scores, (B or 1, 1, T, 1, S) or (S,)
    spans: dict[str, list[tuple[int, int]]] | None  # by kind: the keys start..stop-1 that each token sees, to attend one by one
    stop: int | None  # filled places of the cache; None to attend to all, as the masks say


class Workspace:
    """Where the layers of a call over B*T tokens put what no other part of the call needs, with all views of it made once."""

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
        self.queries = like.new_empty(self.rotated.shape)  # where they are copied, T*G rows a head
        self.query_rows = self.queries.view(batch * heads, count * groups, size)
        self.scored = (batch, heads, count, groups, -1)  # the shape of their scores
        self.gate_up = like.new_empty(batch * count, 2 * layer.intermediate_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)


class PackedLayer:
    """A decoder layer over rows (B*T, D).

    Query, key and value are one matrix, gate and up another. Rows of the first are ordered (kv head, slot, head dim), the slots
    being the G queries of a key's group, the key and the value. So the queries of T tokens are T*G rows of one attention call,
    its output for one token needs no transposition, and the token's key and value are one copy into the cache. The two halves
    of a rotated head interleave as complex numbers: rope, and the scale of attention, are one product.
    """

    def __init__(self, weights: Weights, spec: ModelSpec, index: int, quantization: Quantization | None, exact: bool) -> None:
        self.head_dim, self.kv_heads = spec.head_dim, spec.kv_heads
        self.groups = spec.heads // spec.kv_heads
        self.intermediate_size = spec.inner
        self._rotates = spec.rotates[index]
        attention, mlp = weights.below("self_attn."), weights.below("mlp.")
        folds = quantization is None
        attention_norm = self._attention_norm = Norm(weights.of("input_layernorm.weight"), spec, folds)
        mlp_norm = self._mlp_norm = Norm(weights.of("post_attention_layernorm.weight"), spec, folds)
        norm = attention.get("q_norm.weight")
        self._head_norm = None if norm is None else _HeadNorm(norm, attention.of("k_norm.weight"), spec, self.groups)
        qkv, qkv_bias = attention.together(("q_proj", "k_proj", "v_proj"))
        up, up_bias = mlp.together(("gate_proj", "up_proj"))
        packed = partial(linear, quantization=quantization, exact=exact)
        self._qkv = packed(attention_norm.folded_into(self._slots(*qkv)), None if qkv_bias is None else self._slots(*qkv_bias))
        self._output = packed(attention.of("o_proj.weight"), attention.get("o_proj.bias"))
        self._up = packed(mlp_norm.folded_into(torch.cat(up)), None if up_bias is None else torch.cat(up_bias))
        self._down = packed(mlp.of("down_proj.weight"), mlp.get("down_proj.bias"))
        self.linears = (self._qkv, self._output, self._up, self._down)

    def run_(self, hidden: Tensor, step: Step, kind: str, held: LayerSlots, space: Workspace) -> None:
        """The layer over `hidden` (B*T, D), in place."""
        self._qkv.write(self._attention_norm(hidden), space.qkv)
        if self._head_norm is not None:
            self._head_norm.apply_(space.rotating)
        space.pairs.mul_(step.rope if self._rotates else step.still)
        held.write(space.keys_values)
        space.queries.copy_(space.rotated)
        self._output.add(self._attended(step, kind, held, space), hidden)
        self._up.write(self._mlp_norm(hidden), space.gate_up)
        self._down.add(F.silu(space.gate).mul_(space.up), hidden)

    def _attended(self, step: Step, kind: str, held: LayerSlots, space: Workspace) -> Tensor:
        """What the queries of the workspace see, (B*T, heads * head dim)."""
        mask = step.masks[kind]
        if step.stop is None:
            # In bf16 and at 2,048 keys two products take a third of the time of scaled_dot_product_attention.
            assert mask is not None
            scores = torch.bmm(space.query_rows, held.keys)
            (scores if mask.dim() == 1 else scores.view(space.scored)).add_(mask)
            mixed = torch.bmm(scores.softmax(-1), held.values)
            if space.single:
                return mixed.view(space.rows, -1)
        else:
            queries, (keys, values) = space.queries.flatten(2, 3), held.filled(step.stop)
            if step.spans is None:
                mask = None if mask is None else mask.expand(-1, -1, -1, self.groups, -1).flatten(2, 3)
                mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
            else:
                tokens = [
                    F.scaled_dot_product_attention(mine, keys[:, :, start:stop], values[:, :, start:stop], scale=1.0)
                    for mine, (start, stop) in zip(torch.split(queries, self.groups, 2), step.spans[kind], strict=True)
                ]
                mixed = torch.cat(tokens, dim=2)
        return mixed.view(space.queries.shape).transpose(1, 2).reshape(space.rows, -1)

    def _slots(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Weights (out, D) or biases (out,) of the three projections as those of one, by kv head and slot."""
        rest = query.shape[1:]
        queries = _interleaved(query.view(self.kv_heads, self.groups, self.head_dim, *rest), dim=2)
        keys = _interleaved(key.view(self.kv_heads, 1, self.head_dim, *rest), dim=2)
        return torch.cat([queries, keys, value.view_as(keys)], dim=1).reshape(-1, *rest)


class Norm:
    """RMSNorm over the last dimension, for which torch.rms_norm takes some eight passes on the CPU.

    In fp32 and fp64 the weight becomes part of the linear layer behind the norm, and three passes remain. In bf16, where that
    would round the weights of the layer once more, layer_norm is one pass: over a row and its negative, whose mean is 0 and
    whose mean square is the row's.
    """

    def __init__(self, weight: Tensor, spec: ModelSpec, folds: bool) -> None:
        self._weight = weight
        self._eps = spec.eps
        size = self._weight.numel()
        self._on_cpu = self._weight.device.type == "cpu"
        self._folds = self._on_cpu and folds and weight.dtype.itemsize >= 4
        self._twice = torch.cat((weight, weight))
        self._floor = weight.new_tensor(math.sqrt(size * self._eps))

    def folded_into(self, weight: Tensor) -> Tensor:
        """`weight` (out, D) of the linear layer behind this norm, to be used instead of the original."""
        return weight * (self._weight * math.sqrt(self._weight.numel())) if self._folds else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._folds:
            # sqrt(mean(x^2) + eps) is hypot(|x|, sqrt(D eps)) / sqrt(D)
            length: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return hidden / length.hypot_(self._floor)
        if not self._on_cpu:
            return torch.rms_norm(hidden, self._weight.shape, self._weight, self._eps)
        both: Tensor = torch.layer_norm(torch.cat((hidden, -hidden), dim=-1), self._twice.shape, self._twice, None, self._eps)
        return both[..., : self._weight.numel()].contiguous()


class _HeadNorm:
    """RMSNorm of each query and key (qwen3), in place over (B, T, kv heads, G+1, head dim)."""

    def __init__(self, query: Tensor, key: Tensor, spec: ModelSpec, groups: int) -> None:
        weights = torch.stack([_interleaved(norm, dim=0) for norm in [query] * groups + [key]])
        size = weights.shape[-1]
        self._scale = weights.to(torch.promote_types(weights.dtype, torch.float32)) * math.sqrt(size)
        self._floor = self._scale.new_tensor(math.sqrt(size * spec.eps))

    def apply_(self, slots: Tensor) -> None:
        length = torch.linalg.vector_norm(slots, dim=-1, keepdim=True).hypot_(self._floor)
        slots.div_(length).mul_(self._scale)


def _interleaved(tensor: Tensor, dim: int) -> Tensor:
    """The two halves of a head, which rope pairs, alternating along `dim`."""
    halves = torch.stack(tensor.chunk(2, dim), dim + 1)
    return halves.flatten(dim, dim + 1)
