"""What decoding needs of a model."""

from typing import Protocol

import torch
from torch import Tensor

from .cache import DepthCache


class SpanModel(Protocol):
    """What decoding needs of a model: the operations of `DepthModel`, whichever implementation runs."""

    @property
    def num_layers(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> DepthCache: ...

    def embed(self, ids: Tensor) -> Tensor: ...

    def run_layers(
        self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: DepthCache | None = None
    ) -> Tensor: ...

    def unembed(self, hidden: Tensor) -> Tensor: ...
