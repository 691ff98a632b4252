"""A checkpoint's weights by name. Each is taken when it is repacked, so that two copies of all weights never exist."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .int4 import is_stored, stored_shape
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


def check_finite(name: str, weight: Tensor) -> None:
    """Raises CheckpointError for a weight with NaN or infinity, which would make every output meaningless."""
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # in bf16 far faster than a sum
        what = "NaN" if bool(weight.isnan().any()) else "infinity"
        raise CheckpointError(f"the weight {name} holds {what}: it is damaged, or its training diverged")
