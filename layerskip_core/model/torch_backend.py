"""`Backend` on repacked weights by PyTorch's kernels: faster than transformers' layers, on every
device.
"""

import os
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..config.model import EXACT_TOKENS, PackingConfig, Quantization
from ..errors import require_choice
from .cache import Places
from .eagle3 import Eagle3Weights
from .repacked import CHUNK, RepackedBackend, RepackedLayers, rows_at_once
from .row_cache import RowCache, SpanWriter
from .spec import ModelSpec
from .torch_eagle3 import PlacedEagle3
from .torch_layer import Masks, Rope, Step, TorchLayer, Workspace
from .torch_linear import KernelLinear, Linear, Norm, exact_rows, linear
from .vocabulary import DraftVocabulary
from .weights import Affine, Weights, head_weights

GRAPHS = "LAYERSKIP_CUDA_GRAPHS"  # environment variable: on or off, CUDA graphs of passes
_KEPT_ROWS = CHUNK // 2  # most rows of a call whose buffers are kept
_KEPT = 16  # shapes of calls whose buffers are kept
# Most tokens per row with attention as two matrix products; a prompt's mask would be large
_PRODUCT_TOKENS = 16


class TorchLayers(RepackedLayers):
    """Layers with hidden states in the precision of the weights."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Tensor,
        learned: Tensor | None,
        rope: Rope,
        layers: list[TorchLayer | None],
        exact: bool,
    ) -> None:
        """`exact`: calls are split to be batch-invariant, for one row."""
        super().__init__(spec, embedding, learned, layers, embedding.dtype)
        self._rope = rope
        self._masks = Masks(spec, embedding)
        self._exact: dict[int, int] | None = {} if exact else None  # see `exact_rows`
        self._workspace = partial(Workspace, spec, embedding)
        self._kept = lru_cache(_KEPT)(self._workspace)  # for the shapes that decoding repeats

    def row_bytes(self) -> int:
        spec = self.spec
        inner = spec.inner
        if spec.experts is not None:
            inner = max(inner, spec.experts.chosen * spec.experts.inner)
        return 4 * (2 * spec.query_width + 2 * spec.key_width + 3 * inner + 4 * spec.hidden)

    def new_cache(self, batch_size: int, max_positions: int) -> RowCache:
        return RowCache(
            (self.spec.layers, self.spec.kv_heads, self.spec.head_dim),
            batch_size,
            max_positions,
            self.embedding,
        )

    def run(
        self, hidden: Tensor, start: int, end: int, places: Places, only_kv: bool = False
    ) -> Tensor:
        layers = [layer for layer in self.layers[start:end] if layer is not None]
        assert len(layers) == end - start and isinstance(places.cache, RowCache)
        return places.in_grids(
            hidden, partial(self._in_parts, layers, start, only_kv, places.cache)
        )

    def _in_parts(
        self,
        layers: list[TorchLayer],
        start: int,
        only_kv: bool,
        cache: RowCache,
        hidden: Tensor,
        positions: Tensor,
        row: int | None,
    ) -> Tensor:
        """Runs a grid of tokens (B, T, D) in parts of few columns, to bound masks and
        activations.
        """
        batch, count = positions.shape
        most = max(1, min(CHUNK, rows_at_once(batch * count, self.row_bytes) // batch))
        if self._exact is not None and 1 < count <= EXACT_TOKENS:
            most = exact_rows(self._exact, self._same_alone)
        parts = zip(torch.split(hidden, most, 1), torch.split(positions, most, 1), strict=True)
        outputs = [
            self._grid(layers, start, only_kv, SpanWriter(cache, places, row), part, places)
            for part, places in parts
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _grid(
        self,
        layers: list[TorchLayer],
        start: int,
        only_kv: bool,
        writer: SpanWriter,
        hidden: Tensor,
        positions: Tensor,
    ) -> Tensor:
        # A CUDA graph, whose positions are on the device, has buffers of its own.
        keeps = positions.numel() <= _KEPT_ROWS and positions.device.type == "cpu"
        space = (self._kept if keeps else self._workspace)(*positions.shape)
        end = start + len(layers)
        slots = writer.layers(start, end)
        step = self._step(writer, positions, slots[0].values.shape[1])
        rows = hidden.reshape(space.rows, -1).clone()
        for layer, kind, held in zip(layers, self.spec.kinds[start:end], slots, strict=True):
            if only_kv:
                layer.write_kv(rows, step, held, space)
            else:
                layer.run_(rows, step, kind, held, space)
        return rows.view(hidden.shape)

    def _step(self, writer: SpanWriter, positions: Tensor, capacity: int) -> Step:
        on_device = positions.to(self.device, non_blocking=True)
        ropes = self._rope.at(writer, on_device)
        still = self._rope.still
        batch, count = positions.shape
        if self._exact is not None and batch == 1 and count <= EXACT_TOKENS:
            places = positions[0].tolist()
            windows = self._masks.windows
            spans = {
                kind: [(max(0, at + 1 - (window or at + 1)), at + 1) for at in places]
                for kind, window in windows.items()
            }
            return Step(ropes, still, dict.fromkeys(spans), spans, writer.end)
        by_products = count <= _PRODUCT_TOKENS and self.device.type == "cpu"
        keys = capacity if by_products else writer.end
        masks = self._masks.by_kind(writer, on_device, keys, by_products)
        return Step(ropes, still, masks, None, None if by_products else writer.end)

    def _same_alone(self, count: int) -> bool:
        """Whether the first layer's output for `count` random rows equals its outputs row by row;
        all layers are alike.
        """
        generator = torch.Generator(self.device).manual_seed(count)
        size = self.embedding.shape[1]
        hidden = torch.randn(1, 24 + count, size, generator=generator, device=self.device).to(
            self.dtype
        )
        cache = self.new_cache(1, 24 + count)
        layers = [layer for layer in self.layers[:1] if layer is not None]

        def run(start: int, end: int) -> Tensor:
            positions = torch.arange(start, end)[None]
            return self._grid(
                layers, 0, False, SpanWriter(cache, positions), hidden[:, start:end], positions
            )

        run(0, 24)
        together = run(24, 24 + count)
        alone = [run(at, at + 1) for at in range(24, 24 + count)]
        return torch.equal(together, torch.cat(alone, dim=1))


class TorchHead:
    """Norm and head."""

    def __init__(
        self, norm: Norm, linear: Linear, unfolded: Linear | None, spec: ModelSpec, exact: bool
    ) -> None:
        """`linear`: the head with the norm folded into it; `unfolded`: without, to follow other
        norms.
        """
        self._spec = spec
        self._norm = norm
        self.linear = linear
        self._unfolded = unfolded
        self._exact: dict[int, int] | None = {} if exact else None  # see `exact_rows`

    def with_norm(self, norm: Affine) -> "TorchHead":
        """The same matrix after another norm."""
        assert self._unfolded is not None
        unfolded = Norm(norm, self._spec.eps)
        return TorchHead(
            unfolded, self._unfolded, self._unfolded, self._spec, self._exact is not None
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N)."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size)
        if self._exact is not None and 1 < len(rows) <= EXACT_TOKENS:
            most = exact_rows(self._exact, lambda count: self._same_alone(rows, count))
            logits = torch.cat([self._logits(part) for part in torch.split(rows, most)])
        else:
            logits = self._logits(rows)
        return logits.view(*shape, logits.shape[-1])

    def _logits(self, rows: Tensor) -> Tensor:
        return self._spec.scaled_logits(self.linear(self._norm(rows)))

    def _same_alone(self, like: Tensor, count: int) -> bool:
        generator = torch.Generator(like.device).manual_seed(count)
        rows = torch.randn(count, like.shape[1], generator=generator, device=like.device).to(
            like.dtype
        )
        return torch.equal(self._logits(rows), torch.cat([self._logits(row[None]) for row in rows]))


class TorchBackend(RepackedBackend):
    """Repacked weights on PyTorch's kernels, for specs without a `missing_feature`."""

    def _prepare(self, packing: PackingConfig, weights: Weights) -> None:
        """Raises ConfigError if GRAPHS is neither on nor off."""
        graphs = os.environ.get(GRAPHS) or "on"
        require_choice(graphs, GRAPHS, ("on", "off"))
        self.exact = self.batch_invariant = packing.exact
        # Experts synchronise with the device
        records = graphs == "on" and not packing.exact and self.spec.experts is None
        self.recordable = self._embedding.device.type == "cuda" and records
        self._rope = Rope(self.spec, self._embedding)

    def _described(self, packing: PackingConfig) -> str:
        first = self._layers.layers[0]
        assert first is not None
        prepacked = any(
            isinstance(part, KernelLinear) for part in (self._head.linear, *first.linears)
        )
        kernels = f"packed ({packing.quantize or 'oneDNN'})" if prepacked else "packed"
        return kernels + packing.drafting + (", exact" if packing.exact else "")

    def _layer(
        self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool
    ) -> TorchLayer:
        return TorchLayer(weights, self._chain_spec, index, low_bits, exact)

    def _head_of(
        self,
        norm: Affine,
        weights: Weights,
        rows: DraftVocabulary | None,
        low_bits: Quantization | None,
        exact: bool,
    ) -> TorchHead:
        weight, bias = head_weights(weights, self.spec)
        if rows is not None:
            weight = rows.rows_of(weight)
            bias = None if bias is None else rows.rows_of(bias)
        folding = Norm(norm, self.spec.eps, low_bits is None and weight.dtype.itemsize >= 4)
        folded = folding.folded_into(weight)
        product = linear(folded, bias, low_bits, exact)
        unfolded = None
        if folded is weight:
            unfolded = product
        elif self._has_other_norms:
            unfolded = linear(weight, bias, low_bits, exact)
        return TorchHead(folding, product, unfolded, self.spec, exact)

    def _join(self, weights: Weights, low_bits: Quantization | None) -> Callable[[Tensor], Tensor]:
        return self._product(low_bits, weights.of("input.weight"))

    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> PlacedEagle3:
        product_of = partial(self._product, packing.quantize)
        return PlacedEagle3(stored, place, self.spec.vocab, self._embedding, product_of)

    def _product(self, low_bits: Quantization | None, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        product = linear(matrix.to(self._embedding), None, low_bits)
        return lambda states: product(states.flatten(0, -2)).view(*states.shape[:-1], -1)

    def _norm(self, weights: Affine) -> Norm:
        return Norm(weights, self.spec.eps)

    def _layers_of(self, layers: list[TorchLayer | None], exact: bool) -> TorchLayers:
        return TorchLayers(
            self._chain_spec, self._embedding, self._learned, self._rope, layers, exact
        )
