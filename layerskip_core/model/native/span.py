"""A chain of layers by the C kernels: a span is one call."""

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..cache import KVCache
from ..rope import RopeTables
from ..spec import ModelSpec
from ..splitting import run_in_parts, tokens_at_once
from .buffers import BufferPool, Buffers
from .compiled import CLayer, CShape, Kernels
from .layer import NativeLayer


class NativeLayers:
    """`Layers` with fp32 hidden states for weights in any precision. Not for two threads at once."""

    def __init__(
        self,
        kernels: Kernels,
        shape: CShape,
        pool: BufferPool,
        spec: ModelSpec,
        embedding: Tensor,
        rope: RopeTables,
        layers: list[NativeLayer | None],
    ) -> None:
        """`layers`: None is the place of none."""
        self.num_layers, self.max_positions = len(layers), spec.context
        self.device, self.embedding = embedding.device, embedding
        self.kernels, self.shape, self.pool = kernels, shape, pool
        self._rope, self._layers = rope, layers
        self._array = (CLayer * len(layers))(*(CLayer() if layer is None else layer.structure for layer in layers))

    def embed(self, ids: Tensor) -> Tensor:
        hidden = torch.embedding(self.embedding, ids).float()
        return hidden if self.shape.embedding_scale == 1 else hidden.mul_(self.shape.embedding_scale)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self, hidden, start, stop, positions, cache)

    def tokens_at_once(self, batch: int, count: int) -> int:
        """How many of each row's `count` tokens run at once."""
        return tokens_at_once(batch, count, self.pool.row_bytes)

    def run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        """As `run_layers`, on checked arguments and in one part."""
        rows = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place
        self._call(self.kernels.span, rows, start, stop, positions, cache)
        return rows

    def write(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.propagate`, on checked arguments and in one part."""
        self._call(self.kernels.write, hidden.to(torch.float32).contiguous(), start, stop, positions, cache)

    def _call(
        self, kernel: Callable[..., None], rows: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache
    ) -> None:
        """A kernel over layers start..stop-1 and contiguous hidden states, which it knows by their address."""
        if not self.has(range(start, stop)):
            raise ValueError(f"layers {start}..{stop} are not all here")
        batch, count, _ = rows.shape
        buffers, places = self.pool.of(batch * count), positions.contiguous()
        self.place(buffers, cache, cache.writer(positions).stop, places, start, stop)
        buffers.call.rows_per_sequence = count
        buffers.call.hidden = rows.data_ptr()
        kernel(self.shape, self.address(start), stop - start, buffers.call, buffers.threads)

    def has(self, layers: Iterable[int]) -> bool:
        """Whether these places all have a layer."""
        return all(0 <= layer < self.num_layers and self._layers[layer] is not None for layer in layers)

    def address(self, layer: int) -> int:
        """The address of a layer's structure; those of the next layers follow it."""
        return ctypes.addressof(self._array) + layer * ctypes.sizeof(CLayer)

    def place(self, buffers: Buffers, cache: KVCache, end: int, positions: Tensor, start: int, stop: int) -> None:
        """Sets where the call's rows stand, all before position `end`, and where layers start..stop-1 keep keys and values."""
        shape = self.shape
        storage = cache.scattered(end, shape.kv_heads, shape.head_dim, self.embedding)
        layers, _, slots, kv_heads, places, head_dim = storage.shape
        if layers < stop or (kv_heads, head_dim, storage.dtype) != (shape.kv_heads, shape.head_dim, self.embedding.dtype):
            raise ValueError("the cache is that of another model")
        self._rope.grow(end)
        call = buffers.call
        call.positions = positions.data_ptr()
        for index, (cos, sin) in enumerate(zip(self._rope.cos, self._rope.sin, strict=True)):
            call.cos[index], call.sin[index] = cos.data_ptr(), sin.data_ptr()
        call.cache = storage.data_ptr() + start * storage.stride(0) * storage.element_size()
        call.row_slots, call.slots, call.places = cache.slots.data_ptr(), slots, places
