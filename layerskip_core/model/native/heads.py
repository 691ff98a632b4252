"""Heads, and calls that return tokens: a whole draft, a verification."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import Drafted, DraftEnds, DraftHead, Submodel
from ..cache import Places
from ..exit_blocks import PlacedBlock, PlacedMtp
from ..noise import Noise, least_temperature
from ..repacked import rows_at_once
from ..spec import ModelSpec
from ..weights import Affine
from .compiled import CChoice, CDraft, CNorm
from .layers import Engine, NativeLayers, NativeNorm
from .matrix import NativeMatrix
from .noise import words_of

_GUESSES = 4  # most tokens guessed by lookup in a pass of a low-bit copy


class NativeLinear:
    """A linear layer, perhaps after a norm. `spec`: scales and caps the logits of a head."""

    input_norms: Sequence[NativeNorm] = ()  # of MTP's input projection

    def __init__(
        self,
        engine: Engine,
        matrix: NativeMatrix,
        norm: Affine | None = None,
        spec: ModelSpec | None = None,
    ) -> None:
        self._engine = engine
        self.matrix = matrix
        self.norm = NativeNorm(norm)
        self._spec = spec

    def with_norm(self, norm: Affine) -> "NativeLinear":
        """The same matrix after another norm."""
        return NativeLinear(self._engine, self.matrix, norm, self._spec)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs) in fp32."""
        shape = hidden.shape[:-1]
        size = self.matrix.form.inputs
        rows = hidden[..., :size].reshape(-1, size).to(torch.float32).contiguous()
        outputs = torch.empty(len(rows), self.matrix.outputs)
        most = rows_at_once(len(rows), self._engine.row_bytes)
        if len(rows) <= most:
            self._score(rows, outputs)
        else:
            for part, out in zip(torch.split(rows, most), torch.split(outputs, most), strict=True):
                self._score(part, out)
        outputs = outputs.view(*shape, self.matrix.outputs)
        return outputs if self._spec is None else self._spec.scaled_logits(outputs)

    def _score(self, rows: Tensor, out: Tensor) -> None:
        engine = self._engine
        buffers = self._engine.buffers(len(rows))
        buffers.call.hidden = rows.data_ptr()
        engine.kernels.score(
            engine.shape,
            self.norm.structure,
            self.matrix.structure,
            buffers.call,
            out.data_ptr(),
            buffers.threads,
        )


