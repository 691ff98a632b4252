"""The draft side of every backend: layers and a head, step by step unless there is a kernel for whole drafts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json
from .backend import DraftEnds, GreedyDraft, Layers, Submodel, joined, run_spans, states_at
from .cache import KVCache
from .exit_blocks import PlacedBlock

ORDER_FILE = "token_order.json"
_LARGE_VOCABULARY = 1 << 13
_COLUMNS = 256  # a large vocabulary is searched as rows of this many tokens


class DraftVocabulary:
    """The tokens that drafts are chosen from; the target scores all of them, so outputs stay the same.

    They are the first N of V tokens in some order, the most frequent first. Logits of drafts are in that order.
    """

    def __init__(self, total: int, count: int, order: list[int] | None = None) -> None:
        """`order`: distinct ids below V. Ids that it lacks follow in the order of their numbers, as they do without it."""
        self._left_out = max(0, total - count)
        self.ids: Tensor | None = None  # of the N tokens; None for 0..N-1
        if order is not None:
            known = set(order)
            self.ids = torch.tensor([*order, *(token for token in range(total) if token not in known)][:count])

    def rows_of(self, weight: Tensor) -> Tensor:
        """(V, ...) to (N, ...)."""
        return weight[: len(weight) - self._left_out] if self.ids is None else weight[self.ids.to(weight.device)]

    def tokens(self, indices: Tensor) -> Tensor:
        """Token ids (...) of indices (...) into the N tokens."""
        if self.ids is None:
            return indices
        self.ids = self.ids.to(indices.device, non_blocking=True)
        return self.ids[indices]

    def spread(self, probs: Tensor) -> Tensor:
        """Probabilities (..., N) as (..., V), with 0 for all other tokens."""
        padded = F.pad(probs, (0, self._left_out))
        if self.ids is None:
            return padded
        self.ids = self.ids.to(probs.device, non_blocking=True)
        return torch.zeros_like(padded).index_copy(-1, self.ids, probs)


DraftKernel = Callable[[Tensor, Submodel, Tensor, KVCache, DraftEnds, Tensor | None], GreedyDraft]
"""Makes a whole greedy draft in one call, from the arguments of `DraftSide.draft_greedily`."""


@dataclass(frozen=True)
class DraftSide:
    """Layers and a head that draft for a backend; each is shared with the backend or a cheaper copy.

    Attributes:
        layers: may be followed by those of exit blocks.
        num_layers: without those of exit blocks.
        unembed: final norm and head, (..., D) to logits (..., N) in the order of `vocabulary`.
        exit_blocks: by exit. Their heads score the tokens of `vocabulary`.
        vocabulary: the tokens that the heads score; None for all.
        shares_states: whether hidden states equal the backend's, so that verification can continue from them.
        kernel: makes a whole greedy draft in one call; without it a draft goes step by step.
    """

    layers: Layers
    num_layers: int
    unembed: Callable[[Tensor], Tensor]
    exit_blocks: Mapping[int, PlacedBlock] = field(default_factory=dict)
    vocabulary: DraftVocabulary | None = None
    shares_states: bool = True
    kernel: DraftKernel | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """The token ids (...) with the largest of the logits (..., N)."""
        chosen = most_probable(logits)
        return chosen if self.vocabulary is None else self.vocabulary.tokens(chosen)

    def draft_greedily(
        self,
        token: Tensor,
        submodel: Submodel,
        positions: Tensor,
        cache: KVCache,
        ends: DraftEnds,
        feature: Tensor | None = None,
    ) -> GreedyDraft:
        """Drafts at most d tokens after `token` (1, 1), whose position is the first of `positions` (1, d).

        `feature` (1, 1, D): the token's, if the exit block reads one. The cache needs room for d + 1 positions.
        """
        if self.kernel is not None:
            return self.kernel(token, submodel, positions, cache, ends, feature)
        looks = token.device.type == "cpu"  # elsewhere a look at a token waits for the device: all are looked at in the end
        tokens, kept = [token], []
        probs: list[float] = []
        unread: list[Tensor] = []
        for step in range(positions.shape[1]):
            place = positions[:, step : step + 1]
            kept.append(states_at(self.layers, self.layers.embed(tokens[-1]), submodel.stops, place, cache))
            logits, feature = beyond_exit(self, submodel, kept[-1][submodel.exit_layer], place, cache, feature)
            tokens.append(self.choose(logits))
            if ends.needs_probs:
                prob = logits.float().softmax(-1).amax()
                if not looks:
                    unread.append(prob)
                else:
                    probs.append(float(prob))
                    if ends.length(probs) is not None:
                        break
            if ends.ids and int(tokens[-1]) in ends.ids:
                break
        if unread:
            probs = torch.stack(unread).tolist()
        if (length := ends.length(probs)) is not None:
            tokens, kept, probs = tokens[: length + 1], kept[: length + 1], probs[:length]
        return GreedyDraft(torch.cat(tokens, dim=1), joined(kept), probs)


def beyond_exit(
    side: DraftSide, submodel: Submodel, states: Tensor, positions: Tensor, cache: KVCache, feature: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, 1, N) from the states (B, 1, D) of one token of each row after the exit, and the feature of the next token.

    `feature` (B, 1, D): of these tokens, if the exit's block needs it.
    """
    block = submodel.block
    if block is not None:
        hidden = side.layers.run_layers(block.enter(states, feature), block.layer, block.layer + 1, positions, cache)
        return block.head(hidden), None if block.join is None else block.norm(hidden)
    return side.unembed(run_spans(side.layers, states, submodel.beyond, positions, cache)), None


def most_probable(logits: Tensor) -> Tensor:
    """The token ids (...) with the largest of the logits (..., V); the first of several equal ones."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < _LARGE_VOCABULARY or vocabulary % _COLUMNS:
        return logits.argmax(-1)
    # On the CPU argmax takes five times as long as amax, so it searches only the row that has the maximum.
    rows = logits.view(*logits.shape[:-1], -1, _COLUMNS)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    return row[..., 0] * _COLUMNS + rows.take_along_dim(row[..., None], -2).argmax(-1)[..., 0]


def token_order(folder: str | Path, vocab_size: int) -> list[int] | None:
    """The content of a checkpoint's ORDER_FILE: distinct token ids, the most frequent of its training data first.

    None if there is no such file. Raises CheckpointError if it holds anything else.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    order: list[int] = read_json(path, CheckpointError, list[int])
    if len(set(order)) < len(order) or not all(0 <= token < vocab_size for token in order):
        raise CheckpointError(f"{path} must be a list of distinct token ids below {vocab_size}")
    return order
