"""What decoding asks of a model, and what can draft for it. It is complete: decoding uses nothing
else of a backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.model import PackingConfig, Quantization
from ..config.resolution import MOST_DRAFTS
from .cache import KVCache, Places
from .eagle3 import Eagle3Weights
from .noise import Noise, perturbed
from .spec import AnySpec
from .vocabulary import DraftVocabulary, most_probable

Spans = tuple[tuple[int, int], ...]
"""Spans of layers (start, end), in ascending order."""


class Layers(Protocol):
    """An embedding and a chain of layers. Hidden states are (..., D), of the N tokens of a pass in
    order.

    The layers of exit blocks follow the model's in the chain.
    """

    @property
    def device(self) -> torch.device: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) to hidden states (..., D)."""

    def run_layers(self, hidden: Tensor, start: int, end: int, places: Places) -> Tensor:
        """Layers start..end-1 over the hidden states of the tokens at `places`; returns pre-norm
        hidden states.

        Writes each token's KV entries; a token attends to its row up to its own position.
        """

    def write_kv(self, hidden: Tensor, start: int, end: int, places: Places) -> None:
        """Writes the KV entries of layers start..end-1 as if `hidden` were the input of each layer.

        For tokens that exited before layer `start` (state propagation: Schuster et al., NeurIPS
        2022, section 3.3).
        """


def states_at(
    layers: Layers, hidden: Tensor, exits: Iterable[int], places: Places, start: int = 0
) -> dict[int, Tensor]:
    """The hidden states after each of `exits` layers (ascending), from those after `start`; see
    `Layers.run_layers`.
    """
    states = {}
    for end in exits:
        states[end] = hidden = layers.run_layers(hidden, start, end, places)
        start = end
    return states