def draft(
    layers: NativeLayers,
    spec: ModelSpec,
    chosen_by: DraftHead,
    text: Tensor,
    submodel: Submodel,
    places: Places,
    ends: DraftEnds,
    noise: Noise | None,
    feature: Tensor | None,
    runs_last: bool,
    norms_output: bool = False,
) -> Drafted:
    """A `DraftKernel` once `layers` and `spec` are bound. `norms_output`: as in Eagle3Form."""
    exit_layer, beyond, stops, (head, vocabulary) = (
        submodel.exit_layer,
        submodel.beyond,
        submodel.stops,
        chosen_by,
    )
    entry = None if feature is None else torch.cat((feature, feature)).to(torch.float32)
    if (block := submodel.block) is not None:
        assert isinstance(block, PlacedBlock)
        places = places.moved(-1) if block.needs_feature else places
        beyond = ((block.layer, block.layer + 1),)
    assert isinstance(head, NativeLinear)
    order = [*range(exit_layer), *(layer for start, stop in beyond for layer in range(start, stop))]
    assert layers.has(order)
    most = sum(places.counts) - 1
    engine = layers.engine
    searched = len(text) - 1
    guesses = min(searched, _GUESSES)
    buffers = layers.call_at(places, rows=1 + guesses)
    tokens = torch.cat((text, text.new_empty(most)))
    states = torch.empty(len(stops), most + 1, spec.hidden)
    tokens = tokens[searched:]
    after_exit = torch.empty(spec.hidden) if beyond else states
    logits = buffers.logits(head.matrix.outputs)
    end_ids = (ctypes.c_int64 * len(ends.ids))(*ends.ids)
    indices = (ctypes.c_int32 * len(order))(*order)
    stop_counts = (ctypes.c_int32 * len(stops))(*stops)
    probs = (ctypes.c_float * most)() if ends.needs_probs else None
    ids = None if vocabulary is None else vocabulary.ids
    learned = None if exit_layer == 0 else layers.learned
    call = CDraft(  # in the order of its fields
        *map(_address, (layers.embedding, learned, ids, end_ids, indices, stop_counts, probs)),
        *(len(order), len(stops), len(end_ids), most, runs_last, ends.power),
        *(
            1 / spec.logits_divisor,
            spec.logits_cap or 0.0,
            0.0,  # no least probability of a draft
            ends.survival,
            ends.doubt,
        ),
        *map(_address, (entry, tokens, states, after_exit, logits)),
        norms_output=norms_output or isinstance(block, PlacedMtp),
    )
    if isinstance(block, PlacedMtp):
        assert isinstance(block.join, NativeLinear)
        call.join = ctypes.addressof(block.join.matrix.structure)
        call.input_norms = (CNorm * 2)(*(norm.structure for norm in block.join.input_norms))
    call.guesses = guesses
    call.searched = searched
    words = None if noise is None else words_of(noise.keys)
    if noise is not None:
        call.keys = _address(words)
        call.temperature = least_temperature(noise.temperature)
    engine.kernels.draft(
        engine.shape,
        layers.address(0),
        head.norm.structure,
        head.matrix.structure,
        buffers.call,
        call,
        buffers.threads,
    )
    drafted = call.drafted
    ran = drafted + runs_last
    kept = {
        stop: layers.carrying(states[place, :ran], tokens[:ran]) for place, stop in enumerate(stops)
    }
    return tokens[: drafted + 1], kept, [] if probs is None else probs[:drafted]


def _address(part: "Tensor | ctypes.Array[Any] | None") -> int | None:
    if part is None:
        return None
    return part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part)


def choose(
    layers: NativeLayers,
    head: NativeLinear,
    tokens: Tensor,
    hidden: Tensor | None,
    start: int,
    stop: int,
    kept: Sequence[int],
    places: Places,
    noise: Noise | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """`Backend.choose` in one call of the kernels."""
    count = sum(places.counts)
    if start == 0 and layers.learned is not None:
        hidden = layers.placed(layers.embed(tokens) if hidden is None else hidden, places)
    tokens = tokens.contiguous()
    rows = (
        torch.empty(count, layers.embedding.shape[1]) if hidden is None else layers.numbers(hidden)
    )
    engine = layers.engine
    buffers = layers.call_at(places)
    buffers.call.hidden = rows.data_ptr()
    buffers.call.tokens = tokens.data_ptr()
    chosen = torch.empty(count, dtype=torch.long)
    choice = CChoice(
        embedding=layers.embedding.data_ptr(),
        tokens=tokens.data_ptr() if hidden is None else None,
        logits=buffers.logits(head.matrix.outputs).data_ptr(),
        chosen=chosen.data_ptr(),
        stop_count=len(kept),
    )
    if noise is not None:
        # Read during the call
        words = words_of(noise.keys)
        most = torch.empty(count)
        choice.keys = words.data_ptr()
        choice.most = most.data_ptr()
        choice.temperature = least_temperature(noise.temperature)
    reached = dict[int, Tensor]()
    if kept:
        states = rows.new_empty(len(kept), *rows.shape)
        stops = (ctypes.c_int32 * len(kept))(*(layer - start for layer in kept))
        choice.stops = ctypes.addressof(stops)
        choice.states = states.data_ptr()
        reached = dict(zip(kept, states.unbind(), strict=True))
    engine.kernels.choose(
        *(
            engine.shape,
            layers.address(start),
            stop - start,
            head.norm.structure,
            head.matrix.structure,
        ),
        *(buffers.call, choice, buffers.threads),
    )
    return chosen, {layer: layers.carrying(state, tokens) for layer, state in reached.items()}
