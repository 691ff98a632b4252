"""The draft side of every backend: layers and a head, step by step unless there is a kernel for whole drafts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .backend import DraftEnds, DraftSide, GreedyDraft, Layers, Submodel
from .cache import KVCache
from .draft_vocabulary import DraftVocabulary
from .exit_blocks import PlacedBlock
from .spans import joined, run_spans, states_at

_LARGE_VOCABULARY = 1 << 13
_COLUMNS = 256  # a large vocabulary is searched as rows of this many tokens


# The arguments of `DraftSide.draft_greedily`.
DraftKernel = Callable[[Tensor, Submodel, Tensor, KVCache, DraftEnds, Tensor | None], GreedyDraft]


@dataclass(frozen=True)
class LayeredDraftSide:
    """Layers and a head that draft, see `DraftSide`. `shares_states`: the layers are the backend's own.

    `kernel` makes a whole greedy draft in one call; without it a draft goes step by step.
    """

    layers: Layers
    num_layers: int  # without those of exit blocks
    head: Callable[[Tensor], Tensor]  # (..., D) to logits (..., N)
    exit_blocks: Mapping[int, PlacedBlock] = field(default_factory=dict)
    vocabulary: DraftVocabulary | None = None
    shares_states: bool = True
    kernel: DraftKernel | None = None

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
        self,
        token: Tensor,
        submodel: Submodel,
        positions: Tensor,
        cache: KVCache,
        ends: DraftEnds,
        feature: Tensor | None = None,
    ) -> GreedyDraft:
        """As `DraftSide` says. Step by step the hidden states are those of all tokens that were run."""
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
            chosen = most_probable(logits)
            tokens.append(chosen if self.vocabulary is None else self.vocabulary.tokens(chosen))
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
        hidden = side.run_layers(block.enter(states, feature), block.layer, block.layer + 1, positions, cache)
        return block.head(hidden), None if block.join is None else block.norm(hidden)
    return side.unembed(run_spans(side, states, submodel.beyond, positions, cache)), None


def most_probable(logits: Tensor) -> Tensor:
    """The token ids (...) with the largest of the logits (..., V); the first of several equal ones."""
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < _LARGE_VOCABULARY or vocabulary % _COLUMNS:
        return logits.argmax(-1)
    # On the CPU argmax takes five times as long as amax, so it searches only the row that has the maximum.
    rows = logits.view(*logits.shape[:-1], -1, _COLUMNS)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    return row[..., 0] * _COLUMNS + rows.take_along_dim(row[..., None], -2).argmax(-1)[..., 0]
