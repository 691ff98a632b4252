"""What decoding needs of a model."""

from typing import Protocol

import torch
from torch import Tensor

from .cache import KVCache


class Backend(Protocol):
    """What decoding needs of a model: the operations of `GenericBackend`, whichever implementation runs."""

    @property
    def num_layers(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache: ...

    def embed(self, ids: Tensor) -> Tensor: ...

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor: ...

    def unembed(self, hidden: Tensor) -> Tensor: ...
