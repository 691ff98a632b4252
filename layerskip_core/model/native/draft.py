"""Whole drafts, and whole greedy verifications, as one call of the C kernels each."""

import ctypes

import torch
from torch import Tensor

from ..backend import DraftEnds, GreedyDraft, Submodel
from ..cache import KVCache
from ..drafting import DraftVocabulary
from ..spec import ModelSpec
from .compiled import CChoice, CDraft
from .layers import NativeLayers, NativeLinear

_MOST_ROWS = 64  # whose logits are kept


def draft(
    layers: NativeLayers,
    head: NativeLinear,
    spec: ModelSpec,
    vocabulary: DraftVocabulary | None,
    runs_last: bool,
    token: Tensor,
    submodel: Submodel,
    positions: Tensor,
    cache: KVCache,
    ends: DraftEnds,
    feature: Tensor | None = None,
) -> GreedyDraft:
    """A `DraftKernel`, after the arguments that stay the same: `vocabulary` holds the tokens of the head's outputs.

    The states are those of K+1 tokens. Without `runs_last` the last draft, whose states a target needs that continues from
    them, is not run: they are those of K tokens.
    """
    exit_layer, beyond, stops = submodel.exit_layer, submodel.beyond, submodel.stops
    join, joined = None, torch.empty(2, 0)
    if (block := submodel.block) is not None:
        assert isinstance(block.head, NativeLinear)
        beyond, head, join = ((block.layer, block.layer + 1),), block.head, block.join
        if join is not None:
            assert isinstance(join, NativeLinear) and feature is not None
            joined = torch.cat((feature, feature), dim=1).to(torch.float32)
    order = [*range(exit_layer), *(layer for start, stop in beyond for layer in range(start, stop))]
    assert layers.has(order) and cache.rows == 1
    most, start = positions.shape[1], int(positions[0, 0])
    places = torch.arange(start, start + most + 1)
    engine, buffers = layers.engine, layers.engine.buffers(1)
    layers.place(buffers.call, cache, cache.writer(places[None]).stop, places, 0, max(order, default=-1) + 1)
    buffers.call.rows_per_sequence = 1
    tokens = torch.empty(1, most + 1, dtype=torch.long)
    tokens[0, 0] = int(token)
    states = torch.empty(len(stops), most + 1, spec.hidden)
    logits = torch.empty(head.matrix.outputs)
    after_exit = torch.empty(spec.hidden) if beyond else states
    ids = None if vocabulary is None else vocabulary.ids
    end_ids = (ctypes.c_int64 * len(ends.ids))(*ends.ids)
    indices = (ctypes.c_int32 * len(order))(*order)
    stop_counts = (ctypes.c_int32 * len(stops))(*stops)
    probs = (ctypes.c_float * most)() if ends.needs_probs else None
    call = CDraft(
        embedding=layers.embedding.data_ptr(),
        vocabulary=None if ids is None else ids.data_ptr(),
        ends=ctypes.addressof(end_ids),
        order=ctypes.addressof(indices),
        stops=ctypes.addressof(stop_counts),
        probs=None if probs is None else ctypes.addressof(probs),
        layer_count=len(order),
        stop_count=len(stops),
        end_count=len(end_ids),
        most=most,
        runs_last=runs_last,
        power=ends.power,
        logits_scale=1 / spec.logits_divisor,
        logits_cap=spec.logits_cap or 0.0,
        confidence=ends.confidence,
        survival=ends.survival,
        doubt=ends.doubt,
        join=ctypes.addressof(join.matrix.structure) if isinstance(join, NativeLinear) else None,
        joined=joined.data_ptr(),
        tokens=tokens.data_ptr(),
        states=states.data_ptr(),
        beyond=after_exit.data_ptr(),
        logits=logits.data_ptr(),
    )
    engine.kernels.draft(
        engine.shape, layers.address(0), head.norm.structure, head.matrix.structure, buffers.call, call, buffers.threads
    )
    drafted = call.drafted
    kept = {stop: states[place : place + 1, : drafted + runs_last] for place, stop in enumerate(stops)}
    return GreedyDraft(tokens[:, : drafted + 1], kept, [] if probs is None else probs[:drafted])


def choose(
    layers: NativeLayers,
    head: NativeLinear,
    tokens: Tensor,
    hidden: Tensor | None,
    start: int,
    stop: int,
    positions: Tensor,
    cache: KVCache,
) -> Tensor | None:
    """A `Chooser`, after the layers and the head."""
    batch, count = tokens.shape
    if batch * count > _MOST_ROWS or not layers.has(range(start, stop)) or cache.rows != batch:
        return None
    if hidden is None:
        tokens = tokens.contiguous()
        rows = torch.empty(batch, count, layers.embedding.shape[1])
    else:
        rows = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place
    engine, buffers, places = layers.engine, layers.engine.buffers(batch * count), positions.contiguous()
    layers.place(buffers.call, cache, cache.writer(positions).stop, places, start, stop)
    buffers.call.rows_per_sequence = count
    buffers.call.hidden = rows.data_ptr()
    chosen = torch.empty(batch, count, dtype=torch.long)
    choice = CChoice(
        layers.embedding.data_ptr(),
        tokens.data_ptr() if hidden is None else None,
        buffers.logits(head.matrix.outputs).data_ptr(),
        chosen.data_ptr(),
    )
    engine.kernels.choose(
        *(engine.shape, layers.address(start), stop - start, head.norm.structure, head.matrix.structure),
        *(buffers.call, choice, buffers.threads),
    )
    return chosen
