"""The draft side of every backend: layers and a head, step by step unless there is a kernel for whole drafts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import DraftEnds, GreedyDraft, Layers, Spans
from .cache import KVCache
from .draft_vocabulary import DraftVocabulary

_LARGE_VOCABULARY = 1 << 13
_COLUMNS = 256  # a large vocabulary is searched as rows of this many tokens


# (token, exit_layer, positions, cache, ends, beyond), see `DraftSide.draft_greedily`.
DraftKernel = Callable[[Tensor, int, Tensor, KVCache, DraftEnds, Spans], GreedyDraft]


@dataclass(frozen=True)
class LayeredDraftSide:
    """Layers and a head that draft, see `DraftSide`. `shares_states`: the layers are the backend's own.

    `kernel` makes a whole greedy draft in one call; without it a draft goes step by step.
    """

    layers: Layers
    head: Callable[[Tensor], Tensor]  # (..., D) to logits (..., N)
    vocabulary: DraftVocabulary | None = None
    shares_states: bool = True
    kernel: DraftKernel | None = None

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
        self, token: Tensor, exit_layer: int, positions: Tensor, cache: KVCache, ends: DraftEnds, beyond: Spans = ()
    ) -> GreedyDraft:
        """As `DraftSide` says. Step by step the hidden states are those of all tokens that were run."""
        if self.kernel is not None:
            return self.kernel(token, exit_layer, positions, cache, ends, beyond)
        tokens, states, probs, survival = [token], [], [], 1.0
        for step in range(positions.shape[1]):
            place = positions[:, step : step + 1]
            hidden = self.layers.run_layers(self.layers.embed(tokens[-1]), 0, exit_layer, place, cache)
            states.append(hidden)
            hidden = run_spans(self.layers, hidden, beyond, place, cache)
            logits = self.head(hidden)
            if ends.needs_probs:
                prob = float(logits.float().softmax(-1).amax())
                if prob < ends.confidence:
                    break
                probs.append(prob)
                survival *= 1 - ends.doubt * (1 - prob) ** ends.power
            chosen = most_probable(logits)
            tokens.append(chosen if self.vocabulary is None else self.vocabulary.tokens(chosen))
            if survival < ends.survival or (ends.ids and int(tokens[-1]) in ends.ids):
                break
        return GreedyDraft(torch.cat(tokens, dim=1), torch.cat(states, dim=1), probs)


def run_spans(layers: Layers, hidden: Tensor, spans: Spans, positions: Tensor, cache: KVCache) -> Tensor:
    """Several spans of layers, one after the other; arguments as for `Layers.run_layers`."""
    for start, stop in spans:
        hidden = layers.run_layers(hidden, start, stop, positions, cache)
    return hidden


def most_probable(logits: Tensor) -> Tensor:
    """The token ids (...) with the largest of the logits (..., V); the first of several equal ones."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < _LARGE_VOCABULARY or vocabulary % _COLUMNS:
        return logits.argmax(-1)
    # On the CPU argmax takes five times as long as amax, so it searches only the row that has the maximum.
    rows = logits.view(*logits.shape[:-1], -1, _COLUMNS)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    return row[..., 0] * _COLUMNS + rows.take_along_dim(row[..., None], -2).argmax(-1)[..., 0]
