"""A layer's weights by role: only this module and spec.py know the names under which architectures store them."""

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
class LayerWeights:
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    gate: Projection | None  # None: the MLP is act(up)
    up: Projection
    down: Projection
    before_attention: NormWeights | None
    after_attention: NormWeights | None
    before_mlp: NormWeights | None
    after_mlp: NormWeights | None
    query_norm: NormWeights | None  # (head dim,), or (queries,) and (keys,) where the norms are over projections
    key_norm: NormWeights | None


def layer_weights(weights: Weights, spec: ModelSpec) -> LayerWeights:
    """The weights of one layer; `weights` are those below its prefix. Raises CheckpointError as `Weights.of` does."""
    architecture = spec.architecture
    attention, mlp = weights.below("self_attn."), weights.below("mlp.")
    *inward, output = architecture.attention_projections
    query, key, value = _split(attention, inward, (spec.queries, spec.keys, spec.keys))
    *inward, down = architecture.mlp_projections
    gated = _split(mlp, inward, (spec.inner,) * (1 + architecture.gated))
    before_attention, after_attention = (_optional_norm(weights, name, spec) for name in architecture.attention_norms)
    before_mlp, after_mlp = (_optional_norm(weights, name, spec) for name in architecture.mlp_norms)
    normed = architecture.query_key_norms != "none"
    return LayerWeights(
        query=query,
        key=key,
        value=value,
        output=_projection(attention, output),
        gate=gated[0] if architecture.gated else None,
        up=gated[-1],
        down=_projection(mlp, down),
        before_attention=before_attention,
        after_attention=after_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        query_norm=norm_weights(attention, "q_norm", spec) if normed else None,
        key_norm=norm_weights(attention, "k_norm", spec) if normed else None,
    )


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


def _split(weights: Weights, names: list[str], outputs: tuple[int, ...]) -> list[Projection]:
    """Projections with these outputs, of as many names or of one name under which they are stored one after the other."""
    if len(names) == len(outputs):
        return [_projection(weights, name) for name in names]
    fused = _projection(weights, *names)
    parts = torch.split(fused.weight, [*outputs])
    biases = [None] * len(outputs) if fused.bias is None else torch.split(fused.bias, [*outputs])
    return [Projection(weight, bias) for weight, bias in zip(parts, biases, strict=True)]


def stacked(projections: list[Projection]) -> Projection:
    """Several projections of the same input as one. Either all or none of them have a bias."""
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return Projection(torch.cat([projection.weight for projection in projections]), torch.cat(biases) if biases else None)
