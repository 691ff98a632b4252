"""A checkpoint's weights by name, and a layer's by their role. Each is taken when it is repacked, so that two copies of all
weights never exist. Only this module and spec.py know the names under which architectures store weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .low_bit import is_stored, stored_shape
from .spec import ModelSpec, Shapes, check_shape

Take = Callable[[str], Tensor | None]  # the weight of a name, or None


@dataclass(frozen=True)
class Weights:
    """Weights by name after a prefix. `shapes` are those that the architecture has; others in a checkpoint are ignored."""

    take: Take  # `checked`
    shapes: Shapes
    prefix: str = ""

    def below(self, prefix: str) -> "Weights":
        return Weights(self.take, self.shapes, self.prefix + prefix)

    def remembered(self, prefix: str) -> "Weights":
        """As `below`, for weights used twice: they are read and checked once, and stay in memory as long as this object."""
        return Weights(cache(self.take), self.shapes, self.prefix + prefix)

    def after(self, first: Take) -> "Weights":
        """With the weights that `first` has in the place of those of the same name."""

        def take(name: str) -> Tensor | None:
            weight = first(name)
            return self.take(name) if weight is None else weight

        return Weights(take, self.shapes, self.prefix)

    def get(self, name: str) -> Tensor | None:
        """None if the architecture has no such weight. Raises CheckpointError as `of` does."""
        return self.of(name) if self.prefix + name in self.shapes else None

    def of(self, name: str) -> Tensor:
        """Raises CheckpointError if the weight is missing, and as `checked` does."""
        full = self.prefix + name
        weight = self.take(full)
        if weight is None:
            raise CheckpointError(f"the weight {full} is missing")
        return weight


def checked(take: Take, shapes: Shapes) -> Take:
    """`take`, raising CheckpointError for a weight that has another shape than `shapes` says, or is not finite."""

    def checked_take(name: str) -> Tensor | None:
        weight = take(name)
        if weight is not None and is_stored(weight):
            check_shape(name, stored_shape(*shapes[name]), tuple(weight.shape))
        elif weight is not None:
            check_shape(name, shapes[name], tuple(weight.shape))
            check_finite(name, weight)
        return weight

    return checked_take


def check_model(model: nn.Module, spec: ModelSpec) -> None:
    """Raises CheckpointError if a weight of a transformers model is missing, has another shape or is not finite."""
    weights = dict(model.named_parameters())
    spec.check_weights({name: tuple(weight.shape) for name, weight in weights.items()})
    for name, weight in weights.items():
        check_finite(name, weight.detach())


def taken_from(model: nn.Module) -> Take:
    """The weights of a transformers model, which loses them and can no longer run."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    return lambda name: weights.pop(name, None)


def check_finite(name: str, weight: Tensor) -> None:
    """Raises CheckpointError for a weight with NaN or infinity, which would make every output meaningless."""
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # in bf16 far faster than a sum
        what = "NaN" if bool(weight.isnan().any()) else "infinity"
        raise CheckpointError(f"the weight {name} holds {what}: it is damaged, or its training diverged")


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


# In the functions below `weights` are those of a layer. They raise CheckpointError as `Weights.of` does, and read only what
# they return, so that a layer's weights need not all be in memory at once.


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
    around = [_optional_norm(weights, name, spec) for name in architecture.norms]
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