class DraftBlock(ABC):
    """A block beside the model's layers that drafts: of an exit, MTP, EAGLE-3, or an assistant."""

    # The layers of the target after which it reads states, ascending; 0: the embedding. Drafts start
    # from the last.
    taps: tuple[int, ...] = ()
    # Whether it reads a feature of the previous token; then a text's first token has no KV entry
    needs_feature = False
    head: Callable[[Tensor], Tensor]  # norm and head, to logits (..., N)
    vocabulary: DraftVocabulary | None = None  # the N tokens that the head scores; None for all
    # Makes a whole draft in one call; None: use the draft side's
    kernel: "DraftKernel | None" = None

    @abstractmethod
    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        """The head's input, from tokens' states at the last tap and the features `before` of the
        tokens before them.
        """

    def write(
        self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        """Writes its KV entries, if it has any, from the target's states by `taps`."""
        return

    def features(
        self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor
    ) -> Tensor | None:
        """The features (..., D) of verified tokens, from the target's states by `taps` and after
        the last layer; None if it reads none.
        """
        return None

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        """The feature of a drafted token, from the output of `run` for it; None if it reads
        none.
        """
        return None


class ChainedBlock(DraftBlock):
    """A block that is a layer of the model's chain."""

    layer: int  # its index in the chain


@dataclass(frozen=True)
class Submodel:
    """The layers and head that draft (a sub-model: Elhoushi et al., 2024)."""

    exit_layer: int  # layers 0..exit_layer-1 run first; 0 for a block that reads embeddings
    beyond: Spans = ()  # then these (Draft & Verify)
    block: DraftBlock | None = None  # then this block with its head, else the draft side's head
    taps: tuple[int, ...] = ()  # ascending exits below `exit_layer`, whose states are returned too

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The counts of layers after which hidden states are returned, ascending."""
        return (*self.taps, self.exit_layer)


class DraftEnds(NamedTuple):
    """Stop conditions of a draft.

    A token's probability is the softmax of the logits, for a sample with its noise: it says how
    close other tokens came. One of probability p is assumed to be accepted with probability 1 -
    doubt (1 - p)^power.
    """

    ids: frozenset[int] = frozenset()  # stop after one of these tokens
    # Stop after the token that takes the probability of accepting the whole draft below this
    survival: float = 0.0
    doubt: float = 1.0
    power: int = 1

    @property
    def needs_probs(self) -> bool:
        return self.survival > 0

    def length(self, probs: Sequence[float], most: int) -> int:
        """The length of a draft, by the probabilities of its tokens; `most` if none of them stops
        it.
        """
        survival = 1.0
        for place, prob in enumerate(probs):
            survival *= 1 - self.doubt * (1 - prob) ** self.power
            if survival < self.survival:
                return min(place + 1, most)
        return most


class DraftHead(NamedTuple):
    """Norm and head of drafts."""

    unembed: Callable[[Tensor], Tensor]  # (..., D) to logits (..., N) in the order of `vocabulary`
    vocabulary: DraftVocabulary | None = None  # the N scored tokens; None for all

    def choose(self, logits: Tensor) -> Tensor:
        """The token ids (...) with the largest of the logits (..., N)."""
        chosen = most_probable(logits)
        if self.vocabulary is None:
            return chosen
        return self.vocabulary.tokens(chosen)


@dataclass(frozen=True)
class DraftCall:
    """Asks a `DraftKernel` for drafts of one row, after its newest token."""

    head: DraftHead
    # (n,), the newest token last. If n > 1, guesses are looked up in the text and verified in the
    # newest token's pass (only without `taps`).
    text: Tensor
    submodel: Submodel
    places: Places  # of the newest token and of d drafts at most
    ends: DraftEnds
    noise: Noise | None = None  # for d tokens
    feature: Tensor | None = None  # (1, D), of the token before the newest, if the block reads it
    runs_last: bool = True  # whether the last draft runs too


Drafted = tuple[Tensor, dict[int, Tensor], list[float]]
DraftKernel = Callable[[DraftCall], Drafted]
"""Returns the tokens (K+1,), the newest first; the states of those that ran, (K+1, D) or (K, D), by
`Submodel.state_layers`; and the probabilities of the drafts, empty if the ends need none."""


@dataclass(frozen=True)
class DraftSide:
    """Layers and heads that draft for a backend: its own, or cheaper copies."""

    layers: Layers
    num_layers: int  # without those of exit blocks
    whole: DraftHead  # after all layers, or after `Submodel.beyond`
    at_exits: DraftHead  # at exits without a block; may score fewer tokens
    exit_blocks: Mapping[int, ChainedBlock] = field(default_factory=dict)  # by exit
    # Hidden states equal the backend's, so verification can continue from them
    shares_states: bool = True
    kernel: DraftKernel | None = None  # makes a whole draft in one call

    def head(self, submodel: Submodel) -> DraftHead:
        if submodel.block is not None:
            return DraftHead(submodel.block.head, submodel.block.vocabulary)
        is_exit = submodel.exit_layer < self.num_layers and not submodel.beyond
        return self.at_exits if is_exit else self.whole


def beyond_exit(
    side: DraftSide, submodel: Submodel, states: Tensor, places: Places, feature: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Draft logits (..., N) from hidden states (..., D) at the exit, and the tokens' features for
    the next draft, or None.

    `feature` (..., D): of the tokens before, if the block needs it.
    """
    block = submodel.block
    if block is not None:
        hidden = block.run(side.layers, states, feature, places)
        return block.head(hidden), block.own_feature(hidden)
    for start, end in submodel.beyond:
        states = side.layers.run_layers(states, start, end, places)
    return side.head(submodel).unembed(states), None


@dataclass(frozen=True)
class TokenPass:
    """A pass through layers start..end-1 and the head, for N tokens."""

    tokens: Tensor  # (N,)
    places: Places
    end: int
    start: int = 0
    states: Tensor | None = None  # (N, D), after `start` layers; None: the tokens' embeddings
    taps: Sequence[int] = ()  # ascending, above `start`: layers after which states are returned
    noise: Noise | None = None  # added to the logits


Chosen = tuple[Tensor, dict[int, Tensor]]
"""The argmax token ids (N,) of a TokenPass, and the states (N, D) after each of its taps."""


class Backend(Layers, ABC):
    """A causal language model as three operations: `unembed(run_layers(embed(ids), 0, L, places))`
    gives its logits.
    """

    spec: AnySpec
    num_layers: int  # of the model, without those of exit blocks
    implementation: str  # the kernels, for reports
    exact = False  # splits passes to be batch-invariant; takes one row
    # A token's bits do not depend on the rest of its pass, so drafting changes no greedy output
    batch_invariant = False
    recordable = False  # passes can be recorded as CUDA graphs: no weight moves
    draft_model: "Backend | None" = None  # a smaller model with the same vocabulary
    exit_blocks: Mapping[int, ChainedBlock]  # by exit
    drafters: Mapping[str, DraftBlock]  # by strategy: `mtp`, `eagle3`

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    def row_cost(self) -> float:
        """Rough compute time of a token, in units of the time to read all weights from memory."""
        return 0.11

    def context_length(self, num_draft_tokens: int = MOST_DRAFTS) -> int:
        """Tokens of the longest text that fits the model's context and the memory for KV entries.

        `num_draft_tokens`: the most drafts per round. A text's memory in recurrent layers grows
        with them.
        """
        return self.spec.context

    @property
    @abstractmethod
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """By the precision of the layers; None: the backend's own layers."""

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for all layers. `max_positions`: at most the context."""
        context = self.spec.context
        return self._new_cache(batch_size, min(max_positions or context, context))

    @abstractmethod
    def _new_cache(self, batch_size: int, max_positions: int) -> KVCache: ...

    def choose(self, step: TokenPass) -> Chosen:
        """Runs a pass and chooses each token's next."""
        return choose_by_head(self, step)

    @abstractmethod
    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> DraftBlock:
        """A drafter in the EAGLE-3 layout, with its KV entries as layer `place` of the cache."""

    @abstractmethod
    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""

    @abstractmethod
    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm alone, (..., D)."""


def choose_by_head(
    model: Backend, step: TokenPass, add_noise: Callable[[Tensor, Noise], Tensor] = perturbed
) -> Chosen:
    """`Backend.choose` by `run_layers` and `unembed`."""
    hidden = model.embed(step.tokens) if step.states is None else step.states
    reached = states_at(
        model, hidden, dict.fromkeys((*step.taps, step.end)), step.places, step.start
    )
    logits = model.unembed(reached[step.end])
    if step.noise is not None:
        logits = add_noise(logits, step.noise)
    return most_probable(logits), reached


def states_at_exits(
    model: Backend, tokens: Tensor, places: Places, exit_layers: Iterable[int]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """(exit, hidden states (..., D) before its head, head) for each exit, of tokens (...) in one
    pass.
    """
    hidden = model.embed(tokens)
    for start, end in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, end, places)
        block = model.exit_blocks.get(end)
        if block is None:
            yield end, hidden, model.unembed
        else:
            yield end, block.run(model, hidden, None, places), block.head
