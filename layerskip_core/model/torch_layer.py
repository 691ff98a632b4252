"""A decoder layer on PyTorch's kernels, in few operations: the overhead of each dominates in small
models.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.model import Quantization
from .rope import cosines_and_sines
from .row_cache import LayerSlots, SpanWriter
from .spec import AnySpec, ModelSpec
from .torch_linear import Linear, Norm, SlotNorm, linear
from .weights import (
    Affine,
    Weights,
    activation_factors,
    expert_inputs,
    expert_outputs,
    layer_norms,
    router,
    stacked,
    sublayer_inputs,
    sublayer_output,
)


def xielu(x: Tensor, *, above: float = 0.8, below: float = 0.8) -> Tensor:
    """Huang and Schlag, 2024, with beta = 0.5."""
    negative = x.clamp(max=0)
    return (
        F.relu(x)
        .square_()
        .mul_(above)
        .add_(negative.expm1() - negative, alpha=below)
        .add_(x, alpha=0.5)
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
    "xielu": xielu,
}

# Types of rope whose angles depend on the position only. (Dynamic ones and longropes change beyond
# ModelSpec.context.)
_STATIC_ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "proportional")


def missing_feature(spec: AnySpec, native: bool = False) -> str | None:
    """A feature of the architecture that these layers (or, if `native`, the C kernels) lack; None
    if they have all.
    """
    if not isinstance(spec, ModelSpec):
        return "layers that only transformers has"
    if spec.activation not in ACTIVATIONS and spec.swiglu is None:
        return f"the activation {spec.activation}"
    if spec.clip is not None:
        return f"projections clipped at {spec.clip:g}"
    features = {
        "recurrent layers": spec.recurrence is not None or spec.architecture.one_sublayer,
        "gated attention": spec.architecture.gates_attention,
        "attention sinks": spec.architecture.sinks,
        "shared experts": spec.experts is not None and spec.experts.shared_inner,
        "different sizes of layers": spec.sizes,
    }
    if not native and any(features.values()):
        return next(name for name, present in features.items() if present)
    for rope in spec.ropes:
        if rope.type not in _STATIC_ROPES:
            return f"rotary positions of type {rope.type}"
        if int(spec.head_dim * rope.share) != spec.rotary:
            return f"a partial_rotary_factor of {rope.share}"
    return None


class Step(NamedTuple):
    """Tensors that all layers of a call share. The dicts are by kind of layer."""

    # By index of the rotary embedding: (B, T, 1, G+2, half a head) complex, or without B
    ropes: list[Tensor]
    still: Tensor  # the same for layers without rotary positions
    masks: dict[str, Tensor | None]  # added to the scores, (B or 1, 1, T, 1, S)
    # Exact: keys start..end-1 of each token, which attends alone
    spans: dict[str, list[tuple[int, int]]] | None
    end: int | None  # filled positions of the cache; None: attention reads all, under masks


class Workspace:
    """Buffers of layers for calls over B*T tokens, with their views."""

    def __init__(self, spec: ModelSpec, like: Tensor, batch: int, count: int) -> None:
        groups = spec.groups
        heads = spec.kv_heads
        size = spec.head_dim
        wide = torch.promote_types(like.dtype, torch.float32)
        self.rows = batch * count
        self.single = count == 1
        self.qkv = like.new_empty(batch * count, heads * (groups + 2) * size, dtype=wide)
        slots = self.qkv.view(batch, count, heads, groups + 2, size)
        self.pairs = torch.view_as_complex(
            slots.view(batch, count, heads, groups + 2, size // 2, 2)
        )
        self.rotating = slots[:, :, :, : groups + 1]  # queries and keys
        # (2, B, kv heads, T, head dim)
        self.keys_values = slots[:, :, :, groups:].permute(3, 0, 2, 1, 4)
        # Queries, (B, kv heads, T, G, head dim)
        self.rotated = slots[:, :, :, :groups].transpose(1, 2)
        self.queries = like.new_empty(self.rotated.shape)  # a contiguous copy: T*G rows per head
        self.query_rows = self.queries.view(batch * heads, count * groups, size)
        self.scored = (batch, heads, count, groups, -1)  # the shape of attention scores
        gated = spec.architecture.gated
        self.inside = like.new_empty(batch * count, spec.inner * (1 + gated))
        self.gate = self.inside[:, : spec.inner] if gated else None
        self.up = self.inside[:, spec.inner :] if gated else self.inside


class TorchLayer:
    """A decoder layer over rows (B*T, D).

    Query, key and value are one matrix, gate and up another. Rows of the first are ordered (kv
    head, slot, head dim), where the slots are the G queries of a group, the key and the value. So
    queries of T tokens are T*G rows of one attention call, its output for one token needs no
    transposition, and key and value are one copy into the cache. The halves of the rotating part of
    a head interleave as complex numbers: rope and attention scale are one product.
    """

    def __init__(
        self,
        weights: Weights,
        spec: ModelSpec,
        index: int,
        quantization: Quantization | None,
        exact: bool,
    ) -> None:
        self._rope = spec.rope_of[index]
        self._groups = spec.groups
        self._score_cap = spec.score_cap
        self._residual_scale = spec.residual_scale
        self._parallel = spec.parallel
        self._norms_rotated = spec.architecture.norms_rotated
        self._activation = ACTIVATIONS[spec.activation]
        if spec.activation == "xielu":
            above, below = activation_factors(weights, spec)
            self._activation = partial(xielu, above=above, below=below)
        qkv = list(sublayer_inputs(weights, spec, "attention"))
        folds = quantization is None and qkv[0].weight.dtype.itemsize >= 4
        before_attention, after_attention, before_mlp, after_mlp, query, key = layer_norms(
            weights, spec, index
        )
        self._before_attention = before_attention and Norm(before_attention, spec.eps, folds)
        self._after_attention = after_attention and Norm(after_attention, spec.eps)
        self._before_mlp = before_mlp and Norm(before_mlp, spec.eps, folds)
        self._after_mlp = after_mlp and Norm(after_mlp, spec.eps)
        self._query_key_norm = None
        if query is not None and key is not None:
            per_head = spec.architecture.query_key_norms == "head"
            heads = (spec.heads, spec.kv_heads) if per_head else (1, 1)
            queries = query.weight.repeat(heads[0])
            keys = key.weight.repeat(heads[1])
            scale = spec.attention_scale if self._norms_rotated else 1.0
            self._query_key_norm = SlotNorm(_slots(spec, queries, keys), spec.eps, per_head, scale)

        def packed(part: Affine, norm: Norm | None = None) -> Linear:
            weight = part.weight if norm is None else norm.folded_into(part.weight)
            return linear(weight, part.bias, quantization, exact)

        biases = [part.bias for part in qkv if part.bias is not None]
        slots = _slots(spec, *(part.weight for part in qkv)).flatten(0, 2)
        slot_bias = _slots(spec, *biases).flatten() if biases else None
        self._qkv = packed(Affine(slots, slot_bias), self._before_attention)
        self._output = packed(sublayer_output(weights, spec, "attention"))
        self._experts: TorchExperts | None = None
        if spec.experts_of(index) is None:
            self._up = packed(stacked(sublayer_inputs(weights, spec, "mlp")), self._before_mlp)
            self._down = packed(sublayer_output(weights, spec, "mlp"))
            self.linears = (self._qkv, self._output, self._up, self._down)
        else:
            inputs = expert_inputs(weights, spec)
            ups = [
                packed(stacked(pair), self._before_mlp) for pair in zip(inputs, inputs, strict=True)
            ]
            downs = list(map(packed, expert_outputs(weights, spec)))
            scores = router(weights, spec).weight
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            scores = scores if self._before_mlp is None else self._before_mlp.folded_into(scores)
            self._experts = TorchExperts(spec, linear(scores, None, None, exact), ups, downs)
            self.linears = (self._qkv, self._output, ups[0], downs[0])

    def run_(
        self, hidden: Tensor, step: Step, kind: str, held: LayerSlots, space: Workspace
    ) -> None:
        """Runs the layer on `hidden` (B*T, D), in place."""
        self.write_kv(hidden, step, held, space)
        space.queries.copy_(space.rotated)
        mixed = self._attended(step, kind, held, space)
        if not self._parallel:
            self._add(self._output, mixed, self._after_attention, hidden)
        rows = hidden if self._before_mlp is None else self._before_mlp(hidden)
        if self._experts is not None:
            hidden.add_(self._experts(rows), alpha=self._residual_scale)
            return
        self._up.write(rows, space.inside)
        if self._parallel:
            self._add(self._output, mixed, self._after_attention, hidden)
        inside = self._activation(space.up if space.gate is None else space.gate)
        if space.gate is not None:
            inside = inside.mul_(space.up)
        self._add(self._down, inside, self._after_mlp, hidden)

    def write_kv(self, hidden: Tensor, step: Step, held: LayerSlots, space: Workspace) -> None:
        """Writes keys and values of `hidden` (B*T, D) to the cache, and queries to the
        workspace.
        """
        self._qkv.write(
            hidden if self._before_attention is None else self._before_attention(hidden), space.qkv
        )
        if self._query_key_norm is not None and not self._norms_rotated:
            self._query_key_norm.apply_(space.rotating)
        space.pairs.mul_(step.still if self._rope is None else step.ropes[self._rope])
        if self._query_key_norm is not None and self._norms_rotated:
            self._query_key_norm.apply_(space.rotating)
        held.write(space.keys_values)

    def _add(self, layer: Linear, rows: Tensor, after: Norm | None, hidden: Tensor) -> None:
        """Adds a block's output to `hidden`, in place."""
        if after is None and self._residual_scale == 1:
            layer.add(rows, hidden)
        else:
            output = layer(rows)
            hidden.add_(output if after is None else after(output), alpha=self._residual_scale)

    def _attended(self, step: Step, kind: str, held: LayerSlots, space: Workspace) -> Tensor:
        """Attention of the workspace's queries, (B*T, heads * head dim)."""
        mask = step.masks[kind]
        if step.end is None:
            # In bf16 at 2,048 keys this takes a third of the time of scaled_dot_product_attention.
            assert mask is not None
            scores = self._capped(torch.bmm(space.query_rows, held.keys))
            scores.view(space.scored).add_(mask)
            mixed = torch.bmm(scores.softmax(-1), held.values)
            if space.single:
                return mixed.view(space.rows, -1)
        else:
            queries = space.queries.flatten(2, 3)
            keys, values = held.all[..., : step.end, :].unbind()
            if step.spans is None:
                if mask is not None:
                    mask = mask.expand(-1, -1, -1, self._groups, -1).flatten(2, 3)
                mixed = self._attention(queries, keys, values, mask)
            else:
                tokens = [
                    self._attention(token, keys[:, :, start:end], values[:, :, start:end], None)
                    for token, (start, end) in zip(
                        torch.split(queries, self._groups, 2), step.spans[kind], strict=True
                    )
                ]
                mixed = torch.cat(tokens, dim=2)
        return mixed.view(space.queries.shape).transpose(1, 2).reshape(space.rows, -1)

    def _attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self._score_cap is None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
        scores = self._capped(queries @ keys.transpose(2, 3))
        return (scores if mask is None else scores.add_(mask)).softmax(-1) @ values

    def _capped(self, scores: Tensor) -> Tensor:
        """Soft-caps scores, in place."""
        if self._score_cap is None:
            return scores
        return scores.div_(self._score_cap).tanh_().mul_(self._score_cap)


