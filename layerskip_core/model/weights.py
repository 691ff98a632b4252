"""Weights: by name in a checkpoint, by role in a layer, and in 8 and 4 bits.

A weight is taken when it is repacked, so the model is never in memory twice. Only this module and
spec.py know the names of weights in checkpoints.

int4 weights have 16 levels per group of inputs. They are rounded from a weight, or stored by a
calibration as rows of bytes: a byte tensor in place of the weight until a kernel packs it. Its rows
can be reordered, joined and padded like those of a weight; a row of zero bytes is a row of zeros.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from typing import Any, NamedTuple

import torch
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


def check_model(model: nn.Module, spec: ModelSpec | None) -> None:
    """Raises CheckpointError for a weight that is not finite or, by `spec`, missing or of another
    shape.
    """
    named = named_weights(model).items()
    weights = {name: weight for name, weight in named if weight.dtype.itemsize > 1}  # not quantised
    if spec is not None:
        spec.check_weights({name: tuple(weight.shape) for name, weight in weights.items()})
    for name, weight in weights.items():
        check_finite(name, weight)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, and buffers that checkpoints store with them (Gemma 4's factors of
    layers).
    """
    stored = model.state_dict().keys()
    buffers = (
        (name, buffer) for name, buffer in model.named_buffers() if buffer.dim() and name in stored
    )
    return {name: weight.detach() for name, weight in (*model.named_parameters(), *buffers)}


