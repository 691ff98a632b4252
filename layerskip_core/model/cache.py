"""A KV cache addressed by position: rejecting drafted tokens moves a length back and copies nothing."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

_BLOCK = 128  # positions are added in blocks, so that a long answer reallocates seldom


class DepthCache:
    """Keys and values of all L layers for B rows, written at the positions of the tokens they belong to.

    A key's index is its token's position. So a query at position p may see exactly the indices 0..p, and whatever stands
    behind them (rejected drafts, padding) is neither read nor needs to be cleared. `lengths` (B,), on the host, counts the
    committed positions of each row; the decoding loop moves it.
    """

    def __init__(self, num_layers: int, batch_size: int, max_positions: int) -> None:
        """`max_positions` is the context limit: a token beyond it is refused."""
        self.max_positions = max_positions
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self._keys: list[Tensor | None] = [None] * num_layers  # each (B, kv heads, capacity, head dim)
        self._values: list[Tensor | None] = [None] * num_layers

    def rollback(self, lengths: Tensor) -> None:
        """Forgets every position at or after `lengths` (B,)."""
        if bool((lengths > self.lengths).any()):
            raise ValueError(f"cannot roll forward from {self.lengths.tolist()} to {lengths.tolist()}")
        self.lengths = lengths.clone()

    def writer(self, positions: Tensor) -> "SpanWriter":
        """What a span of layers writes its keys and values through, for tokens at `positions` (B, T), on the host."""
        return SpanWriter(self, positions)

    def store(self, keys: Tensor, values: Tensor, layer: int, slots: "SpanWriter") -> tuple[Tensor, Tensor]:
        """Writes (B, kv heads, T, head dim) of one layer; returns views of its filled part, (B, kv heads, S, head dim)."""
        held_keys, held_values = self._room(layer, keys, values, slots.stop)
        if slots.contiguous:
            held_keys[:, :, slots.start : slots.stop] = keys
            held_values[:, :, slots.start : slots.stop] = values
        else:
            rows, columns = slots.indices(keys.device)
            held_keys[rows, :, columns] = keys.transpose(1, 2)
            held_values[rows, :, columns] = values.transpose(1, 2)
        return held_keys[:, :, : slots.stop], held_values[:, :, : slots.stop]

    def _room(self, layer: int, keys: Tensor, values: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        held_keys, held_values = self._keys[layer], self._values[layer]
        if held_keys is None or held_values is None or held_keys.shape[2] < stop:
            capacity = min(self.max_positions, -(-stop // _BLOCK) * _BLOCK)
            self._keys[layer] = held_keys = _grown(held_keys, keys, capacity)
            self._values[layer] = held_values = _grown(held_values, values, capacity)
        return held_keys, held_values


class SpanWriter:
    """Where the tokens of one call go. Looks like a transformers cache to an attention module: `update` is all it calls."""

    def __init__(self, cache: DepthCache, positions: Tensor) -> None:
        self._cache = cache
        self._positions = positions
        self.start, self.stop = int(positions[0, 0]), int(positions.max()) + 1
        if self.stop > cache.max_positions:
            raise ConfigError(
                f"the context limit of {cache.max_positions} tokens is reached: position {self.stop - 1} was asked for"
            )
        # Rows that stand at the same, consecutive positions (always so for one row) are written as one slice.
        span = torch.arange(self.start, self.start + positions.shape[1])
        self.contiguous = bool((positions == span).all())

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.store(keys, values, layer_idx, self)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column index, (B, 1) and (B, T), of every token."""
        rows = torch.arange(self._positions.shape[0], device=device)[:, None]
        return rows, self._positions.to(device, non_blocking=True)


def _grown(held: Tensor | None, like: Tensor, capacity: int) -> Tensor:
    batch, heads, _, head_dim = like.shape
    grown = like.new_zeros(batch, heads, capacity, head_dim)
    if held is not None:
        grown[:, :, : held.shape[2]] = held
    return grown
