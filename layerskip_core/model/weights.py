"""Weights: by name in a checkpoint, by role in a layer, and in 8 and 4 bits.

A weight is taken when it is repacked, so the model is never in memory twice. Only this module and
spec.py know the names of weights in checkpoints.

int4 weights have 16 levels per group of inputs. They are rounded from a weight, or stored by a
calibration as rows of bytes: a byte tensor in place of the weight until a kernel packs it. Its rows
can be reordered, joined and padded like those of a weight; a row of zero bytes is a row of zeros.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .blocks import BlockRows, plain
from .spec import ModelSpec, Shapes, Sublayer, check_shape

GROUP_SIZE = 32  # inputs that share a scale: 5 bits per weight, and a divisor of most widths
LEVELS = 16
_BYTES = GROUP_SIZE // 2 + 4  # of a group: two levels per byte, then scale and lowest value in bf16
Take = Callable[[str], Tensor | None]  # gives a weight by name; None if there is none


@dataclass(frozen=True)
class Weights:
    """Weights by name after a prefix. `shapes`: those of the architecture; other weights of a
    checkpoint are ignored.
    """

    take: Take  # `checked`
    shapes: Shapes
    prefix: str = ""

    def below(self, prefix: str) -> "Weights":
        return Weights(self.take, self.shapes, self.prefix + prefix)

    def remembered(self) -> "Weights":
        """For repeated use: each weight is read and checked once, and kept as long as this
        object.
        """
        return Weights(cache(self.take), self.shapes, self.prefix)

    def after(self, first: Take) -> "Weights":
        """With `first` taking precedence."""

        def take(name: str) -> Tensor | None:
            weight = first(name)
            return self.take(name) if weight is None else weight

        return Weights(take, self.shapes, self.prefix)

    def of(self, name: str) -> Tensor:
        """A weight by name. Raises CheckpointError if it is missing, and as `checked` does."""
        full = self.prefix + name
        weight = self.take(full)
        if weight is None:
            raise CheckpointError(f"the weight {full} is missing")
        return weight

    def bias_of(self, name: str) -> Tensor | None:
        """The bias of a projection or norm; None if the architecture gives it none."""
        bias = f"{name}.bias"
        return self.of(bias) if self.prefix + bias in self.shapes else None


def checked(take: Take, shapes: Shapes, mapped: Collection[str] = ()) -> Take:
    """`take` that raises CheckpointError for a weight of another shape than in `shapes` or, unless
    `mapped`, not finite.
    """

    def checked_take(name: str) -> Tensor | None:
        weight = take(name)
        if isinstance(weight, BlockRows):
            check_finite(name, weight.scales)
        elif weight is not None:
            check_shape(name, shapes[name], tuple(weight.shape))
            if name not in mapped:
                check_finite(name, weight)
        return weight

    return checked_take


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, and buffers that checkpoints store with them (Gemma 4's factors of
    layers).
    """
    stored = model.state_dict().keys()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, buffer in model.named_buffers():
        if buffer.dim() and name in stored:
            weights[name] = buffer.detach()
    return weights


def taken_from(model: nn.Module) -> Take:
    """Takes the weights out of a transformers model, which can no longer run."""
    weights = named_weights(model)
    model.to("meta")
    return lambda name: weights.pop(name, None)


def check_finite(name: str, weight: Tensor) -> None:
    """Raises CheckpointError for a weight with NaN or infinity."""
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # in bf16 much faster than a sum
        what = "NaN" if bool(weight.isnan().any()) else "infinity"
        raise CheckpointError(
            f"the weight {name} holds {what}: it is damaged, or its training diverged"
        )


class Affine(NamedTuple):
    """A projection (out, in) with its bias, or a norm's factors (D,): with a bias a LayerNorm, else
    an RMSNorm.
    """

    weight: Tensor
    bias: Tensor | None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Affine":
        """With both changed alike: in the order or number of outputs, or in precision."""
        bias = None if self.bias is None else change(self.bias)
        return Affine(change(self.weight), bias)


# The functions below get the `weights` of a layer, read only those that they return, and raise as
# `Weights.of` does.


