"""Greedy drafts by the C kernels: a whole draft is one call."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import KVCache
from ..draft_vocabulary import DraftVocabulary
from .compiled import CDraft
from .head import NativeHead
from .span import NativeLayers


@dataclass(frozen=True)
class OneCallDraft:
    """A `GreedyDraft` by layers and a head; `vocabulary` holds the tokens of the head's outputs, None for all."""

    layers: NativeLayers
    head: NativeHead
    vocabulary: DraftVocabulary | None

    def __call__(
        self, token: Tensor, exit_layer: int, positions: Tensor, cache: KVCache, end_ids: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (1, K+1) and the hidden states (1, K+1, D) of all of them, see `DraftSide`."""
        layers, first = self.layers, int(token)
        vocab_size, hidden_size = layers.embedding.shape
        if not (0 <= first < vocab_size and 0 <= exit_layer <= layers.num_layers and len(cache.lengths) == 1):
            raise ValueError(f"no draft of token {first} by {exit_layer} layers in a cache of {len(cache.lengths)} rows")
        most, start = positions.shape[1], int(positions[0, 0])
        places = torch.arange(start, start + most + 1)
        buffers = layers.pool.of(1)
        layers.place(buffers, cache, cache.writer(places[None]).stop, places, 0, exit_layer)
        buffers.call.rows_per_sequence = 1
        tokens = torch.empty(1, most + 1, dtype=torch.long)
        tokens[0, 0] = first
        states = torch.empty(1, most + 1, hidden_size)
        logits = torch.empty(self.head.matrix.outputs)
        known = None if self.vocabulary is None else self.vocabulary.ids
        ends = (ctypes.c_int64 * len(end_ids))(*end_ids)
        draft = CDraft(
            layers.embedding.data_ptr(),
            None if known is None else known.data_ptr(),
            ctypes.addressof(ends),
            len(end_ids),
            most,
            *(tensor.data_ptr() for tensor in (tokens, states, logits)),
        )
        layers.kernels.draft(
            *(layers.shape, layers.address(0), exit_layer, self.head.norm.structure, self.head.matrix.structure),
            *(buffers.call, draft, buffers.threads),
        )
        count = draft.drafted + 1
        return tokens[:, :count], states[:, :count]
