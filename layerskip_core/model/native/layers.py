"""A chain of layers and a head as the C kernels read them: a span of layers is one call."""

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..cache import KVCache
from ..rope import RopeTables
from ..spans import rows_at_once, run_in_parts, tokens_at_once
from ..spec import ModelSpec
from ..weights import (
    NormWeights,
    Projection,
    Weights,
    attention_inputs,
    attention_output,
    layer_norms,
    mlp_inputs,
    mlp_output,
    stacked,
)
from .compiled import ACTIVATIONS, CCall, CLayer, CNorm, CShape, Kernels
from .matrix import Matrices, MatrixForm, NativeMatrix

_KEPT_ROWS = 64  # calls of up to this many rows keep their buffers
_KEPT = 16  # row counts whose buffers are kept


class Buffers:
    """Those of a call over `rows` rows, and the call's structure with everything that stays the same."""

    def __init__(self, rows: int, threads: int, shape: CShape, norms_blocks: bool) -> None:
        self._shared = [torch.empty(rows, width) for width in _widths(shape, norms_blocks)]
        own = -(-(4 * (shape.hidden + 16) + rows * _formed_bytes(shape)) // 64) * 64  # a hidden state and all formed rows
        self._scratch = torch.empty(threads * own, dtype=torch.uint8)
        self.threads = threads
        self.call = CCall(rows=rows, rows_per_sequence=rows)
        self.call.qkv, self.call.mixed, self.call.inside, self.call.block = (part.data_ptr() for part in self._shared)
        self.call.scratch, self.call.scratch_bytes = self._scratch.data_ptr(), own
        self._logits = torch.empty(0)

    def logits(self, outputs: int) -> Tensor:
        """(rows, outputs), for a call whose caller does not see them."""
        if self._logits.shape[-1] != outputs:
            self._logits = torch.empty(self.call.rows, outputs)
        return self._logits

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self._shared, self._scratch))


class BufferPool:
    """The buffers of all calls of one model."""

    def __init__(self, shape: CShape, norms_blocks: bool) -> None:
        """`norms_blocks`: whether norms come after blocks."""
        self._shape, self._norms_blocks = shape, norms_blocks
        self._kept: dict[tuple[int, int], Buffers] = {}

    def of(self, rows: int) -> Buffers:
        """Those for this many rows and the threads of now. The next call with as many overwrites what is in them."""
        threads = torch.get_num_threads()
        buffers = self._kept.get((rows, threads))
        if buffers is None:
            buffers = Buffers(rows, threads, self._shape, self._norms_blocks)
            if rows <= _KEPT_ROWS:
                if len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[rows, threads] = buffers
        return buffers

    def row_bytes(self) -> int:
        """About what the activations of a row take."""
        shared = 4 * (sum(_widths(self._shape, self._norms_blocks)) + 2 * int(self._shape.hidden))
        return shared + torch.get_num_threads() * _formed_bytes(self._shape)


class NativeLayer:
    """A layer's weights and the C structure with their addresses."""

    def __init__(self, matrices: Matrices, weights: Weights, spec: ModelSpec, index: int, kind: str) -> None:
        """`weights` are those of the layer; of its matrices only those that `matrices` asks for are read."""
        architecture = spec.architecture
        biased, gates = spec.attention_bias, 1 + architecture.gated
        first, *_, last = architecture.attention_projections

        def matrix(name: str, form: MatrixForm, read: Callable[[], Iterable[Projection]]) -> NativeMatrix:
            return matrices.matrix(f"layers.{index}.{name}", form, read)

        self._matrices = [
            matrix(
                "qkv",
                MatrixForm(kind, spec.hidden, spec.queries + 2 * spec.keys, biased=first in biased),
                lambda: [stacked(attention_inputs(weights, spec))],
            ),
            matrix(
                "output",
                MatrixForm(kind, spec.queries, spec.hidden, biased=last in biased),
                lambda: [attention_output(weights, spec)],
            ),
            matrix("up", MatrixForm(kind, spec.hidden, spec.inner, gates, spec.mlp_bias), lambda: mlp_inputs(weights, spec)),
            matrix(
                "down", MatrixForm(kind, spec.inner, spec.hidden, biased=spec.mlp_bias), lambda: [mlp_output(weights, spec)]
            ),
        ]
        norms = layer_norms(weights, spec)
        around = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
        self._norms = [NativeNorm(norm) for norm in (*around, norms.query, norms.key)]
        rope = spec.rope_of[index]
        self.structure = CLayer(
            *(matrix.structure for matrix in self._matrices),
            *(norm.structure for norm in self._norms),
            -1 if rope is None else rope,
            spec.window_of(index) or 0,
        )


