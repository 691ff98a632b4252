"""A decoder layer of the Llama family on repacked weights, in few operations: of a small model they are most of the time."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Quantization
from .cache import LayerSlots
from .linear import linear
from .weights import Weights, head_dim


@dataclass(frozen=True)
class Step:
    """What all layers of a call share."""

    rope: Tensor  # (B or 1, T, G+2, 1, half a head) complex
    masks: dict[str, Tensor | None]  # by kind of layer: added to the scores, (B or 1, 1, T*G, S)
    spans: dict[str, list[tuple[int, int]]] | None  # by kind: the keys start..stop-1 that each token sees, to attend one by one


class Workspace:
    """Where the layers of a call over B*T tokens put what no other part of the call needs, with all views of it made once."""

    def __init__(self, batch: int, count: int, layer: "PackedLayer", like: Tensor) -> None:
        groups, heads, size = layer.groups, layer.kv_heads, layer.head_dim
        wide = torch.promote_types(like.dtype, torch.float32)
        self.qkv = like.new_empty(batch * count, (groups + 2) * heads * size, dtype=wide)
        slots = self.qkv.view(batch, count, groups + 2, heads, size)
        self.pairs = torch.view_as_complex(slots.view(batch, count, groups + 2, heads, size // 2, 2))
        self.rotating = slots[:, :, : groups + 1]  # queries and keys
        self.queries = slots[:, :, :groups].permute(0, 3, 1, 2, 4)  # (B, kv heads, T, G, head dim)
        self.keys_values = slots[:, :, groups:].permute(0, 2, 3, 1, 4)  # (B, 2, kv heads, T, head dim)
        self.gate_up = like.new_empty(batch * count, 2 * layer.intermediate_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)


class PackedLayer:
    """A decoder layer over rows (B*T, D).

    Query, key and value are one matrix, gate and up another. Rows of the first are ordered (slot, kv head, head dim), the slots
    being the G queries of a key's group, the key and the value. So the queries of T tokens are the G*T rows of one attention
    call, its output needs no transposition (the columns of the output matrix have the same order), and a token's key and
    value are one copy into the cache. The two halves of a rotated head interleave as complex numbers: rope is one product.
    """

    def __init__(self, weights: Weights, config: Any, index: int, quantization: Quantization | None, exact: bool) -> None:
        self.head_dim = head_dim(config)
        self.kv_heads = int(config.num_key_value_heads)
        self.groups = int(config.num_attention_heads) // self.kv_heads
        self.intermediate_size = int(config.intermediate_size)
        self._width = self.groups * self.kv_heads * self.head_dim
        self._scale = self.head_dim**-0.5
        self._rotates = bool(config.no_rope_layers[index]) if config.model_type == "smollm3" else True
        attention, mlp = weights.below("self_attn."), weights.below("mlp.")
        folds = quantization is None
        attention_norm = self._attention_norm = Norm(weights.of("input_layernorm.weight"), config, folds)
        mlp_norm = self._mlp_norm = Norm(weights.of("post_attention_layernorm.weight"), config, folds)
        norm = attention.get("q_norm.weight")
        self._head_norm = None if norm is None else _HeadNorm(norm, attention.of("k_norm.weight"), config, self.groups)
        qkv, qkv_bias = attention.together(("q_proj", "k_proj", "v_proj"))
        up, up_bias = mlp.together(("gate_proj", "up_proj"))
        columns = attention.of("o_proj.weight").view(-1, self.kv_heads, self.groups, self.head_dim).transpose(1, 2)
        packed = partial(linear, quantization=quantization, exact=exact)
        self._qkv = packed(attention_norm.folded_into(self._slots(*qkv)), None if qkv_bias is None else self._slots(*qkv_bias))
        self._output = packed(columns.reshape(-1, self._width), attention.get("o_proj.bias"))
        self._up = packed(mlp_norm.folded_into(torch.cat(up)), None if up_bias is None else torch.cat(up_bias))
        self._down = packed(mlp.of("down_proj.weight"), mlp.get("down_proj.bias"))
        self.linears = (self._qkv, self._output, self._up, self._down)

    def run_(self, hidden: Tensor, step: Step, kind: str, held: LayerSlots, space: Workspace) -> None:
        """The layer over `hidden` (B*T, D), in place."""
        self._qkv.write(self._attention_norm(hidden), space.qkv)
        if self._head_norm is not None:
            self._head_norm.apply_(space.rotating)
        if self._rotates:
            space.pairs.mul_(step.rope)
        held.write(space.keys_values)
        self._output.add(self._attended(step, kind, held, space).view(len(hidden), self._width), hidden)
        self._up.write(self._mlp_norm(hidden), space.gate_up)
        self._down.add(F.silu(space.gate).mul_(space.up), hidden)

    def _attended(self, step: Step, kind: str, held: LayerSlots, space: Workspace) -> Tensor:
        """(B, T*G, kv heads, head dim), contiguous."""
        queries = space.queries.flatten(2, 3).to(held.keys.dtype)  # (B, kv heads, T*G, head dim)
        if step.spans is None:
            mixed = F.scaled_dot_product_attention(
                queries, held.keys, held.values, attn_mask=step.masks[kind], scale=self._scale
            )
            return mixed.transpose(1, 2).contiguous()
        tokens = [
            F.scaled_dot_product_attention(mine, held.keys[:, :, start:stop], held.values[:, :, start:stop], scale=self._scale)
            for mine, (start, stop) in zip(torch.split(queries, self.groups, 2), step.spans[kind], strict=True)
        ]
        return torch.cat([mixed.transpose(1, 2) for mixed in tokens], dim=1)

    def _slots(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Weights (out, D) or biases (out,) of the three projections as those of one, by slot."""
        heads, rest = (self.kv_heads, self.groups), query.shape[1:]
        queries = _interleaved(query.view(*heads, self.head_dim, *rest), dim=2).transpose(0, 1)
        keys = _interleaved(key.view(1, self.kv_heads, self.head_dim, *rest), dim=2)
        return torch.cat([queries, keys, value.view_as(keys)]).reshape(-1, *rest)


class Norm:
    """RMSNorm over the last dimension.

    On the CPU torch.rms_norm takes some eight passes: here they are three, and in fp32 and fp64 the weight can become part of
    the linear layer behind the norm. (Not in bf16 or fewer bits: the weights of that layer would be rounded once more.)
    """

    def __init__(self, weight: Tensor, config: Any, folds: bool) -> None:
        self._weight = weight
        self._eps = float(config.rms_norm_eps)
        size = self._weight.numel()
        self._on_cpu = self._weight.device.type == "cpu"
        self._folds = self._on_cpu and folds and weight.dtype.itemsize >= 4
        self._wide = torch.promote_types(weight.dtype, torch.float32)
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
    """RMSNorm of each query and key (qwen3), in place over (B, T, G+1, kv heads, head dim)."""

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