def sublayer_inputs(weights: Weights, spec: ModelSpec, sublayer: Sublayer) -> Iterator[Affine]:
    """The inward projections of a sublayer, read one after the other: query, key, value (and gate of
    the query); gate and up, or up alone in an ungated MLP.
    """
    (*names, _), outputs, *_ = spec.projections(sublayer)
    parts: Iterator[Affine]
    if len(names) == len(outputs):
        parts = (affine(weights, name, spec) for name in names)
    else:
        parts = _unfused(affine(weights, names[0], spec), spec, sublayer, outputs)
    if sublayer != "attention":
        yield from parts
        return
    queries = next(parts)
    gates = None
    if spec.architecture.gates_attention:
        queries, gates = _without_gates(queries, spec)
    yield _halved(queries, spec)
    for keys in islice(parts, 1):  # none where another layer has them
        yield _halved(keys, spec)
    yield from parts
    if gates is not None:
        yield gates


def _without_gates(part: Affine, spec: ModelSpec) -> tuple[Affine, Affine]:
    """Queries and their gates, which alternate by head in the stored weight."""

    def by_head(rows: Tensor) -> Tensor:
        return rows.view(spec.heads, 2, spec.head_dim, *rows.shape[1:])

    queries = part.mapped(lambda rows: by_head(rows)[:, 0].flatten(0, 1))
    gates = part.mapped(lambda rows: by_head(rows)[:, 1].flatten(0, 1))
    return queries, gates


def _unfused(
    fused: Affine, spec: ModelSpec, sublayer: Sublayer, outputs: tuple[int, ...]
) -> Iterator[Affine]:
    weights = _split(fused.weight, spec, sublayer, outputs)
    biases: Iterable[Tensor | None] = [None] * len(outputs)
    if fused.bias is not None:
        biases = _split(fused.bias, spec, sublayer, outputs)
    return map(Affine, weights, biases)


def by_key_head(rows: Tensor, spec: ModelSpec, *sizes: int) -> list[Tensor]:
    """Splits a recurrence's fused projections, which store `sizes` rows of each for one key head
    after the other.
    """
    assert spec.recurrence is not None
    of_heads = rows.view(spec.recurrence.key_heads, -1, *rows.shape[1:])
    return [part.flatten(0, 1) for part in torch.split(of_heads, [*sizes], 1)]


def _split(
    fused: Tensor, spec: ModelSpec, sublayer: Sublayer, outputs: tuple[int, ...]
) -> Iterable[Tensor]:
    """Splits fused projections into (outputs, ...) each."""
    sizes = spec.recurrence
    if sublayer == "mixer" and sizes is not None and sizes.mixer.by_head:
        values = sizes.outputs // sizes.key_heads
        *convolved, gates = by_key_head(fused, spec, sizes.key_dim, sizes.key_dim, values, values)
        return torch.cat(convolved), gates
    if not spec.architecture.fused_by_head:
        return torch.split(fused, [*outputs])
    by_head = fused.view(spec.kv_heads, spec.groups + 2, spec.head_dim, *fused.shape[1:])
    return (part.flatten(0, 2) for part in torch.split(by_head, [spec.groups, 1, 1], dim=1))


def _halved(part: Affine, spec: ModelSpec) -> Affine:
    """Queries or keys (heads * head dim, ...); an interleaved rope is reordered to one with pairs
    across two halves.
    """
    if not spec.architecture.interleaved_rope:
        return part
    order = torch.arange(spec.head_dim)
    order[: spec.rotary] = order[: spec.rotary].view(-1, 2).T.flatten()

    def moved(rows: Tensor) -> Tensor:
        return rows.view(-1, spec.head_dim, *rows.shape[1:])[:, order].flatten(0, 1)

    return part.mapped(moved)


def sublayer_output(weights: Weights, spec: ModelSpec, sublayer: Sublayer) -> Affine:
    return affine(weights, spec.projections(sublayer).names[-1], spec)


