"""Drafting step by step: the draft side of every backend that has no kernel for whole drafts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Layers
from .cache import KVCache
from .draft_vocabulary import DraftVocabulary

_LARGE_VOCABULARY = 1 << 13
_COLUMNS = 256  # a large vocabulary is searched as rows of this many tokens


@dataclass(frozen=True)
class StepwiseDraftSide:
    """Layers and a head that draft, see `DraftSide`. `shares_states`: the layers are the backend's own."""

    layers: Layers
    head: Callable[[Tensor], Tensor]  # (..., D) to logits (..., N)
    vocabulary: DraftVocabulary | None = None
    shares_states: bool = True

    @property
    def num_layers(self) -> int:
        return self.layers.num_layers

    @property
    def device(self) -> torch.device:
        return self.layers.device

    def embed(self, ids: Tensor) -> Tensor:
        return self.layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.layers.run_layers(hidden, start, stop, positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def draft_greedily(
        self, token: Tensor, exit_layer: int, positions: Tensor, cache: KVCache, end_ids: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (1, K+1) and the hidden states (1, K, D) of all but the last, see `DraftSide`."""
        tokens, states = [token], []
        for step in range(positions.shape[1]):
            hidden = self.layers.run_layers(self.layers.embed(tokens[-1]), 0, exit_layer, positions[:, step : step + 1], cache)
            states.append(hidden)
            chosen = most_probable(self.head(hidden))
            tokens.append(chosen if self.vocabulary is None else self.vocabulary.tokens(chosen))
            if end_ids and int(tokens[-1]) in end_ids:
                break
        return torch.cat(tokens, dim=1), torch.cat(states, dim=1)


def most_probable(logits: Tensor) -> Tensor:
    """The token ids (...) with the largest of the logits (..., V); the first of several equal ones."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < _LARGE_VOCABULARY or vocabulary % _COLUMNS:
        return logits.argmax(-1)
    # On the CPU argmax takes five times as long as amax, so it searches only the row that has the maximum.
    rows = logits.view(*logits.shape[:-1], -1, _COLUMNS)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    return row[..., 0] * _COLUMNS + rows.take_along_dim(row[..., None], -2).argmax(-1)[..., 0]
