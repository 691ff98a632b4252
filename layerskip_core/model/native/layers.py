"""A chain of layers for the C kernels, which run a span in one call."""

import ctypes
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
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
    expert_inputs,
    expert_outputs,
    layer_norms,
    norm_weights,
    router,
    sinks,
    stacked,
    sublayer_inputs,
    sublayer_output,
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
        # Floats of a row in each of the buffers that all layers share, by their names in CCall
        self.widths = _buffer_widths(spec)
        self.experts = spec.experts
        self.formed_bytes = 0  # of the largest row in the layout that kernels read
        inner = max([spec.inner, *(size.inner for size in spec.sizes)])
        expert = 0 if spec.experts is None else spec.experts.inner
        # MTP and EAGLE-3 read two states
        self.make_room(max(2 * spec.hidden, self.widths["mixed"], inner, expert))
        self._kept = lru_cache(_KEPT)(partial(Buffers, self))
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
        threads = torch.get_num_threads()
        if rows > KEPT_ROWS:
            return Buffers(self, rows, threads)
        return self._kept(rows, threads)

    def row_bytes(self) -> int:
        """Approximate bytes of a row's activations."""
        states = 2 + int(self.shape.chosen)  # its own, and the outputs of experts
        floats = sum(self.widths.values()) + states * int(self.shape.hidden)
        return 4 * floats + torch.get_num_threads() * self.formed_bytes


def _buffer_widths(spec: ModelSpec) -> dict[str, int]:
    """By the names of buffers in CCall: the floats of a row, for the layer that needs most."""
    of_layers = [spec, *map(spec.of_layer, range(spec.layers))]
    widths = dict.fromkeys(("qkv", "mixed", "inside", "block", "steps", "slices"), 0)
    for of_layer in of_layers:
        read = sum(of_layer.projections("attention").widths)
        widths["qkv"] = max(widths["qkv"], read)
        widths["mixed"] = max(widths["mixed"], of_layer.query_width)
        widths["inside"] = max(widths["inside"], of_layer.inner)
    if spec.experts is not None:
        widths["inside"] = max(widths["inside"], spec.experts.choices * spec.experts.inner)
    recurrence = spec.recurrence
    if recurrence is not None:
        widths["qkv"] = max(widths["qkv"], sum(recurrence.widths))
        widths["mixed"] = max(widths["mixed"], recurrence.outputs)
        if recurrence.key_heads:
            widths["steps"] = 2 * recurrence.heads  # and decays
    if any(spec.architecture.norms[1::2]):
        widths["block"] = spec.hidden  # a sublayer's output, where a norm follows it
    if spec.token_inputs is not None:
        widths["slices"] = spec.layers * spec.token_width
    return widths


def _shape_of(spec: ModelSpec, dtype: torch.dtype) -> CShape:
    """`dtype`: of the embedding and the cache."""
    experts = {}
    if spec.experts is not None:
        experts = {
            "experts": spec.experts.count,
            "chosen": spec.experts.choices,
            "normalised": spec.experts.normalised,
            "shared": spec.experts.shared,
            "gates_shared": spec.experts.gates_shared,
        }
    return CShape(
        **experts,
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
        norms_rotated=spec.architecture.norms_rotated,
        parallel=spec.parallel,
        gates_attention=spec.architecture.gates_attention,
        eps=spec.eps,
        attention_scale=spec.attention_scale,
        score_cap=spec.score_cap or 0.0,
        # Rounded as transformers does
        embedding_scale=float(torch.tensor(spec.embedding_scale).to(dtype)),
        residual_scale=spec.residual_scale,
    )


