"""PackedBackend by the C kernels, where they were built and the CPU has what they need."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...config.packing import PackingConfig, Quantization
from ..cache import KVCache
from ..packed.model import PackedBackend, can_pack
from ..quantized import GROUP_SIZE
from ..spec import ModelSpec
from ..weights import Weights
from .compiled import CCall, CDraft, CLayer, CShape, Kernels, kernels
from .layer import NativeLayer
from .matrix import NativeMatrix

_LARGEST_HEAD = 256
_KEPT_ROWS = 64  # calls of up to so many rows keep their buffers
_KEPT = 16  # of so many row counts


def can_run_native(config: Any, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether there are kernels here for every part of this architecture in this precision."""
    if not suits_kernels(config, dtype, device, packing):
        return False
    found = kernels()
    return found is not None and found.has_threads


def suits_kernels(config: Any, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether the kernels, where there are any, know this architecture, its widths and this precision."""
    if not can_pack(config) or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    spec = ModelSpec.of(config)
    low_bit = packing is not None and (packing.quantize or packing.draft_weights) is not None
    divisor = GROUP_SIZE if low_bit else 2
    return spec.head_dim <= _LARGEST_HEAD and not any(width % divisor for width in (spec.hidden, spec.inner, spec.queries))


class NativeBackend(PackedBackend):
    """The same operations; hidden states are fp32 whatever the weights are. Always exact, see `PackingConfig.exact`."""

    _layers: list[NativeLayer]  # type: ignore[assignment]
    _head: NativeMatrix  # type: ignore[assignment]
    _norm: Tensor  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.exact = False  # nothing has to be done for it
        found = kernels()
        assert found is not None
        spec, half = self.spec, int(self.dtype == torch.bfloat16)
        shape = CShape(spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.inner, half, spec.eps, spec.head_dim**-0.5)
        for model in (self, self.draft):
            if isinstance(model, NativeBackend):
                model._ready(found, shape)

    def _ready(self, found: Kernels, shape: CShape) -> None:
        self._kernels, self._shape = found, shape
        self._array = (CLayer * self.num_layers)(*(layer.structure for layer in self._layers))
        self._calls: dict[tuple[int, int], _Buffers] = {}
        self._cos = self._sin = torch.empty(0, 1)

    @property
    def implementation(self) -> str:
        kinds = ", ".join(filter(None, (self._kernels.variant, self._quantize)))
        return f"native ({kinds})" + (f", {self._draft_weights} drafts" if self._draft_weights else "")

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids).float()

    def _pack_layer(self, weights: Weights, index: int, quantization: Quantization | None, exact: bool) -> NativeLayer:  # type: ignore[override]
        return NativeLayer(weights, self.spec, index, quantization)

    def _pack_head(  # type: ignore[override]
        self, norm: Tensor, weight: Tensor, quantization: Quantization | None, exact: bool
    ) -> tuple[Tensor, NativeMatrix]:
        return norm.float(), NativeMatrix([weight], None, quantization)

    def _row_bytes(self) -> int:
        own = 4 * (sum(_widths(self._shape)) + 2 * self.hidden_size)
        return own + torch.get_num_threads() * _formed_bytes(self._shape)

    def _run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        batch, count, size = hidden.shape
        buffers = self._buffers(batch * count)
        places = positions.contiguous()
        self._place(buffers, cache, cache.writer(positions).stop, places, start, stop)
        buffers.call.rows_per_sequence = count
        rows = hidden.reshape(-1, size).to(torch.float32, copy=True)
        buffers.call.hidden = rows.data_ptr()
        first = ctypes.addressof(self._array) + start * ctypes.sizeof(CLayer)
        self._kernels.span(self._shape, first, stop - start, buffers.call, buffers.threads)
        return rows.view(batch, count, size)

    def draft_greedily(
        self, token: int, layers: int, positions: Tensor, cache: KVCache, ends: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """A draft in one call: `token`, which stands at the first of `positions` (1, d), and what is most probable after it by
        the first `layers` layers, until one of `ends` or d drafts.

        Returns the tokens (1, K+1) and their hidden states (1, K+1, D). Needs a place behind the positions for the last state.
        """
        if not (0 <= token < self.vocab_size and 0 <= layers <= self.num_layers and len(cache.lengths) == 1):
            raise ValueError(f"no draft of token {token} by {layers} layers in a cache of {len(cache.lengths)} rows")
        most = positions.shape[1]
        places = torch.arange(int(positions[0, 0]), int(positions[0, 0]) + most + 1)
        buffers = self._buffers(1)
        self._place(buffers, cache, cache.writer(places[None]).stop, places, 0, layers)
        buffers.call.rows_per_sequence = 1
        tokens = torch.empty(1, most + 1, dtype=torch.long)
        tokens[0, 0] = token
        states = torch.empty(1, most + 1, self.hidden_size)
        logits = torch.empty(self._head.outputs)
        vocabulary = None if self.vocabulary is None else self.vocabulary.ids
        end_ids = (ctypes.c_int64 * len(ends))(*ends)
        draft = CDraft(
            self._embedding.data_ptr(),
            None if vocabulary is None else vocabulary.data_ptr(),
            ctypes.addressof(end_ids),
            len(ends),
            most,
            *(tensor.data_ptr() for tensor in (tokens, states, logits)),
        )
        self._kernels.draft(
            *(self._shape, ctypes.addressof(self._array), layers, self._norm.data_ptr(), self._head.structure),
            *(buffers.call, draft, buffers.threads),
        )
        count = draft.drafted + 1
        return tokens[:, :count], states[:, :count]

    def _place(self, buffers: "_Buffers", cache: KVCache, end: int, positions: Tensor, start: int, stop: int) -> None:
        """Where the call's rows stand, before position `end`, and where the keys and values of layers start..stop-1 are."""
        shape = self._shape
        held = cache.room(end, shape.kv_heads, shape.head_dim, self._embedding)
        layers, _, sequences, kv_heads, places, head_dim = held.shape
        if layers < stop or (kv_heads, head_dim, held.dtype) != (shape.kv_heads, shape.head_dim, self._embedding.dtype):
            raise ValueError("the cache is that of another model")
        self._grow_rope(end)
        buffers.fit(places)
        call = buffers.call
        call.positions = positions.data_ptr()
        call.cos, call.sin = self._cos.data_ptr(), self._sin.data_ptr()
        call.cache = held.data_ptr() + start * held.stride(0) * held.element_size()
        call.sequences, call.places = sequences, places

    def _logits(self, rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32).contiguous()
        logits = torch.empty(len(rows), self._head.outputs)
        most = self._rows_in_memory(len(rows))
        for part, out in zip(torch.split(rows, most), torch.split(logits, most), strict=True):
            buffers = self._buffers(len(part))
            buffers.call.hidden = part.data_ptr()
            self._kernels.score(
                self._shape, self._norm.data_ptr(), self._head.structure, buffers.call, out.data_ptr(), buffers.threads
            )
        return logits

    def _grow_rope(self, stop: int) -> None:
        if len(self._cos) < stop:
            angles = self._rope.angles(2 * stop)
            self._cos, self._sin = angles.real.float().contiguous(), angles.imag.float().contiguous()

    def _buffers(self, rows: int) -> "_Buffers":
        threads = torch.get_num_threads()
        found = self._calls.get((rows, threads))
        if found is None:
            found = _Buffers(rows, threads, self._shape)
            if rows <= _KEPT_ROWS:
                if len(self._calls) >= _KEPT:
                    self._calls.pop(next(iter(self._calls)))
                self._calls[rows, threads] = found
        return found


class _Buffers:
    """What the threads of a call over so many rows write to, and the call's structure with all that does not change."""

    def __init__(self, rows: int, threads: int, shape: CShape) -> None:
        self._held = [torch.empty(rows, width) for width in _widths(shape)]
        self._formed = rows * _formed_bytes(shape)
        self._row = 0  # numbers that a thread has place for beside its formed rows: a row, or the scores of a query
        self.threads = threads
        self.call = CCall(rows=rows, rows_per_sequence=rows)
        self.call.qkv, self.call.mixed, self.call.inside = (held.data_ptr() for held in self._held)
        self.fit(shape.hidden)

    def fit(self, places: int) -> None:
        """Makes room for the scores of a query over so many places of the cache."""
        if places <= self._row:
            return
        self._row = places
        own = -(-(4 * (places + 16) + self._formed) // 64) * 64
        self._scratch = torch.empty(self.threads * own, dtype=torch.uint8)
        self.call.scratch, self.call.scratch_bytes = self._scratch.data_ptr(), own


def _widths(shape: CShape) -> tuple[int, int, int]:
    """Of the rows that threads share: queries with keys and values, mixed values, and the MLP's inside."""
    mixed = shape.heads * shape.head_dim
    return mixed + 2 * shape.kv_heads * shape.head_dim, mixed, shape.inner


def _formed_bytes(shape: CShape) -> int:
    """At most what a row takes in the form that a matrix's kernel wants."""
    return 4 * int(max(shape.hidden, shape.heads * shape.head_dim, shape.inner)) + 64
