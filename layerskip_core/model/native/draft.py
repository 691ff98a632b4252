"""Whole drafts, and whole greedy verifications, as one call of the C kernels each."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import DraftEnds, GreedyDraft, Submodel
from ..cache import KVCache
from ..draft_vocabulary import DraftVocabulary
from .compiled import CChoice, CDraft
from .layers import NativeHead, NativeLayers, NativeProduct

_MOST_ROWS = 64  # whose logits are kept


@dataclass(frozen=True)
class OneCallDraft:
    """A `DraftKernel` by layers and a head; `vocabulary` holds the tokens of the head's outputs, None for all.

    `runs_last`: the layers up to the exit run over the last draft too, whose hidden state the target then needs.
    """

    layers: NativeLayers
    head: NativeHead
    vocabulary: DraftVocabulary | None
    runs_last: bool

    def __call__(
        self,
        token: Tensor,
        submodel: Submodel,
        positions: Tensor,
        cache: KVCache,
        ends: DraftEnds,
        feature: Tensor | None = None,
    ) -> GreedyDraft:
        """See `DraftSide`. The states are those of K+1 tokens, or of K without `runs_last`."""
        layers, first = self.layers, int(token)
        hidden_size = layers.embedding.shape[1]
        exit_layer, beyond, stops = submodel.exit_layer, submodel.beyond, submodel.stops
        head, join, joined = self.head, None, torch.empty(2, 0)
        if (block := submodel.block) is not None:
            assert isinstance(block.head, NativeHead)
            beyond, head, join = ((block.layer, block.layer + 1),), block.head, block.join
            if join is not None:
                assert isinstance(join, NativeProduct) and feature is not None
                joined = torch.cat((feature, feature), dim=1).to(torch.float32)
        order = [*range(exit_layer), *(layer for start, stop in beyond for layer in range(start, stop))]
        assert layers.has(order) and cache.rows == 1
        most, start = positions.shape[1], int(positions[0, 0])
        places = torch.arange(start, start + most + 1)
        buffers = layers.pool.of(1)
        layers.place(buffers, cache, cache.writer(places[None]).stop, places, 0, max(order, default=-1) + 1)
        buffers.call.rows_per_sequence = 1
        tokens = torch.empty(1, most + 1, dtype=torch.long)
        tokens[0, 0] = first
        states = torch.empty(len(stops), most + 1, hidden_size)
        logits = torch.empty(head.product.matrix.outputs)
        after_exit = torch.empty(hidden_size) if beyond else states
        vocabulary = None if self.vocabulary is None else self.vocabulary.ids
        end_ids = (ctypes.c_int64 * len(ends.ids))(*ends.ids)
        indices = (ctypes.c_int32 * len(order))(*order)
        stop_counts = (ctypes.c_int32 * len(stops))(*stops)
        probs = (ctypes.c_float * most)() if ends.needs_probs else None
        draft = CDraft(
            layers.embedding.data_ptr(),
            None if vocabulary is None else vocabulary.data_ptr(),
            ctypes.addressof(end_ids),
            ctypes.addressof(indices),
            ctypes.addressof(stop_counts),
            None if probs is None else ctypes.addressof(probs),
            len(order),
            len(stops),
            len(end_ids),
            most,
            self.runs_last,
            ends.power,
            head.logits_scale,
            head.logits_cap,
            ends.confidence,
            ends.survival,
            ends.doubt,
            None if not isinstance(join, NativeProduct) else ctypes.addressof(join.matrix.structure),
            *(tensor.data_ptr() for tensor in (joined, tokens, states, after_exit, logits)),
        )
        layers.kernels.draft(
            *(layers.shape, layers.address(0), head.product.norm.structure, head.product.matrix.structure),
            *(buffers.call, draft, buffers.threads),
        )
        count = draft.drafted + 1
        run = count if self.runs_last else draft.drafted
        kept = {stop: states[place : place + 1, :run] for place, stop in enumerate(stops)}
        return GreedyDraft(tokens[:, :count], kept, [] if probs is None else probs[: draft.drafted])


@dataclass(frozen=True)
class OneCallChoice:
    """A `Chooser` by a chain of layers and a head."""

    layers: NativeLayers
    head: NativeHead

    def __call__(
        self, tokens: Tensor, hidden: Tensor | None, start: int, stop: int, positions: Tensor, cache: KVCache
    ) -> Tensor | None:
        layers, head = self.layers, self.head
        batch, count = tokens.shape
        if batch * count > _MOST_ROWS or not layers.has(range(start, stop)) or cache.rows != batch:
            return None
        if hidden is None:
            tokens = tokens.contiguous()
            rows = torch.empty(batch, count, layers.embedding.shape[1])
        else:
            rows = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place
        buffers, places = layers.pool.of(batch * count), positions.contiguous()
        layers.place(buffers, cache, cache.writer(positions).stop, places, start, stop)
        buffers.call.rows_per_sequence = count
        buffers.call.hidden = rows.data_ptr()
        chosen = torch.empty(batch, count, dtype=torch.long)
        choice = CChoice(
            layers.embedding.data_ptr(),
            tokens.data_ptr() if hidden is None else None,
            buffers.logits(head.product.matrix.outputs).data_ptr(),
            chosen.data_ptr(),
        )
        layers.kernels.choose(
            *(layers.shape, layers.address(start), stop - start, head.product.norm.structure),
            *(head.product.matrix.structure, buffers.call, choice, buffers.threads),
        )
        return chosen
