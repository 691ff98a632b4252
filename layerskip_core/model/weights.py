"""A checkpoint's weights by name, and a layer's by their role. Each is taken when it is repacked, so that two copies of all
weights never exist. Only this module and spec.py know the names under which architectures store weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .low_bit import is_stored, stored_shape
from .spec import Block, ModelSpec, Shapes, check_shape

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


class Affine(NamedTuple):
    """A projection (out, in), or the factors (D,) of a norm; and what is added, if anything.

    A norm with a bias is a LayerNorm, one without an RMSNorm.
    """

    weight: Tensor
    bias: Tensor | None


# In the functions below `weights` are those of a layer. They raise CheckpointError as `Weights.of` does, and read only what
# they return, so that a layer's weights need not all be in memory at once.


def block_inputs(weights: Weights, spec: ModelSpec, block: Block) -> Iterator[Affine]:
    """Query, key and value, or gate and up, each read when it is its turn; up alone where the MLP is act(up)."""
    (*names, _), outputs = spec.projections[block]
    if len(names) == len(outputs):
        yield from (_affine(weights, block + name) for name in names)
        return
    fused = _affine(weights, block + names[0])  # they are stored one after the other
    biases = [None] * len(outputs) if fused.bias is None else torch.split(fused.bias, [*outputs])
    yield from map(Affine, torch.split(fused.weight, [*outputs]), biases)


def block_output(weights: Weights, spec: ModelSpec, block: Block) -> Affine:
    return _affine(weights, block + spec.projections[block][0][-1])


def layer_norms(weights: Weights, spec: ModelSpec) -> list[Affine | None]:
    """Before and after attention, before and after the MLP, of queries and of keys; None where there is none.

    The last two are over each head (head dim,), or over all heads together (queries,) and (keys,).
    """
    normed = spec.architecture.query_key_norms != "none"
    names = (*spec.architecture.norms, *(f"self_attn.{name}_norm" if normed else None for name in "qk"))
    return [None if name is None else norm_weights(weights, name, spec) for name in names]


def norm_weights(weights: Weights, name: str, spec: ModelSpec) -> Affine:
    """A norm's factors. Those that are stored as w for 1 + w are added up in fp32, because bf16 would round them again."""
    weight, bias = _affine(weights, name)
    if spec.architecture.norm == "rms_plus_one":
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return Affine(weight, bias)


def _affine(weights: Weights, name: str) -> Affine:
    bias = f"{name}.bias"
    return Affine(weights.of(f"{name}.weight"), weights.of(bias) if weights.prefix + bias in weights.shapes else None)


def stacked(projections: Iterable[Affine]) -> Affine:
    """Several projections of the same input as one. Either all or none of them have a bias."""
    weights, biases = zip(*projections, strict=True)
    if len(weights) == 1:
        return Affine(weights[0], biases[0])
    return Affine(torch.cat(weights), None if biases[0] is None else torch.cat(biases))
