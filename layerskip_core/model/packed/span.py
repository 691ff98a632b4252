"""A chain of layers on repacked weights, by torch's kernels."""

import torch
from torch import Tensor

from ...config.packing import EXACT_TOKENS
from ..cache import KVCache, SpanWriter
from ..rope import Rope
from ..spec import ModelSpec
from ..splitting import CHUNK, run_in_parts, tokens_at_once
from .exact import ExactRows
from .layer import PackedLayer, Step, Workspace
from .linear import Linear
from .masks import Masks

_KEPT_ROWS = CHUNK // 2  # calls of up to this many rows keep their buffers
_KEPT = 16  # shapes of calls whose buffers are kept
_PRODUCT_TOKENS = 16  # up to this many tokens per row attention is two matrix products; a prompt's mask would be large


class PackedLayers:
    """`Layers` of a model whose hidden states have the precision of its weights. Not for two threads at once."""

    def __init__(self, spec: ModelSpec, embedding: Tensor, rope: Rope, layers: list[PackedLayer | None], exact: bool) -> None:
        """`exact`: calls are split so that a token of a single row has the same bits alone as among others.

        `layers`: None is the place of none; the first is a layer.
        """
        self.num_layers, self.max_positions = len(layers), spec.context
        self.device, self.dtype = embedding.device, embedding.dtype
        self.layers = layers
        self._spec, self._embedding, self._rope = spec, embedding, rope
        self._kinds = spec.kinds
        self._embedding_scale = float(torch.tensor(spec.embedding_scale).to(embedding.dtype))  # as transformers rounds it
        self._masks = Masks(spec, embedding)
        self._exact = ExactRows() if exact else None
        self._spaces: dict[tuple[int, int], Workspace] = {}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Those of the first layer."""
        return self._span(0, 1)[0].linears

    def embed(self, ids: Tensor) -> Tensor:
        hidden = torch.embedding(self._embedding, ids)
        return hidden if self._embedding_scale == 1 else hidden * self._embedding_scale

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self, hidden, start, stop, positions, cache)

    def tokens_at_once(self, batch: int, count: int) -> int:
        """How many of each row's `count` tokens run at once."""
        if self._exact is not None and 1 < count <= EXACT_TOKENS:
            return self._exact.at_once(self._same_alone)
        return tokens_at_once(batch, count, self._row_bytes)

    def run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        """As `run_layers`, on checked arguments and in one part."""
        batch, count, size = hidden.shape
        writer = cache.writer(positions)
        space = self._workspace(batch, count, cache)
        slots = writer.layers(start, stop, self._spec.kv_heads, self._spec.head_dim, hidden)
        step = self._step(writer, positions, slots[0].values.shape[1])
        rows = hidden.reshape(batch * count, size).clone()
        for layer, kind, held in zip(self._span(start, stop), self._kinds[start:stop], slots, strict=True):
            layer.run_(rows, step, kind, held, space)
        return rows.view(batch, count, size)

    def write(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.propagate`, on checked arguments and in one part."""
        batch, count, size = hidden.shape
        writer = cache.writer(positions)
        space = self._workspace(batch, count, cache)
        slots = writer.layers(start, stop, self._spec.kv_heads, self._spec.head_dim, hidden)
        step = self._step(writer, positions, slots[0].values.shape[1])
        for layer, held in zip(self._span(start, stop), slots, strict=True):
            layer.write(hidden.reshape(batch * count, size), step, held, space)

    def _span(self, start: int, stop: int) -> list[PackedLayer]:
        layers = [layer for layer in self.layers[start:stop] if layer is not None]
        if len(layers) < stop - start:
            raise ValueError(f"layers {start}..{stop} are not all here")
        return layers

    def _step(self, writer: SpanWriter, positions: Tensor, capacity: int) -> Step:
        on_device = positions.to(self.device, non_blocking=True)
        ropes, still = self._rope.at(writer, on_device), self._rope.still
        batch, count = positions.shape
        if self._exact is not None and batch == 1 and count <= EXACT_TOKENS:
            spans = self._masks.spans(positions[0].tolist())
            return Step(ropes, still, dict.fromkeys(spans), spans, writer.stop)
        by_products = count <= _PRODUCT_TOKENS and self.device.type == "cpu"
        keys = capacity if by_products else writer.stop
        masks = self._masks.by_kind(writer, on_device, keys, by_products)
        return Step(ropes, still, masks, None, None if by_products else writer.stop)

    def _workspace(self, batch: int, count: int, cache: KVCache) -> Workspace:
        """Kept for the shapes that decoding repeats, not for prompts. A pass that is recorded has its own."""
        space = None if cache.is_recorded else self._spaces.get((batch, count))
        if space is None:
            space = Workspace(batch, count, self._span(0, 1)[0], self._embedding)
            if batch * count <= _KEPT_ROWS and not cache.is_recorded:
                if len(self._spaces) >= _KEPT:
                    self._spaces.pop(next(iter(self._spaces)))
                self._spaces[batch, count] = space
        return space

    def _same_alone(self, count: int) -> bool:
        """Whether a layer gives `count` random rows what it gives each alone. All layers have the same shapes."""
        generator = torch.Generator(self.device).manual_seed(count)
        size = self._embedding.shape[1]
        hidden = torch.randn(1, 24 + count, size, generator=generator, device=self.device).to(self.dtype)
        positions = torch.arange(24 + count)[None]
        cache = KVCache(self.num_layers, 1, 24 + count)
        self.run(hidden[:, :24], 0, 1, positions[:, :24], cache)
        together = self.run(hidden[:, 24:], 0, 1, positions[:, 24:], cache)
        alone = [self.run(hidden[:, [at]], 0, 1, positions[:, [at]], cache) for at in range(24, 24 + count)]
        return torch.equal(together, torch.cat(alone, dim=1))

    def _row_bytes(self) -> int:
        """About what the activations of a token take in a layer."""
        spec = self._spec
        return 4 * (2 * spec.queries + 2 * spec.keys + 3 * spec.inner + 4 * spec.hidden)
