"""A chain of layers for the C kernels, which run a span in one call."""

import ctypes
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cache import Places
from ..configuration import ExpertsSpec
from ..pages import PAGE, PagedCache, PagePool
from ..repacked import RepackedLayers, rows_at_once
from ..rope import cosines_and_sines
from ..spec import ModelSpec
from ..weights import (
    Affine,
    Weights,
    activation_factors,
    affine,
    block_inputs,
    block_output,
    expert_inputs,
    expert_outputs,
    joined,
    layer_norms,
    norm_weights,
    router,
    sinks,
)
from .compiled import ACTIVATIONS, CCall, CLayer, CNorm, CShape, CTokenInputs, Kernels
from .matrix import PANEL, MatrixForm, NativeMatrix, PackMatrix
from .recurrence import NativeRecurrence

KEPT_ROWS = 64  # most rows of a call whose buffers are kept
_KEPT = 16  # row counts whose buffers are kept
_ROWS_OF_ONE_READ = 32  # AMX decodes weights for these without keeping them


Ropes = Callable[[int], list[tuple[Tensor, Tensor]]]
"""Cosines and sines in fp32 of positions 0..n-1, each (n, rotary / 2), by rotary embedding."""


class Engine:
    """The kernels with a model's sizes and the buffers of its calls."""

    def __init__(
        self, kernels: Kernels, spec: ModelSpec, dtype: torch.dtype, ropes: Ropes | None = None
    ) -> None:
        """`dtype`: of the embedding and the cache. `ropes`: None for those of `spec`."""
        self.kernels = kernels
        self.shape = _shape_of(spec, dtype)
        sizes = {size.head_dim: spec.of_layer(layer) for layer, size in enumerate(spec.sizes)}
        self.layer_shapes = {
            head_dim: _shape_of(of_layer, dtype) for head_dim, of_layer in sizes.items()
        }
        # A block's output needs a buffer of its own only where a norm follows it
        block_output = spec.hidden if any(spec.architecture.norms[1::2]) else 0
        chosen, expert = (spec.experts.choices, spec.experts.inner) if spec.experts else (0, 0)
        inner = max([spec.inner, *(size.inner for size in spec.sizes)])
        steps = 0
        inside = max(inner, chosen * expert)
        mixed = max([spec.queries, *(of_layer.queries for of_layer in sizes.values())])
        read = max(
            sum(of_layer.projections("attention").widths)
            for of_layer in (spec, *map(spec.of_layer, range(spec.layers)))
        )
        if (recurrence := spec.recurrence) is not None:
            read = max(read, sum(recurrence.widths))
            mixed = max(mixed, recurrence.outputs)
            steps = 2 * recurrence.heads if recurrence.key_heads else 0  # steps and decays
        slices = spec.layers * spec.token_width if spec.token_inputs else 0
        # Of a row in each of the buffers that all layers share
        self.widths = (read, mixed, inside, block_output, steps, slices)
        self.formed_bytes = 0  # of the largest row in the layout that kernels read
        # MTP and EAGLE-3 read two states
        self.make_room(max(2 * spec.hidden, mixed, inner, expert))
        self._kept = lru_cache(_KEPT)(Buffers)
        self._experts = spec.experts
        self._rope_length = 0
        self._ropes: Ropes = ropes or (lambda count: cosines_and_sines(spec, count, torch.empty(0)))
        self._rope: list[tuple[Tensor, Tensor]] = []

    def make_room(self, inputs: int) -> None:
        """Makes buffers large enough for rows of this many inputs."""
        self.formed_bytes = max(self.formed_bytes, 4 * inputs + 64)

    def rope(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines in fp32 of positions 0..end-1 or more."""
        if self._rope_length < end:
            self._rope_length = 2 * end
            self._rope = self._ropes(self._rope_length)
        return self._rope

    def buffers(self, rows: int) -> "Buffers":
        """Buffers for this many rows and the current threads; the next call of that size may reuse
        them.
        """
        make = self._kept if rows <= KEPT_ROWS else Buffers
        return make(
            rows,
            torch.get_num_threads(),
            self.widths,
            self.shape.hidden,
            self.formed_bytes,
            self._experts,
        )

    def row_bytes(self) -> int:
        """Approximate bytes of a row's activations."""
        states = 2 + int(self.shape.chosen)  # its own, and the outputs of experts
        return (
            4 * (sum(self.widths) + states * int(self.shape.hidden))
            + torch.get_num_threads() * self.formed_bytes
        )


def _shape_of(spec: ModelSpec, dtype: torch.dtype) -> CShape:
    """`dtype`: of the embedding and the cache."""
    return CShape(
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rotary=spec.rotary,
        inner=spec.inner,
        bf16_cache=dtype == torch.bfloat16,
        activation=ACTIVATIONS[spec.activation],
        gated=spec.architecture.gated,
        norms_projections=spec.architecture.query_key_norms == "projection",
        experts=spec.experts.count if spec.experts else 0,
        chosen=spec.experts.choices if spec.experts else 0,
        normalised=spec.experts is not None and spec.experts.normalised,
        shared=spec.experts.shared if spec.experts else 0,
        gates_shared=spec.experts is not None and spec.experts.gates_shared,
        norms_rotated=spec.architecture.norms_rotated,
        parallel=spec.parallel,
        gates_attention=spec.architecture.gates_attention,
        eps=spec.eps,
        attention_scale=spec.attention_scale,
        score_cap=spec.score_cap or 0.0,
        # As transformers rounds it
        embedding_scale=float(torch.tensor(spec.embedding_scale).to(dtype)),
        residual_scale=spec.residual_scale,
    )


class Buffers:
    """The buffers of a call over `rows` rows, and its structure with all constant fields."""

    def __init__(
        self,
        rows: int,
        threads: int,
        widths: tuple[int, ...],
        hidden: int,
        formed_bytes: int,
        experts: ExpertsSpec | None,
    ) -> None:
        self._shared = [torch.empty(rows, width) for width in widths]
        # A hidden state, and all rows as kernels read them; many read two decoded panels again
        kept = PANEL if rows > _ROWS_OF_ONE_READ else 0
        own = -(-(4 * (hidden + 16) + (rows + kept) * formed_bytes) // 64) * 64
        self._scratch = torch.empty(threads * own, dtype=torch.uint8)
        self.threads = threads
        self.call = CCall(rows=rows)
        for name, part in zip(
            ("qkv", "mixed", "inside", "block", "steps", "slices"), self._shared, strict=True
        ):
            setattr(self.call, name, part.data_ptr())
        if experts is not None:
            choices = rows * experts.choices
            most = experts.count + experts.shared + 1
            sizes = dict.fromkeys(("choice_slots", "chosen", "slot_rows"), choices) | {
                "experts": most,
                "first_slots": most,
            }
            self._routing = {
                name: torch.empty(size, dtype=torch.int32)
                for name, size in (sizes | {"used": 1}).items()
            }
            sizes = {
                "logits": rows * (experts.count + experts.gates_shared),
                "weights": choices,
                "products": choices * hidden,
            }
            self._routing |= {name: torch.empty(size) for name, size in sizes.items()}
            for name, part in self._routing.items():
                setattr(self.call, name, part.data_ptr())
        self.call.scratch = self._scratch.data_ptr()
        self.call.scratch_bytes = own
        self._logits = torch.empty(0)
        self.read: tuple[Any, ...] = ()  # keeps arrays alive that the next call reads

    def logits(self, outputs: int) -> Tensor:
        """(rows, outputs), for calls that return tokens only."""
        if self._logits.shape[-1] != outputs:
            self._logits = torch.empty(self.call.rows, outputs)
        return self._logits


def keys_at(spec: ModelSpec, layer: int) -> int:
    """The offset of a layer's keys in a page."""
    return sum(2 * PAGE * spec.of_layer(before).keys for before in spec.attending if before < layer)


class NativeNorm:
    """A norm's weights in fp32, or none, and the C structure with their addresses."""

    def __init__(self, norm: Affine | None) -> None:
        self._parts = [
            None if part is None else part.float().contiguous() for part in norm or (None, None)
        ]
        self.structure = CNorm(*(None if part is None else part.data_ptr() for part in self._parts))


class NativeLayer:
    """A layer's weights and the C structure with their addresses."""

    def __init__(
        self,
        pack: PackMatrix,
        weights: Weights,
        spec: ModelSpec,
        index: int,
        kind: str,
        feature_norm: Affine | None = None,
    ) -> None:
        """`weights`: of this layer; `pack` decides which matrices are read.

        `feature_norm`: for EntryLayers: this norm is of features, the layer's first norm of
        embeddings.
        """
        spec, inputs = spec.of_layer(index), spec.token_inputs
        source = index if spec.source is None else spec.source
        rope = spec.rope_of[index]
        matrices = _layer_matrices(pack, weights, spec, index, kind, feature_norm is not None)
        norms = dict(zip(_NORMS, layer_norms(weights, spec, index), strict=True))
        if feature_norm is not None:
            norms |= {"embedding": norms["before_attention"], "before_attention": feature_norm}
        if spec.architecture.norms_values:
            norms["value"] = Affine(torch.ones(spec.head_dim), None)
        if inputs is not None:
            norms["after_token"] = norm_weights(weights, inputs.after, spec)
        others = dict[str, Tensor | None]()
        if spec.experts_of(index) is not None:
            others["router"], others["router_bias"] = router(weights, spec)
        self._recurrence = None
        if (first := spec.blocks_of(index)[0]) == "mixer":
            self._recurrence = NativeRecurrence(weights, spec, index)
        elif first == "attention":
            others["sinks"] = sinks(weights, spec)
        self.matrices = list(matrices.values())
        self._norms = {name: NativeNorm(norm) for name, norm in norms.items()}
        self._others = {
            name: part.float().contiguous() for name, part in others.items() if part is not None
        }
        recurrence, steps = (None, None) if self._recurrence is None else self._recurrence.addresses
        self.structure = CLayer(
            **{name: matrix.structure for name, matrix in matrices.items()},
            **{name: norm.structure for name, norm in self._norms.items()},
            **{name: part.data_ptr() for name, part in self._others.items()},
            rope=-1 if rope is None else rope,
            window=spec.window_of(spec.kinds[index]) or 0,
            bends=(ctypes.c_float * 2)(*activation_factors(weights, spec)),
            keys=keys_at(spec, source),
            shares=spec.source is not None,
            slice=index,
            scale=1.0,
            recurrence=recurrence,
            steps=steps,
        )  # NativeLayers sets the shape


# In the order of `layer_norms`
_NORMS = "before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key"


def _layer_matrices(
    pack: PackMatrix, weights: Weights, spec: ModelSpec, index: int, kind: str, reads_feature: bool
) -> dict[str, NativeMatrix]:
    """A layer's matrices by their names in CLayer. `spec`: that of the layer."""
    matrices = dict[str, NativeMatrix]()
    blocks = spec.blocks_of(index)
    biased = spec.mlp_bias

    def add(name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]) -> None:
        matrices[name] = pack(f"layers.{index}.{name}", form, read)

    if (first := blocks[0]) != "mlp":
        _, widths, mixed, (qkv_bias, output_bias) = spec.projections(first)
        qkv = MatrixForm(kind, spec.hidden * (1 + reads_feature), sum(widths), biased=qkv_bias)
        add("qkv", qkv, lambda: joined(block_inputs(weights, spec, first), PANEL))
        output = MatrixForm(kind, mixed, spec.hidden, biased=output_bias)
        add("output", output, lambda: [block_output(weights, spec, first)])
    if "mlp" in blocks:
        experts = spec.experts_of(index)
        inner, count = (
            (experts.inner, experts.count + experts.shared) if experts else (spec.inner, 1)
        )
        up = MatrixForm(kind, spec.hidden, inner, 1 + spec.architecture.gated, biased, count)
        down = MatrixForm(kind, inner, spec.hidden, biased=biased, experts=count)
        add(
            "up",
            up,
            lambda: expert_inputs(weights, spec) if experts else block_inputs(weights, spec, "mlp"),
        )
        add(
            "down",
            down,
            lambda: (
                expert_outputs(weights, spec) if experts else [block_output(weights, spec, "mlp")]
            ),
        )
    if (inputs := spec.token_inputs) is not None:
        gate = MatrixForm(kind, spec.hidden, spec.token_width)
        add("token_gate", gate, lambda: [affine(weights, inputs.gate, spec)])
        output = MatrixForm(kind, spec.token_width, spec.hidden)
        add("token_output", output, lambda: [affine(weights, inputs.output, spec)])
    return matrices


class NativeTokenInputs:
    """The weights of Gemma 4's token inputs, and the C structure with their addresses."""

    def __init__(
        self,
        pack: PackMatrix,
        weights: Weights,
        spec: ModelSpec,
        table: Tensor,
        embedding: Tensor,
        kind: str,
    ) -> None:
        names = spec.token_inputs
        width = spec.token_width
        assert names is not None
        form = MatrixForm(kind, spec.hidden, spec.layers * width)
        self._matrix = pack(
            "token_model", form, lambda: [Affine(weights.of(names.projection), None)]
        )
        factors = norm_weights(weights, names.norm, spec)
        half = 0.5**0.5
        self._norm = NativeNorm(Affine(factors.weight.float() * half, None))
        self._tensors = (table, embedding)
        self.structure = CTokenInputs(
            model=self._matrix.structure,
            norm=self._norm.structure,
            embedding=embedding.data_ptr(),
            table=table.data_ptr(),
            width=width,
            bf16_table=table.dtype == torch.bfloat16,
            eps=spec.eps * spec.hidden,  # transformers divides the product by sqrt(hidden)
            table_scale=half * float(torch.tensor(width**0.5).to(embedding.dtype)),
        )


class NativeLayers(RepackedLayers):
    """Layers with fp32 hidden states for weights in any precision."""

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        embedding: Tensor,
        learned: Tensor | None,
        layers: list[NativeLayer | None],
        pool: PagePool,
        inputs: NativeTokenInputs | None = None,
    ) -> None:
        """`inputs`: with these, hidden states are (..., D + 1) and carry the token id."""
        super().__init__(spec, embedding, learned, layers, torch.float32)
        self.engine = engine
        self._pool = pool
        self.inputs = inputs
        self._there = {index for index, layer in enumerate(layers) if layer is not None}
        self._array = (CLayer * len(layers))(
            *(CLayer() if layer is None else layer.structure for layer in layers)
        )
        for structure, size in zip(self._array, spec.sizes, strict=False):
            structure.shape = ctypes.addressof(engine.layer_shapes[size.head_dim])

    def row_bytes(self) -> int:
        return self.engine.row_bytes()

    def new_cache(self, batch_size: int, max_positions: int) -> PagedCache:
        return PagedCache(self._pool, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self.carrying(super().embed(ids), ids)

    def carrying(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Appends token ids (...) to hidden states (..., D) if layers read them."""
        if self.inputs is None:
            return hidden
        return torch.cat((hidden, ids[..., None].to(hidden.dtype)), dim=-1)

    def run(
        self, hidden: Tensor, start: int, end: int, places: Places, only_kv: bool = False
    ) -> Tensor:
        assert self.has(range(start, end))
        if self.inputs is None:
            return self.called(self.numbers(hidden), start, end, places, only_kv)
        tokens = hidden[:, self.spec.hidden :].flatten().long()
        return self.carrying(
            self.called(self.numbers(hidden), start, end, places, only_kv, tokens=tokens), tokens
        )

    def numbers(self, hidden: Tensor) -> Tensor:
        """A copy of hidden states without token ids (N, D), to be changed in place."""
        return hidden[:, : self.spec.hidden].to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )

    def called(
        self,
        rows: Tensor,
        start: int,
        end: int,
        places: Places,
        only_kv: bool,
        entries: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Runs layers on the hidden states `rows` (N, D), in place. `entries` (N, 2D): the inputs
        of EntryLayers.
        """
        kernels = self.engine.kernels
        most = rows_at_once(len(rows), self.row_bytes)
        kernel = kernels.write if only_kv else kernels.span
        for first, part in zip(range(0, len(rows), most), places.parts(most), strict=True):
            buffers = self.call_at(part)
            buffers.call.hidden = rows[first:].data_ptr()
            if entries is not None:
                buffers.call.entries = entries[first:].data_ptr()
            if tokens is not None:
                buffers.call.tokens = tokens[first:].data_ptr()
            kernel(
                self.engine.shape, self.address(start), end - start, buffers.call, buffers.threads
            )
        return rows

    def has(self, layers: Iterable[int]) -> bool:
        """Whether this copy has all of these layers."""
        return self._there.issuperset(layers)

    def address(self, layer: int) -> int:
        """The address of a layer's C structure; later layers follow it."""
        return ctypes.addressof(self._array) + layer * ctypes.sizeof(CLayer)

    def call_at(self, places: Places, rows: int | None = None) -> Buffers:
        """The buffers of a call for the tokens at `places`. `rows`: how many run at once, if not
        all.
        """
        assert isinstance(places.cache, PagedCache)
        pages = places.cache.addresses(places)
        buffers = self.engine.buffers(rows or sum(places.counts))
        call = buffers.call
        for index, (cos, sin) in enumerate(self.engine.rope(pages.shape[1] * PAGE)):
            call.cos[index] = cos.data_ptr()
            call.sin[index] = sin.data_ptr()
        bounds = [0, rows] if rows else sorted({*places.bounds})
        buffers.read = *places.each, array("i", bounds), pages
        call.positions, call.page_rows, call.starts = (
            part.buffer_info()[0] for part in buffers.read[:3]
        )
        call.pages = pages.data_ptr()
        call.row_pages = pages.shape[1]
        call.sequences = len(bounds) - 1
        if self.inputs is not None:
            call.inputs = ctypes.addressof(self.inputs.structure)
        if self.spec.recurrence is not None:
            memories = places.cache.memories(places)
            call.states, call.rings, call.slots, call.settled = (
                part.data_ptr() for part in memories
            )
            call.slot_bytes = self._pool.memory[1]
            buffers.read = (*buffers.read, memories)
        return buffers


class EntryLayers(NativeLayers):
    """The layer of a drafter in the EAGLE-3 layout. Its input [embedding; feature] (N, 2D) may be
    changed in place.
    """

    def run(
        self, hidden: Tensor, start: int, end: int, places: Places, only_kv: bool = False
    ) -> Tensor:
        entries = hidden.to(torch.float32).contiguous()
        return self.called(
            torch.empty(len(hidden), self.spec.hidden), start, end, places, only_kv, entries
        )