class Buffers:
    """The buffers of a call over `rows` rows, and its structure with all constant fields."""

    def __init__(self, engine: Engine, rows: int, threads: int) -> None:
        self.threads = threads
        hidden = int(engine.shape.hidden)
        self._held = {
            name: torch.empty(rows, width, dtype=torch.float32)
            for name, width in engine.widths.items()
        }
        if engine.experts is not None:
            self._held |= _routing_buffers(engine.experts, rows, hidden)
        # A hidden state, and all rows as kernels read them; many read two decoded panels again
        formed = rows
        if rows > _ROWS_OF_ONE_READ:
            formed += PANEL
        own = -(-(4 * (hidden + 16) + formed * engine.formed_bytes) // 64) * 64
        self._held["scratch"] = torch.empty(threads * own, dtype=torch.uint8)
        self.call = CCall(rows=rows, scratch_bytes=own)
        for name, part in self._held.items():
            setattr(self.call, name, part.data_ptr())
        self._logits = torch.empty(0)
        self.read: tuple[Any, ...] = ()  # keeps arrays alive that the next call reads

    def logits(self, outputs: int) -> Tensor:
        """(rows, outputs), for calls that return tokens only."""
        if self._logits.shape[-1] != outputs:
            self._logits = torch.empty(self.call.rows, outputs)
        return self._logits


def _routing_buffers(experts: ExpertsSpec, rows: int, hidden: int) -> dict[str, Tensor]:
    """The buffers of mixtures of experts, by their names in CCall."""
    choices = rows * experts.choices
    most = experts.count + experts.shared + 1
    integers = {
        "choice_slots": choices,
        "chosen": choices,
        "slot_rows": choices,
        "experts": most,
        "first_slots": most,
        "used": 1,
    }
    floats = {
        "logits": rows * (experts.count + experts.gates_shared),
        "weights": choices,
        "products": choices * hidden,
    }
    buffers = {name: torch.empty(size, dtype=torch.int32) for name, size in integers.items()}
    for name, size in floats.items():
        buffers[name] = torch.empty(size)
    return buffers


def keys_at(spec: ModelSpec, layer: int) -> int:
    """The offset of a layer's keys in a page."""
    earlier = [spec.of_layer(before) for before in spec.attending if before < layer]
    return sum(2 * PAGE * of_layer.key_width for of_layer in earlier)


class NativeNorm:
    """A norm's weights in fp32, or none, and the C structure with their addresses."""

    def __init__(self, norm: Affine | None) -> None:
        self.structure = CNorm()
        if norm is None:
            return
        self._norm = norm = norm.mapped(lambda part: part.float().contiguous())
        self.structure.weight = norm.weight.data_ptr()
        if norm.bias is not None:
            self.structure.bias = norm.bias.data_ptr()


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
        *,
        keys_offset: int | None = None,
        token_slice: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """`weights`: of this layer; `pack` decides which matrices are read.

        Args:
            feature_norm: for EntryLayers: this norm is of features, the layer's first norm of
                embeddings.
            keys_offset: of the keys in a page; None: by the spec.
            token_slice: the layer whose part of the token inputs it reads; None: its own.
            scale: of the layer's output.
        """
        inputs = spec.token_inputs
        spec = spec.of_layer(index)
        if keys_offset is None:
            keys_offset = keys_at(spec, index if spec.source is None else spec.source)
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
        recurrence, steps = None, None  # addresses
        first = spec.sublayers_of(index)[0]
        if first == "mixer":
            self._recurrence = NativeRecurrence(weights, spec, index)
            recurrence, steps = self._recurrence.addresses
        elif first == "attention":
            others["sinks"] = sinks(weights, spec)
        self.matrices = list(matrices.values())
        self._norms = {name: NativeNorm(norm) for name, norm in norms.items()}
        self._others = {
            name: part.float().contiguous() for name, part in others.items() if part is not None
        }
        self.structure = CLayer(
            **{name: matrix.structure for name, matrix in matrices.items()},
            **{name: norm.structure for name, norm in self._norms.items()},
            **{name: part.data_ptr() for name, part in self._others.items()},
            rope=-1 if rope is None else rope,
            window=spec.window_of(spec.kinds[index]) or 0,
            bends=(ctypes.c_float * 2)(*activation_factors(weights, spec)),
            keys=keys_offset,
            shares=spec.source is not None,
            slice=index if token_slice is None else token_slice,
            scale=scale,
            recurrence=recurrence,
            steps=steps,
        )  # NativeLayers sets the shape


# The names of norms in CLayer, in the order of `layer_norms`
_NORMS = "before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key"


Read = Callable[[], Iterable[Affine]]


def _layer_matrices(
    pack: PackMatrix, weights: Weights, spec: ModelSpec, index: int, kind: str, reads_feature: bool
) -> dict[str, NativeMatrix]:
    """A layer's matrices by their names in CLayer. `spec`: that of the layer."""
    matrices = dict[str, NativeMatrix]()
    sublayers = spec.sublayers_of(index)
    biased = spec.mlp_bias

    def add(name: str, form: MatrixForm, read: Read) -> None:
        matrices[name] = pack(f"layers.{index}.{name}", form, read)

    first = sublayers[0]
    if first != "mlp":
        _, widths, mixed, (qkv_bias, output_bias) = spec.projections(first)
        qkv = MatrixForm(kind, spec.hidden * (1 + reads_feature), sum(widths), biased=qkv_bias)
        add("qkv", qkv, lambda: _filling_panels(sublayer_inputs(weights, spec, first)))
        output = MatrixForm(kind, mixed, spec.hidden, biased=output_bias)
        add("output", output, lambda: [sublayer_output(weights, spec, first)])
    if "mlp" in sublayers:
        inner = spec.inner
        count = 1
        read_up: Read = partial(sublayer_inputs, weights, spec, "mlp")
        read_down: Read = lambda: [sublayer_output(weights, spec, "mlp")]  # noqa: E731
        experts = spec.experts_of(index)
        if experts is not None:
            inner = experts.inner
            count = experts.count + experts.shared
            read_up = partial(expert_inputs, weights, spec)
            read_down = partial(expert_outputs, weights, spec)
        alternating = 2 if spec.architecture.gated else 1  # gate and up
        add("up", MatrixForm(kind, spec.hidden, inner, alternating, biased, count), read_up)
        add("down", MatrixForm(kind, inner, spec.hidden, biased=biased, experts=count), read_down)
    inputs = spec.token_inputs
    if inputs is not None:
        gate = MatrixForm(kind, spec.hidden, spec.token_width)
        add("token_gate", gate, lambda: [affine(weights, inputs.gate, spec)])
        output = MatrixForm(kind, spec.token_width, spec.hidden)
        add("token_output", output, lambda: [affine(weights, inputs.output, spec)])
    return matrices


def _filling_panels(projections: Iterable[Affine]) -> list[Affine]:
    """Projections of the same input unchanged, if all but the last fill panels; else stacked."""
    parts = list(projections)
    if all(len(part.weight) % PANEL == 0 for part in parts[:-1]):
        return parts
    return [stacked(parts)]


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
        self._array = (CLayer * len(layers))()
        for index, layer in enumerate(layers):
            if layer is not None:
                self._array[index] = layer.structure
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
        rows = self.numbers(hidden)
        if self.inputs is None:
            return self.called(rows, start, end, places, only_kv)
        tokens = hidden[:, self.spec.hidden :].flatten().long()
        self.called(rows, start, end, places, only_kv, tokens=tokens)
        return self.carrying(rows, tokens)

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
