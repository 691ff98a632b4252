"""Heads, and calls that return tokens: a whole draft, a verification."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import MOST_GUESSES, Chosen, DraftCall, Drafted, Submodel, TokenPass
from ..exit_blocks import PlacedBlock, PlacedMtp
from ..noise import least_temperature
from ..repacked import rows_at_once
from ..spec import ModelSpec
from ..weights import Affine
from .compiled import CChoice, CDraft, CNorm
from .layers import Engine, NativeLayers, NativeNorm
from .matrix import NativeMatrix
from .noise import words_of


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
        for first in range(0, len(rows), most):
            self._score(rows[first : first + most], outputs[first : first + most])
        outputs = outputs.view(*shape, self.matrix.outputs)
        if self._spec is None:
            return outputs
        return self._spec.scaled_logits(outputs)

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
    layers: NativeLayers, spec: ModelSpec, call: DraftCall, norms_output: bool = False
) -> Drafted:
    """A `DraftKernel` once `layers` and `spec` are bound. `norms_output`: as in Eagle3Form."""
    submodel = call.submodel
    places = call.places
    if submodel.block is not None and submodel.block.needs_feature:
        places = places.moved(-1)
    head = call.head.unembed
    assert isinstance(head, NativeLinear)
    order = _order_of(submodel)
    assert layers.has(order)
    most = sum(places.counts) - 1
    searched = len(call.text) - 1
    guesses = min(searched, MOST_GUESSES)
    buffers = layers.call_at(places, rows=1 + guesses)

    # What the C code reads and writes. It searches the text that stands before the tokens
    text_and_drafts = torch.cat((call.text, call.text.new_empty(most)))
    tokens = text_and_drafts[searched:]
    vocabulary = call.head.vocabulary
    kept = submodel.state_layers
    states = torch.empty(len(kept), most + 1, spec.hidden)
    after_exit = states
    if len(order) > submodel.exit_layer:
        after_exit = torch.empty(spec.hidden)
    entry = probs = keys = None
    if call.feature is not None:
        entry = torch.cat((call.feature, call.feature)).to(torch.float32)
    if call.ends.needs_probs:
        probs = (ctypes.c_float * most)()
    if call.noise is not None:
        keys = words_of(call.noise.keys)
    end_ids = (ctypes.c_int64 * len(call.ends.ids))(*call.ends.ids)
    indices = (ctypes.c_int32 * len(order))(*order)
    stops = (ctypes.c_int32 * len(kept))(*kept)

    of_draft = _settings(call, spec)
    of_draft.norms_output |= norms_output
    of_draft.most = most
    of_draft.guesses = guesses
    of_draft.searched = searched
    of_draft.layer_count = len(order)
    of_draft.stop_count = len(kept)
    of_draft.end_count = len(end_ids)
    addresses: dict[str, Tensor | ctypes.Array[Any] | None] = {
        "embedding": layers.embedding,
        "learned": layers.learned if submodel.exit_layer else None,
        "vocabulary": None if vocabulary is None else vocabulary.ids,
        "ends": end_ids,
        "order": indices,
        "stops": stops,
        "probs": probs,
        "entry": entry,
        "tokens": tokens,
        "states": states,
        "beyond": after_exit,
        "logits": buffers.logits(head.matrix.outputs),
        "keys": keys,
    }
    for name, part in addresses.items():
        setattr(of_draft, name, _address(part))

    engine = layers.engine
    engine.kernels.draft(
        engine.shape,
        layers.address(0),
        head.norm.structure,
        head.matrix.structure,
        buffers.call,
        of_draft,
        buffers.threads,
    )
    drafted = of_draft.drafted
    ran = drafted + call.runs_last
    reached = {}
    for layer, after in zip(kept, states, strict=True):
        reached[layer] = layers.carrying(after[:ran], tokens[:ran])
    found: list[float] = [] if probs is None else probs[:drafted]
    return tokens[: drafted + 1], reached, found


def _order_of(submodel: Submodel) -> list[int]:
    """The layers that draft, in their order."""
    order = list(range(submodel.exit_layer))
    block = submodel.block
    if block is not None:
        assert isinstance(block, PlacedBlock)
        return [*order, block.layer]
    for start, end in submodel.beyond:
        order += range(start, end)
    return order


def _settings(call: DraftCall, spec: ModelSpec) -> CDraft:
    """The structure of a draft without counts, and without addresses of this call's tensors."""
    of_draft = CDraft(
        runs_last=call.runs_last,
        power=call.ends.power,
        survival=call.ends.survival,
        doubt=call.ends.doubt,
        logits_scale=1 / spec.logits_divisor,
        logits_cap=spec.logits_cap or 0.0,
    )
    if call.noise is not None:
        of_draft.temperature = least_temperature(call.noise.temperature)
    block = call.submodel.block
    if isinstance(block, PlacedMtp):
        assert isinstance(block.join, NativeLinear)
        of_draft.norms_output = True
        of_draft.join = ctypes.addressof(block.join.matrix.structure)
        of_draft.input_norms = (CNorm * 2)(*[norm.structure for norm in block.join.input_norms])
    return of_draft


def _address(part: "Tensor | ctypes.Array[Any] | None") -> int | None:
    if part is None:
        return None
    return part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part)


def choose(layers: NativeLayers, head: NativeLinear, step: TokenPass) -> Chosen:
    """`Backend.choose` in one call of the kernels."""
    count = sum(step.places.counts)
    hidden = step.states
    if step.start == 0 and layers.learned is not None:
        embedded = layers.embed(step.tokens) if hidden is None else hidden
        hidden = layers.placed(embedded, step.places)
    tokens = step.tokens.contiguous()
    width = layers.embedding.shape[1]
    reads_tokens = hidden is None
    rows = torch.empty(count, width) if hidden is None else layers.numbers(hidden)
    buffers = layers.call_at(step.places)
    buffers.call.hidden = rows.data_ptr()
    buffers.call.tokens = tokens.data_ptr()
    chosen = torch.empty(count, dtype=torch.long)
    choice = CChoice(
        embedding=layers.embedding.data_ptr(),
        tokens=tokens.data_ptr() if reads_tokens else None,
        logits=buffers.logits(head.matrix.outputs).data_ptr(),
        chosen=chosen.data_ptr(),
        stop_count=len(step.taps),
    )
    if step.noise is not None:
        keys = words_of(step.noise.keys)  # these are read during the call
        most = torch.empty(count)
        choice.keys = keys.data_ptr()
        choice.most = most.data_ptr()
        choice.temperature = least_temperature(step.noise.temperature)
    states = rows.new_empty(len(step.taps), *rows.shape)
    stops = (ctypes.c_int32 * len(step.taps))(*(layer - step.start for layer in step.taps))
    choice.stops = ctypes.addressof(stops)
    choice.states = states.data_ptr()
    engine = layers.engine
    engine.kernels.choose(
        engine.shape,
        layers.address(step.start),
        step.end - step.start,
        head.norm.structure,
        head.matrix.structure,
        buffers.call,
        choice,
        buffers.threads,
    )
    reached = zip(step.taps, states, strict=True)
    return chosen, {layer: layers.carrying(state, tokens) for layer, state in reached}
