"""A KV cache addressed by position: rejecting drafted tokens moves a length back and copies nothing."""

from typing import Any, NamedTuple

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
        self._num_layers = num_layers
        self._storage: Tensor | None = None  # (L, B, 2 for key and value, kv heads, capacity, head dim)

    def rollback(self, lengths: Tensor) -> None:
        """Forgets every position at or after `lengths` (B,)."""
        if bool((lengths > self.lengths).any()):
            raise ValueError(f"cannot roll forward from {self.lengths.tolist()} to {lengths.tolist()}")
        self.lengths = lengths.clone()

    def writer(self, positions: Tensor) -> "SpanWriter":
        """What a span of layers writes its keys and values through, for tokens at `positions` (B, T), on the host."""
        return SpanWriter(self, positions)

    def room(self, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        """All layers' keys and values, (L, B, 2, kv heads, capacity >= stop, head dim): views of it are the cache.

        The keys of a head lie one behind the other, for attention over a long text takes the time of reading them.
        """
        held = self._storage
        if held is None or held.shape[4] < stop:
            capacity = min(self.max_positions, -(-stop // _BLOCK) * _BLOCK)
            grown = like.new_zeros(self._num_layers, len(self.lengths), 2, kv_heads, capacity, head_dim)
            if held is not None:
                grown[:, :, :, :, : held.shape[4]] = held
            self._storage = held = grown
        return held


class SpanWriter:
    """Where the tokens of one call go. Looks like a transformers cache to an attention module: `update` is all it calls."""

    def __init__(self, cache: DepthCache, positions: Tensor) -> None:
        self._cache = cache
        self._positions = positions
        rows: list[list[int]] = positions.tolist()
        self.start, self.stop = rows[0][0], max(map(max, rows)) + 1
        if self.stop > cache.max_positions:
            raise ConfigError(
                f"the context limit of {cache.max_positions} tokens is reached: position {self.stop - 1} was asked for"
            )
        # Rows that stand at the same, consecutive positions (always so for one row) are written as one slice.
        span = list(range(self.start, self.start + positions.shape[1]))
        self.contiguous = all(row == span for row in rows)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, kv heads, T, head dim) of one layer; returns views of its filled part, (B, kv heads, S, head dim)."""
        held = self._cache.room(self.stop, keys.shape[1], keys.shape[3], keys)[layer_idx]
        for place, new in enumerate((keys, values)):
            if self.contiguous:
                held[:, place, :, self.start : self.stop] = new
            else:
                rows, columns = self.indices(keys.device)
                held[rows, place, :, columns] = new.transpose(1, 2)
        filled = held[:, :, :, : self.stop]
        return filled[:, 0], filled[:, 1]

    def layers(self, start: int, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> list["LayerSlots"]:
        """Where each layer of a span writes and reads, made at once: one view a layer and token would be slower."""
        held = self._cache.room(self.stop, kv_heads, head_dim, like)[start:stop]
        filled = held[..., : self.stop, :]  # (layers, B, 2, kv heads, S, head dim)
        keys, values = filled[:, :, 0].unbind(), filled[:, :, 1].unbind()
        if self.contiguous:
            slots, indices = held[..., self.start : self.stop, :].unbind(), None
        else:
            slots, indices = held.unbind(), self.indices(like.device)
        return [LayerSlots(*views, indices) for views in zip(keys, values, slots, strict=True)]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column index, (B, 1) and (B, T), of every token."""
        rows = torch.arange(self._positions.shape[0], device=device)[:, None]
        return rows, self._positions.to(device, non_blocking=True)


class LayerSlots(NamedTuple):
    """One layer's part of the cache in one call."""

    keys: Tensor  # (B, kv heads, S, head dim), to be read after `write`
    values: Tensor
    slots: Tensor  # (B, 2, kv heads, T, head dim), or the whole layer where `indices` say which tokens of it are meant
    indices: tuple[Tensor, Tensor] | None

    def write(self, new: Tensor) -> None:
        """Keys and values (B, 2, kv heads, T, head dim) of the call's tokens."""
        if self.indices is None:
            self.slots.copy_(new)
        else:
            rows, columns = self.indices
            self.slots[rows, :, :, columns] = new.permute(0, 3, 1, 2, 4).to(self.slots.dtype)