def router(weights: Weights, spec: ModelSpec) -> Affine:
    """The router (experts, D) of a layer, with the gate of the shared MLP as a last row, if it has
    one.
    """
    assert spec.experts is not None
    scores = affine(weights, spec.experts.names.router, spec)
    gate = spec.experts.names.shared_gate
    if gate is None:
        return scores
    return Affine(torch.cat([scores.weight, weights.of(f"{gate}.weight")]), None)


def expert_inputs(weights: Weights, spec: ModelSpec) -> Iterator[Affine]:
    """Gate and up of each expert in turn, (inner, D) each; the shared MLP is split into experts."""
    experts = spec.experts
    assert experts is not None
    gate_rows = slice(experts.inner)
    up_rows = slice(experts.inner, None)
    if experts.names.by_inputs:  # they alternate
        gate_rows = slice(0, None, 2)
        up_rows = slice(1, None, 2)
    for both in _experts(weights, spec, "gate_up_proj"):
        yield both.mapped(lambda rows: rows[gate_rows])
        yield both.mapped(lambda rows: rows[up_rows])
    if experts.shared:
        wide = torch.cat([weights.of(f"{name}.weight") for name in experts.names.shared[:-1]])
        gates, ups = wide.chunk(2)
        for gate, up in zip(gates.chunk(experts.shared), ups.chunk(experts.shared), strict=True):
            yield Affine(gate, None)
            yield Affine(up, None)


def expert_outputs(weights: Weights, spec: ModelSpec) -> Iterator[Affine]:
    """The output projection (D, inner) of each expert."""
    experts = spec.experts
    assert experts is not None
    yield from _experts(weights, spec, "down_proj")
    if experts.shared:
        wide = weights.of(f"{experts.names.shared[-1]}.weight")
        for expert in wide.chunk(experts.shared, 1):
            yield Affine(expert, None)


def _experts(weights: Weights, spec: ModelSpec, name: str) -> Iterator[Affine]:
    """A projection of each expert, (out, in)."""
    assert spec.experts is not None
    name = spec.experts.names.prefix + name
    all_rows = weights.of(name)
    biases = weights.of(f"{name}_bias") if spec.mlp_bias else None
    for expert, rows in enumerate(all_rows):
        if spec.experts.names.by_inputs and not is_int4_bytes(rows):
            rows = rows.T
        yield Affine(rows, None if biases is None else biases[expert])


def sinks(weights: Weights, spec: ModelSpec) -> Tensor | None:
    """The attention sink's score for each query head (heads,)."""
    return weights.of(f"{spec.names.attention}sinks") if spec.architecture.sinks else None


def convolution(weights: Weights, spec: ModelSpec) -> Affine:
    """The filters (channels, kernel size) of a layer's convolution."""
    assert spec.recurrence is not None
    weight, bias = affine(weights, spec.recurrence.mixer.convolution, spec)
    return Affine(weight[:, 0], bias)


def layer_norms(weights: Weights, spec: ModelSpec, layer: int) -> list[Affine | None]:
    """The norms of `spec.norm_names`. Those of queries and keys have (head dim,) factors, or one
    for each of their outputs.
    """
    names = spec.norm_names(layer)
    norms = {name: norm_weights(weights, name, spec) for name in dict.fromkeys(filter(None, names))}
    return [None if name is None else norms[name] for name in names]


def norm_weights(weights: Weights, name: str, spec: ModelSpec) -> Affine:
    """A norm's factors. 1 + w is computed in fp32, because bf16 would round it again."""
    weight, bias = affine(weights, name, spec)
    if spec.architecture.norm.endswith("plus_one"):
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    if spec.architecture.norm == "layer_without_bias":
        bias = torch.zeros_like(weight)
    if bias is not None:
        bias = bias.to(weight.dtype)
    return Affine(weight, bias)


def affine(weights: Weights, name: str, spec: ModelSpec) -> Affine:
    weight = weights.of(f"{name}.weight")
    if spec.architecture.transposed and weight.dim() > 1:
        weight = weight.T.contiguous()
    return Affine(weight, weights.bias_of(name))