class TorchExperts:
    """A mixture of experts: each multiplies the rows that chose it."""

    def __init__(
        self, spec: ModelSpec, scores: Linear, ups: list[Linear], downs: list[Linear]
    ) -> None:
        """`scores`: the router, for rows in fp32 or more. `ups`: gate and up, (2 * inner, D) each;
        `downs`: (D, inner).
        """
        assert spec.experts is not None
        self._scores = scores
        self._ups = ups
        self._downs = downs
        self._chosen = spec.experts.chosen
        self._normalised = spec.experts.normalised
        self._activation = ACTIVATIONS[spec.activation]

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, D) to (N, D). Synchronises with the device."""
        scores = self._scores(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        best, chosen = scores.topk(self._chosen)
        weights = best.softmax(-1) if self._normalised else scores.softmax(-1).gather(1, chosen)
        output = torch.zeros_like(rows)
        for expert in sorted({*chosen.flatten().tolist()}):
            places, choices = (chosen == expert).nonzero(as_tuple=True)
            gate, up = self._ups[expert](rows[places]).chunk(2, -1)
            products = self._downs[expert](self._activation(gate) * up)
            output.index_add_(0, places, (products * weights[places, choices, None]).to(rows.dtype))
        return output


def _slots(spec: ModelSpec, query: Tensor, key: Tensor, value: Tensor | None = None) -> Tensor:
    """Joins tensors by output of three projections, (heads * head dim, ...) each, to (kv heads, G+2
    slots, head dim, ...).

    In queries and keys the two halves of the rotating part of a head interleave; the rest follows.
    """
    shape = (spec.kv_heads, -1, spec.head_dim, *query.shape[1:])
    both = torch.cat([query.view(shape), key.view(shape)], dim=1)
    rotating, rest = torch.split(both, [spec.rotary, spec.head_dim - spec.rotary], 2)
    slots = torch.cat([torch.stack(rotating.chunk(2, 2), 3).flatten(2, 3), rest], dim=2)
    return slots if value is None else torch.cat([slots, value.view(shape)], dim=1)


class Rope:
    """Rotations by position as complex numbers, for the slots of a key head: its G queries, the key
    and the value.

    Those of queries include the attention scale; values, and the part of a head without rope, are
    not rotated. There is one table for each of `spec.ropes`; it grows with the text.
    """

    def __init__(self, spec: ModelSpec, like: Tensor) -> None:
        self._spec = spec
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._lengths = self._like.new_tensor([spec.attention_scale] * spec.groups + [1.0])[:, None]
        ones = torch.ones(
            1, spec.head_dim // 2, dtype=self._lengths.dtype.to_complex(), device=like.device
        )
        self.still = self._slots(ones)  # (T = 1, 1, G+2, half a head), for layers without rope
        self._length = 0
        self._tables = self._grown(0)
        self._outgrown: list[list[Tensor]] = []  # CUDA graphs still read them

    def at(self, writer: SpanWriter, positions: Tensor) -> list[Tensor]:
        """Rotations by rotary embedding, (B, T, 1, G+2, half a head), without B for rows at the
        same positions.
        """
        if self._length < writer.end:
            self._outgrown.append(self._tables)
            self._length = 2 * writer.end
            self._tables = self._grown(self._length)
        if writer.contiguous:
            return [table[writer.start : writer.end] for table in self._tables]
        return [table[positions] for table in self._tables]

    def _grown(self, count: int) -> list[Tensor]:
        tables = []
        fixed = (self._spec.head_dim - self._spec.rotary) // 2  # pairs that do not rotate
        for cos, sin in cosines_and_sines(self._spec, count, self._like):
            rotations = torch.complex(cos, sin)
            rotations = torch.cat([rotations, rotations.new_ones(count, fixed)], dim=1)
            tables.append(self._slots(rotations))
        return tables

    def _slots(self, rotations: Tensor) -> Tensor:
        """Rotations (positions, half a head) as (positions, 1, G+2, half a head)."""
        rotating = rotations[:, None, None] * self._lengths
        return torch.cat([rotating, torch.ones_like(rotating[:, :, :1])], dim=2)


class Masks:
    """The additive attention mask: a query sees no later key and none before its window."""

    def __init__(self, spec: ModelSpec, like: Tensor) -> None:
        """Masks have the precision and the device of `like`."""
        self.windows = {kind: spec.window_of(kind) for kind in spec.kinds}
        self._like = like.new_empty(0)

    def by_kind(
        self, writer: SpanWriter, positions: Tensor, keys: int, always: bool
    ) -> dict[str, Tensor | None]:
        """By kind of layer, (B or 1, 1, T, 1, S) over `keys` positions of the cache.

        None for one token that sees all, unless a mask is `always` needed. `positions` (B, T) are
        on the device.
        """
        return {
            kind: self._mask(window, writer, positions, keys, always)
            for kind, window in self.windows.items()
        }

    def _mask(
        self, window: int | None, writer: SpanWriter, positions: Tensor, keys: int, always: bool
    ) -> Tensor | None:
        if (
            not always
            and writer.contiguous
            and positions.shape[1] == 1
            and (window is None or writer.end <= window)
        ):
            return None
        queries = (positions[:1] if writer.contiguous else positions)[:, None, :, None, None]
        order = torch.arange(keys, device=positions.device)
        unseen = order > queries
        if window is not None:
            unseen |= order <= queries - window
        mask = torch.zeros(unseen.shape, dtype=self._like.dtype, device=positions.device)
        return mask.masked_fill_(unseen, -math.inf)