@torch.no_grad()
def copy_into(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrites the weights that have `values`, in place."""
    for name, value in values.items():
        weights[name].copy_(value)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Gives a transformers model's weights the precision in which transformers loads them for
    `dtype`.

    That is `dtype` but for weights that the model's code creates in fp32 or keeps in fp32.
    Quantised weights with their scales keep their precision, and so do buffers that are not stored,
    such as rotary frequencies.
    """
    with torch.device("meta"):
        plain = type(model)._from_config(deepcopy(model.config), dtype=dtype)
    created = {name: weight.dtype for name, weight in plain.state_dict().items()}
    kept = _kept_in_fp32(model, dtype)
    for name, weight in model.state_dict(keep_vars=True).items():
        is_quantised = weight.dtype.itemsize == 1
        if name in created and not is_quantised:
            weight.data = weight.data.to(torch.float32 if kept(name) else created[name])


def block_weights(
    model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights of blocks (copies of the model's layers) in `dtype`, on the CPU. Some stay in
    fp32, as in the model.
    """
    kept = _kept_in_fp32(model, dtype)
    return {
        name: weight.to("cpu", torch.float32 if kept(name) else dtype)
        for name, weight in weights.items()
    }


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers loads the weight of a name in fp32 though the model is loaded in
    `dtype`.
    """
    # transformers searches names for these patterns in the same way
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


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


# The functions below get the `weights` of a layer, read only those that they return, and raise as
# `Weights.of` does.


def sublayer_inputs(weights: Weights, spec: ModelSpec, sublayer: Sublayer) -> Iterator[Affine]:
    """The inward projections of a sublayer, read one after the other: query, key, value (and gate of
    the query); gate and up, or up alone in an ungated MLP.
    """
    (*names, _), outputs, *_ = spec.projections(sublayer)
    parts: Iterable[Affine]
    if len(names) == len(outputs):
        parts = (affine(weights, name, spec) for name in names)
    else:
        fused = affine(weights, names[0], spec)
        parts = starmap(
            Affine, zip(*(_split(part, spec, sublayer, outputs) for part in fused), strict=True)
        )
    gates = []
    for index, part in enumerate(parts):
        if sublayer == "attention" and index == 0 and spec.architecture.gates_attention:
            part, *gates = _with_gates(part, spec)
        yield _halved(part, spec) if sublayer == "attention" and index < 2 else part
    yield from gates


def _with_gates(part: Affine, spec: ModelSpec) -> list[Affine]:
    """Splits queries from their gates, which alternate by head in the stored weight."""

    def halves(rows: Tensor) -> Iterator[Tensor]:
        yield from (
            half.flatten(0, 1)
            for half in rows.view(spec.heads, 2, spec.head_dim, *rows.shape[1:]).unbind(1)
        )

    biases = (None, None) if part.bias is None else halves(part.bias)
    return list(map(Affine, halves(part.weight), biases))


def by_key_head(rows: Tensor, spec: ModelSpec, *sizes: int) -> list[Tensor]:
    """Splits a recurrence's fused projections, which store `sizes` rows of each for one key head
    after the other.
    """
    assert spec.recurrence is not None
    parts = torch.split(rows.view(spec.recurrence.key_heads, -1, *rows.shape[1:]), [*sizes], 1)
    return [part.flatten(0, 1) for part in parts]


def _split(
    fused: Tensor | None, spec: ModelSpec, sublayer: Sublayer, outputs: tuple[int, ...]
) -> Iterable[Tensor | None]:
    """Splits fused projections into (outputs, ...) each."""
    mixer = spec.architecture.mixer
    sizes = spec.recurrence
    if fused is None:
        return (None,) * len(outputs)
    if sublayer == "mixer" and mixer is not None and mixer.by_head and sizes is not None:
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

    return Affine(moved(part.weight), None if part.bias is None else moved(part.bias))


def sublayer_output(weights: Weights, spec: ModelSpec, sublayer: Sublayer) -> Affine:
    return affine(weights, spec.projections(sublayer).names[-1], spec)


def router(weights: Weights, spec: ModelSpec) -> Affine:
    """The router (experts, D) of a layer, with the gate of the shared MLP as a last row, if it has
    one.
    """
    assert spec.architecture.experts is not None
    scores = affine(weights, spec.architecture.experts.router, spec)
    gate = spec.architecture.experts.shared_gate
    if gate is None:
        return scores
    return Affine(torch.cat([scores.weight, weights.of(f"{gate}.weight")]), None)


def expert_inputs(weights: Weights, spec: ModelSpec) -> Iterator[Affine]:
    """Gate and up of each expert in turn, (inner, D) each; the shared MLP is split into experts."""
    assert spec.architecture.experts is not None and spec.experts is not None
    inner = spec.experts.inner
    in_turns = spec.architecture.experts.by_inputs
    halves = [
        slice(half, None, 2) if in_turns else slice(half * inner, (half + 1) * inner)
        for half in range(2)
    ]
    for rows, bias in _experts(weights, spec, "gate_up_proj"):
        yield from (Affine(rows[half], None if bias is None else bias[half]) for half in halves)
    if spec.experts.shared:
        wide = torch.cat(
            [weights.of(f"{name}.weight") for name in spec.architecture.experts.shared[:-1]]
        )
        for pair in zip(*(part.chunk(spec.experts.shared) for part in wide.chunk(2)), strict=True):
            yield from (Affine(part, None) for part in pair)


def expert_outputs(weights: Weights, spec: ModelSpec) -> Iterator[Affine]:
    """The output projection (D, inner) of each expert."""
    assert spec.architecture.experts is not None and spec.experts is not None
    yield from _experts(weights, spec, "down_proj")
    if spec.experts.shared:
        wide = weights.of(f"{spec.architecture.experts.shared[-1]}.weight")
        yield from (Affine(expert, None) for expert in wide.chunk(spec.experts.shared, 1))


def _experts(weights: Weights, spec: ModelSpec, name: str) -> Iterator[Affine]:
    """A projection of each expert, (out, in)."""
    assert spec.architecture.experts is not None
    name = spec.architecture.experts.prefix + name
    all_rows = weights.of(name)
    biases = weights.of(f"{name}_bias") if spec.mlp_bias else None
    for expert, rows in enumerate(all_rows):
        turned = spec.architecture.experts.by_inputs and not is_int4_bytes(rows)
        yield Affine(rows.T if turned else rows, None if biases is None else biases[expert])


def sinks(weights: Weights, spec: ModelSpec) -> Tensor | None:
    """The attention sink's score for each query head (heads,)."""
    return weights.of(f"{spec.names.attention}sinks") if spec.architecture.sinks else None


def convolution(weights: Weights, spec: ModelSpec) -> Affine:
    """The filters (channels, kernel size) of a layer's convolution."""
    assert spec.architecture.mixer is not None
    weight, bias = affine(weights, spec.architecture.mixer.convolution, spec)
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
    return Affine(weight, None if bias is None else bias.to(weight.dtype))


def affine(weights: Weights, name: str, spec: ModelSpec) -> Affine:
    weight = weights.of(f"{name}.weight")
    bias = f"{name}.bias"
    if spec.architecture.transposed and weight.dim() > 1:
        weight = weight.T.contiguous()
    return Affine(weight, weights.of(bias) if weights.prefix + bias in weights.shapes else None)


def activation_factors(weights: Weights, spec: ModelSpec) -> tuple[float, float]:
    """xIELU's factors of positive and of negative inputs (Huang and Schlag, 2024); else
    `spec.swiglu`, or zeros.
    """
    if spec.activation != "xielu":
        return spec.swiglu or (0.0, 0.0)
    above, below = (
        float(nn.functional.softplus(weights.of(f"{spec.names.mlp}act_fn.alpha_{part}").float()))
        for part in "pn"
    )
    return above, below + 0.5


def head_weights(weights: Weights, spec: ModelSpec) -> Affine:
    bias = "lm_head.bias"
    return Affine(weights.of(spec.head_name), weights.of(bias) if bias in weights.shapes else None)


def joined(projections: Iterable[Affine], panel: int) -> list[Affine]:
    """Projections of the same input unchanged, if all but the last fill panels; else stacked."""
    parts = list(projections)
    return [stacked(parts)] if any(len(part.weight) % panel for part in parts[:-1]) else parts


def stacked(projections: Iterable[Affine]) -> Affine:
    """Projections of the same input as one. All or none have a bias."""
    weights, biases = zip(*projections, strict=True)
    if len(weights) == 1:
        return Affine(weights[0], biases[0])
    bias = None if biases[0] is None else torch.cat(biases)
    return Affine(torch.cat([*map(plain, weights)]), bias)


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
    return implementation.replace("int4", "calibrated int4") if calibrated else implementation


def is_int4_bytes(weight: Tensor) -> bool:
    """Whether a weight is rows of bytes."""
    return weight.dtype == torch.uint8


def inputs_of(weight: Tensor) -> int:
    """The width of the inputs of a weight (out, in), or of its rows of bytes."""
    return weight.shape[1] // _BYTES * GROUP_SIZE if is_int4_bytes(weight) else weight.shape[1]


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
