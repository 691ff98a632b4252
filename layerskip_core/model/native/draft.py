"""Greedy drafts by the C kernels: a whole draft is one call."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import DraftEnds, GreedyDraft, Submodel
from ..cache import KVCache
from ..draft_vocabulary import DraftVocabulary
from ..repack import BlockEnds
from .compiled import CDraft
from .head import NativeHead, NativeProduct
from .span import NativeLayers


@dataclass(frozen=True)
class OneCallDraft:
    """A `DraftKernel` by layers and a head; `vocabulary` holds the tokens of the head's outputs, None for all.

    `runs_last`: the layers up to the exit run over the last draft too, whose hidden state the target then needs.
    """

    layers: NativeLayers
    head: NativeHead
    vocabulary: DraftVocabulary | None
    runs_last: bool
    blocks: Mapping[int, BlockEnds[NativeHead, NativeProduct]]  # by their places among the layers

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
        vocab_size, hidden_size = layers.embedding.shape
        exit_layer, beyond, stops = submodel.exit_layer, submodel.beyond, submodel.stops
        head, join, joined = self.head, None, torch.empty(2, 0)
        if submodel.block is not None:
            layer = submodel.block.layer
            beyond, head, join = ((layer, layer + 1),), self.blocks[layer].head, self.blocks[layer].join
            if join is not None:
                assert feature is not None
                joined = torch.cat((feature, feature), dim=1).to(torch.float32)
        order = [*range(exit_layer), *(layer for start, stop in beyond for layer in range(start, stop))]
        ascending = sorted((0, *stops)) == [0, *stops]
        if not (0 <= first < vocab_size and ascending and layers.has(order) and cache.rows == 1):
            raise ValueError(f"no draft of token {first} by {len(order)} layers in a cache of {cache.rows} rows")
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
            None if join is None else ctypes.addressof(join.matrix.structure),
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