def activation_factors(weights: Weights, spec: ModelSpec) -> tuple[float, float]:
    """xIELU's factors of positive and of negative inputs (Huang and Schlag, 2024); else
    `spec.swiglu`, or zeros.
    """
    if spec.activation != "xielu":
        return spec.swiglu or (0.0, 0.0)
    above = weights.of(f"{spec.names.mlp}act_fn.alpha_p").float()
    below = weights.of(f"{spec.names.mlp}act_fn.alpha_n").float()
    return float(F.softplus(above)), float(F.softplus(below)) + 0.5


def head_weights(weights: Weights, spec: ModelSpec) -> Affine:
    return Affine(weights.of(spec.head_name), weights.bias_of("lm_head"))


def stacked(projections: Iterable[Affine]) -> Affine:
    """Projections of the same input as one. All or none have a bias."""
    first, *others = projections
    if not others:
        return first
    weight = torch.cat([plain(part.weight) for part in (first, *others)])
    biases = [part.bias for part in (first, *others) if part.bias is not None]
    return Affine(weight, torch.cat(biases) if biases else None)


class Int4(NamedTuple):
    """A weight in groups of inputs: level * scale + low. `scale` and `low` hold values of bf16, as
    the kernels have them.
    """

    levels: Tensor  # (out, in), uint8, 0..15
    scale: Tensor  # (out, groups), fp32
    low: Tensor  # (out, groups), fp32: the value of level 0

    @property
    def weight(self) -> Tensor:
        """(out, in), fp32."""
        groups = self.levels.view(*self.scale.shape, -1).float()
        return torch.addcmul(self.low[..., None], groups, self.scale[..., None]).flatten(1)


def named_int4(implementation: str, calibrated: bool) -> str:
    """The implementation as reports name it."""
    if calibrated:
        return implementation.replace("int4", "calibrated int4")
    return implementation


def is_int4_bytes(weight: Tensor) -> bool:
    """Whether a weight is rows of bytes."""
    return weight.dtype == torch.uint8


def inputs_of(weight: Tensor) -> int:
    """The width of the inputs of a weight (out, in), or of its rows of bytes."""
    if is_int4_bytes(weight):
        return weight.shape[1] // _BYTES * GROUP_SIZE
    return weight.shape[1]


def int4_bytes_shape(outputs: int, inputs: int) -> tuple[int, int]:
    """The shape of a weight (out, in) as rows of bytes."""
    return outputs, inputs // GROUP_SIZE * _BYTES


def int4_of(weight: Tensor) -> Int4:
    """Decodes rows of bytes, or rounds a weight to nearest levels between the least and the
    greatest of each group.
    """
    if is_int4_bytes(weight):
        packed, factors = torch.split(
            weight.view(len(weight), -1, _BYTES), [GROUP_SIZE // 2, 4], dim=-1
        )
        scale, low = factors.contiguous().view(torch.bfloat16).float().unbind(-1)
        levels = torch.cat([packed & 15, packed >> 4], dim=-1).view(len(weight), -1)
        return Int4(levels, scale.contiguous(), low.contiguous())
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / (LEVELS - 1)).clamp_min_(1e-12).bfloat16().float()
    low = low.bfloat16().float()
    levels = (
        ((groups - low[..., None]) / scale[..., None])
        .round_()
        .clamp_(0, LEVELS - 1)
        .to(torch.uint8)
    )
    return Int4(levels.view_as(weight), scale, low)


def int4_bytes(weight: Int4) -> Tensor:
    """Encodes a weight as rows of bytes."""
    outputs, groups = weight.scale.shape
    halves = weight.levels.view(outputs, groups, 2, GROUP_SIZE // 2)
    factors = torch.stack([weight.scale, weight.low], dim=-1).to(torch.bfloat16).view(torch.uint8)
    return torch.cat([halves[:, :, 0] | halves[:, :, 1] << 4, factors], dim=-1).view(outputs, -1)


def int8_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -127..127 (out, in) in int8, and scales (out,): an output's largest magnitude /
    127.
    """
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min_(1e-12).div_(127)
    return (wide / scale[:, None]).round_().to(torch.int8), scale