class NativeNorm:
    """A norm's weights in fp32, or none, and the C structure with their addresses."""

    def __init__(self, norm: NormWeights | None) -> None:
        stored = (None, None) if norm is None else (norm.weight, norm.bias)
        self._parts = [None if part is None else part.float().contiguous() for part in stored]
        self.structure = CNorm(*(None if part is None else part.data_ptr() for part in self._parts))


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
        """`layers`: None where this copy lacks one."""
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
        """As `run_layers`, in one part."""
        rows = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place
        self._call(self.kernels.span, rows, start, stop, positions, cache)
        return rows

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.write_kv`, in one part."""
        self._call(self.kernels.write, hidden.to(torch.float32).contiguous(), start, stop, positions, cache)

    def _call(
        self, kernel: Callable[..., None], rows: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache
    ) -> None:
        """A kernel over layers start..stop-1 and contiguous hidden states, which it knows by their address."""
        assert self.has(range(start, stop))
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
        assert layers >= stop and (kv_heads, head_dim, storage.dtype) == (shape.kv_heads, shape.head_dim, self.embedding.dtype)
        self._rope.grow(end)
        call = buffers.call
        call.positions = positions.data_ptr()
        for index, (cos, sin) in enumerate(zip(self._rope.cos, self._rope.sin, strict=True)):
            call.cos[index], call.sin[index] = cos.data_ptr(), sin.data_ptr()
        call.cache = storage.data_ptr() + start * storage.stride(0) * storage.element_size()
        call.row_slots, call.slots, call.places = cache.slots.data_ptr(), slots, places


class NativeProduct:
    """A matrix, after a norm if there is one."""

    def __init__(
        self, kernels: Kernels, shape: CShape, pool: BufferPool, norm: NormWeights | None, matrix: NativeMatrix
    ) -> None:
        self._kernels, self._shape, self._pool = kernels, shape, pool
        self.norm, self.matrix = NativeNorm(norm), matrix

    def with_norm(self, norm: NormWeights) -> "NativeProduct":
        """The same matrix after another norm."""
        return NativeProduct(self._kernels, self._shape, self._pool, norm, self.matrix)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs) in fp32."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size).to(torch.float32).contiguous()
        count = len(rows)
        outputs = torch.empty(count, self.matrix.outputs)
        most = rows_at_once(count, self._pool.row_bytes)
        if count <= most:
            self._score(rows, outputs)
        else:
            for part, out in zip(torch.split(rows, most), torch.split(outputs, most), strict=True):
                self._score(part, out)
        return outputs.view(*shape, self.matrix.outputs)

    def _score(self, rows: Tensor, out: Tensor) -> None:
        buffers = self._pool.of(len(rows))
        buffers.call.hidden = rows.data_ptr()
        self._kernels.score(
            self._shape, self.norm.structure, self.matrix.structure, buffers.call, out.data_ptr(), buffers.threads
        )


class NativeHead:
    """Final norm and head (N, D)."""

    def __init__(self, product: NativeProduct, spec: ModelSpec) -> None:
        self.product, self._spec = product, spec
        self.logits_scale, self.logits_cap = 1 / spec.logits_divisor, spec.logits_cap or 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the logits are the product itself: rounding in a scale or a cap could make two of them equal."""
        return self.logits_scale == 1 and not self.logits_cap

    def with_norm(self, norm: NormWeights) -> "NativeHead":
        """The same matrix after another norm."""
        return NativeHead(self.product.with_norm(norm), self._spec)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N) in fp32."""
        return self._spec.scaled_logits(self.product(hidden))


def shape_of(spec: ModelSpec, dtype: torch.dtype) -> CShape:
    """The sizes that the kernels need, of a model with weights in `dtype`, which is that of its cache."""
    architecture = spec.architecture
    return CShape(
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rotary=spec.rotary,
        inner=spec.inner,
        bf16_cache=dtype == torch.bfloat16,
        activation=ACTIVATIONS.index(spec.activation),
        gated=architecture.gated,
        norms_projections=architecture.query_key_norms == "projection",
        eps=spec.eps,
        attention_scale=spec.attention_scale,
        score_cap=spec.score_cap or 0.0,
        embedding_scale=float(torch.tensor(spec.embedding_scale).to(dtype)),  # as transformers rounds it
        residual_scale=spec.residual_scale,
    )


def _widths(shape: CShape, norms_blocks: bool) -> tuple[int, int, int, int]:
    """Of the rows that threads share: queries with keys and values, mixed values, the inside of the MLP, a block's output."""
    mixed = shape.heads * shape.head_dim
    return mixed + 2 * shape.kv_heads * shape.head_dim, mixed, shape.inner, shape.hidden if norms_blocks else 0


def _formed_bytes(shape: CShape) -> int:
    """At most what a row takes in the form that the kernel of a matrix reads."""
    return 4 * int(max(2 * shape.hidden, shape.heads * shape.head_dim, shape.inner)) + 64  # a block's map reads two states
