"""What decoding needs of a model. The protocols are complete: nothing about a backend is looked up at run time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.packing import Quantization
from .cache import KVCache
from .draft_vocabulary import DraftVocabulary
from .exit_blocks import PlacedBlock
from .spec import ModelSpec


class Layers(Protocol):
    """An embedding and a chain of layers. Hidden states are (B, T, D); `positions` (B, T) are on the host.

    The layers of exit blocks come after the `num_layers` of the model, as further layers of the chain.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D)."""

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Layers start..stop-1 over the hidden states of the tokens at `positions`; returns pre-norm hidden states.

        With a cache, the span's keys and values are written at the positions, and earlier ones are read. Without a cache the
        tokens see only each other.
        """


class GreedyDraft(NamedTuple):
    """K drafts for one prompt, chosen by argmax."""

    tokens: Tensor  # (1, K+1), the newest token first
    states: dict[int, Tensor]  # (1, K+1 or K, D) after each of the submodel's stops, of all tokens or of all but the last
    probs: list[float]  # of each draft, by the draft side's own head; empty if not asked for


Spans = tuple[tuple[int, int], ...]
"""Spans of layers (start, stop), in ascending order."""


@dataclass(frozen=True)
class Submodel:
    """What drafts: layers 0..exit_layer-1, what follows them, and a head (a sub-model: Elhoushi et al., 2024).

    The spans of layers `beyond` the exit follow, none for an exit of the model, and the draft side's head. Or the exit's
    `block`, one of `DraftSide.exit_blocks`, which has its own head. `taps`: ascending exits below, whose states are kept too.
    """

    exit_layer: int
    beyond: Spans = ()
    block: PlacedBlock | None = None
    taps: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
        """All counts of layers after which states are kept, ascending."""
        return (*self.taps, self.exit_layer)


class DraftEnds(NamedTuple):
    """Where a greedy draft ends, besides its largest length.

    After one of `ids`; before a token with less than `confidence`; and after a token if the probability that all drafts so far
    are accepted is below `survival`. For a token of probability p that is taken to be 1 - doubt (1 - p)^power. `wants_probs`:
    the probabilities are returned even if no threshold needs them.
    """

    ids: frozenset[int] = frozenset()
    confidence: float = 0.0
    survival: float = 0.0
    doubt: float = 1.0
    power: int = 1
    wants_probs: bool = False

    @property
    def needs_probs(self) -> bool:
        return self.wants_probs or self.confidence > 0 or self.survival > 0

    def length(self, probs: Sequence[float]) -> int | None:
        """How many drafts with these probabilities a draft has that ends at one of them; None if it goes on."""
        survival = 1.0
        for place, prob in enumerate(probs):
            if prob < self.confidence:
                return place
            survival *= 1 - self.doubt * (1 - prob) ** self.power
            if survival < self.survival:
                return place + 1
        return None


class DraftSide(Layers, Protocol):
    """What drafts for a backend: layers and a head, each either shared with the backend or a cheaper copy."""

    @property
    def shares_states(self) -> bool:
        """Whether its hidden states equal the backend's, so that verification can continue from them."""

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The tokens that its head scores; None for all."""

    @property
    def exit_blocks(self) -> Mapping[int, PlacedBlock]:
        """The blocks that it has, by their exits, with heads that score the same tokens."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (..., D) to logits (..., N), in the order of `vocabulary`."""

    def draft_greedily(
        self,
        token: Tensor,
        submodel: Submodel,
        positions: Tensor,
        cache: KVCache,
        ends: DraftEnds,
        feature: Tensor | None = None,
    ) -> GreedyDraft:
        """At most d drafts after `token` (1, 1), which stands at the first of `positions` (1, d).

        `feature` (1, 1, D): of the token, if the exit's block needs it. The cache needs room for one position more than
        `positions` has.
        """


Chooser = Callable[[Tensor, Tensor | None, int, int, Tensor, KVCache], Tensor | None]
"""Takes tokens (B, T), their states (B, T, D) after `start` layers or None for 0, and what follows `hidden` in `run_layers`.

Returns the tokens (B, T) with the largest of the logits after `stop` layers; None if they are too many for one call.
"""


class Backend(Layers, Protocol):
    """A causal language model as three operations: `unembed(run_layers(embed(ids), 0, L, positions))` gives its logits."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def implementation(self) -> str:
        """Which kernels run, for reports."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """The context limit, in tokens."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def exact(self) -> bool:
        """Whether calls are split so that a token has the same bits alone as among others. Such a backend takes one row."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a token has the same bits alone as among others, so that greedy outputs do not depend on what drafts."""

    @property
    def recordable(self) -> bool:
        """Whether passes over a WholeCache can be recorded and replayed on its device: its weights stay in their places."""

    @property
    def chooser(self) -> Chooser | None:
        """A kernel for layers, head and choice in one call; None if there is none."""

    @property
    def exit_blocks(self) -> Mapping[int, PlacedBlock]:
        """The blocks of its exits, by their exits."""

    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """What can draft, by the precision of its layers; None for the backend's own layers, which are always there."""

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for all layers. `max_positions` can only lower the context limit."""

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """Writes the keys and values of layers start..stop-1 as if `hidden` were the input of each of them.

        For tokens that left before layer `start` (state propagation: Schuster et al., NeurIPS 2022, section 3.3). Arguments as
        for `run_layers`; nothing is attended to.
        """

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm alone, (..., D)."""
