"""A layer's weights by role: only this module and spec.py know the names under which architectures store them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import ModelSpec
from .weights import Weights


@dataclass(frozen=True)
class Projection:
    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)


@dataclass(frozen=True)
class NormWeights:
    """RMSNorm, or LayerNorm where there is a bias. In fp32 where the factors are not stored as they are, see `norm_weights`."""

    weight: Tensor  # (D,), the factors
    bias: Tensor | None


@dataclass(frozen=True)
class LayerNorms:
    before_attention: NormWeights | None
    after_attention: NormWeights | None
    before_mlp: NormWeights | None
    after_mlp: NormWeights | None
    query: NormWeights | None  # (head dim,), or (queries,) and (keys,) where the norms are over projections
    key: NormWeights | None


# In the functions below `weights` are those below a layer's prefix. They raise CheckpointError as `Weights.of` does, and read
# only what they return, so that a layer's weights need not all be in memory at once.


def attention_inputs(weights: Weights, spec: ModelSpec) -> list[Projection]:
    """Query, key and value."""
    *inward, _ = spec.architecture.attention_projections
    return list(_split(weights.below("self_attn."), inward, (spec.queries, spec.keys, spec.keys)))


def attention_output(weights: Weights, spec: ModelSpec) -> Projection:
    return _projection(weights.below("self_attn."), spec.architecture.attention_projections[-1])


def mlp_inputs(weights: Weights, spec: ModelSpec) -> Iterator[Projection]:
    """Gate and up, each read when it is its turn; up alone where the MLP is act(up)."""
    *inward, _ = spec.architecture.mlp_projections
    return _split(weights.below("mlp."), inward, (spec.inner,) * (1 + spec.architecture.gated))


def mlp_output(weights: Weights, spec: ModelSpec) -> Projection:
    return _projection(weights.below("mlp."), spec.architecture.mlp_projections[-1])


def layer_norms(weights: Weights, spec: ModelSpec) -> LayerNorms:
    architecture, attention = spec.architecture, weights.below("self_attn.")
    around = [_optional_norm(weights, name, spec) for name in (*architecture.attention_norms, *architecture.mlp_norms)]
    normed = architecture.query_key_norms != "none"
    return LayerNorms(*around, *(_optional_norm(attention, name if normed else None, spec) for name in ("q_norm", "k_norm")))


def norm_weights(weights: Weights, name: str, spec: ModelSpec) -> NormWeights:
    """A norm's factors. Those that are stored as w for 1 + w are added up in fp32, because bf16 would round them again."""
    weight = weights.of(f"{name}.weight")
    if spec.architecture.norm == "rms_plus_one":
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return NormWeights(weight, weights.get(f"{name}.bias"))


def _optional_norm(weights: Weights, name: str | None, spec: ModelSpec) -> NormWeights | None:
    return None if name is None else norm_weights(weights, name, spec)


def _projection(weights: Weights, name: str) -> Projection:
    return Projection(weights.of(f"{name}.weight"), weights.get(f"{name}.bias"))


def _split(weights: Weights, names: list[str], outputs: tuple[int, ...]) -> Iterator[Projection]:
    """Projections with these outputs, of as many names or of one name under which they are stored one after the other."""
    if len(names) == len(outputs):
        yield from (_projection(weights, name) for name in names)
        return
    fused = _projection(weights, *names)
    parts = torch.split(fused.weight, [*outputs])
    biases = [None] * len(outputs) if fused.bias is None else torch.split(fused.bias, [*outputs])
    yield from (Projection(weight, bias) for weight, bias in zip(parts, biases, strict=True))


def stacked(projections: list[Projection]) -> Projection:
    """Several projections of the same input as one. Either all or none of them have a bias."""
    if len(projections) == 1:
        return projections[0]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return Projection(torch.cat([projection.weight for projection in projections]), torch.cat(biases) if biases else None)
