"""The protocols of a model that decodes. They are complete: decoding uses nothing else of a
backend.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.model import PackingConfig, Quantization
from ..errors import ConfigError, ContextError
from .cache import KVCache, Places
from .eagle3 import Eagle3Weights
from .exit_blocks import DraftBlock, PlacedBlock
from .noise import Noise, perturbed
from .spec import AnySpec
from .vocabulary import DraftVocabulary, most_probable

Spans = tuple[tuple[int, int], ...]
"""Spans of layers (start, stop), in ascending order."""


class Layers(Protocol):
    """An embedding and a chain of layers. Hidden states are (..., D), of the N tokens of a pass in
    order.

    The layers of exit blocks follow the `num_layers` of the model in the chain.
    """

    num_layers: int

    @property
    def device(self) -> torch.device: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) to hidden states (..., D)."""

    def run_layers(self, hidden: Tensor, start: int, stop: int, places: Places) -> Tensor:
        """Layers start..stop-1 over the hidden states of the tokens at `places`; returns pre-norm
        hidden states.

        Writes each token's KV entries; a token attends to its row up to its own position.
        """


def states_at(
    layers: Layers, hidden: Tensor, stops: Iterable[int], places: Places, start: int = 0
) -> dict[int, Tensor]:
    """The hidden states after each of `stops` layers (ascending), from those after `start`; see
    `Layers.run_layers`.
    """
    states = {}
    for stop in stops:
        states[stop] = hidden = layers.run_layers(hidden, start, stop, places)
        start = stop
    return states


@dataclass(frozen=True)
class Submodel:
    """The layers and head that draft (a sub-model: Elhoushi et al., 2024)."""

    exit_layer: int  # layers 0..exit_layer-1 run first; 0 for a block that reads embeddings
    beyond: Spans = ()  # then these (Draft & Verify)
    # Then this exit block with its head, else the draft side's head
    block: "DraftBlock | None" = None
    # Ascending exits below `exit_layer` whose hidden states are returned too
    taps: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
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
        return chosen if self.vocabulary is None else self.vocabulary.tokens(chosen)


Drafted = tuple[Tensor, dict[int, Tensor], list[float]]
DraftKernel = Callable[
    [DraftHead, Tensor, Submodel, Places, DraftEnds, Noise | None, Tensor | None, bool], Drafted
]
"""Drafts for one row: at most d tokens after the newest, which ends the text (n,); the places are for all d + 1, the noise, if
any, for d.

If n > 1, guesses are looked up in the text and verified in the newest token's pass (only without `taps`). The last arguments:
the newest token's feature (1, D), if the block needs one, and whether the last draft runs too. Returns the tokens (K+1,), the
newest first; the states of those that ran, (K+1, D) or (K, D), by the submodel's stops; and the probabilities of the drafts,
empty if the ends need none.
"""


@dataclass(frozen=True)
class DraftSide:
    """Layers and heads that draft for a backend: its own, or cheaper copies."""

    layers: Layers
    num_layers: int  # without those of exit blocks
    whole: DraftHead  # after all layers, or after `Submodel.beyond`
    at_exits: DraftHead  # at exits without a block; may score fewer tokens
    exit_blocks: Mapping[int, PlacedBlock] = field(default_factory=dict)  # by exit
    # Hidden states equal the backend's, so verification can continue from them
    shares_states: bool = True
    kernel: DraftKernel | None = None  # makes a whole draft in one call

    def head(self, submodel: Submodel) -> DraftHead:
        if (block := submodel.block) is not None:
            return DraftHead(block.head, block.vocabulary)
        return (
            self.at_exits
            if submodel.exit_layer < self.num_layers and not submodel.beyond
            else self.whole
        )


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
    for start, stop in submodel.beyond:
        states = side.layers.run_layers(states, start, stop, places)
    return side.head(submodel).unembed(states), None


class Backend(Layers, Protocol):
    """A causal language model as three operations: `unembed(run_layers(embed(ids), 0, L, places))`
    gives its logits.
    """

    implementation: str  # the kernels, for reports
    exact: bool  # splits passes to be batch-invariant; takes one row
    # A token's bits do not depend on the rest of its pass, so drafting changes no greedy output
    batch_invariant: bool
    recordable: bool  # passes can be recorded as CUDA graphs: no weight moves
    draft_model: "Backend | None"  # a smaller model with the same vocabulary

    @property
    def spec(self) -> AnySpec: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def row_cost(self) -> float:
        """Rough compute time of a token, in units of the time to read all weights from memory."""

    @property
    def room(self) -> int:
        """Tokens of the longest text that fits the context and the memory for KV entries, with
        adaptive drafting.
        """

    def room_for(self, num_draft_tokens: int) -> int:
        """As `room`, with at most `num_draft_tokens` drafts per round: a text's memory in recurrent
        layers grows with them.
        """

    @property
    def exit_blocks(self) -> Mapping[int, PlacedBlock]:
        """By exit."""

    @property
    def drafters(self) -> "Mapping[str, DraftBlock]":
        """By strategy: `mtp`, `eagle3`."""

    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """By the precision of the layers; None: the backend's own layers."""

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for all layers. `max_positions`: at most the context."""

    def choose(
        self,
        tokens: Tensor,
        states: Tensor | None,
        start: int,
        stop: int,
        kept: Sequence[int],
        places: Places,
        noise: Noise | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The argmax token ids (N,) after `stop` layers, and the states after each of `kept` layers
        (ascending, above `start`).

        `states` (N, D): of the tokens (N,) after `start` layers; None: their embeddings. `noise`:
        added to the logits.
        """

    def write_kv(self, hidden: Tensor, start: int, stop: int, places: Places) -> None:
        """Writes the KV entries of layers start..stop-1 as if `hidden` were the input of each
        layer.

        For tokens that exited before layer `start` (state propagation: Schuster et al., NeurIPS
        2022, section 3.3).
        """

    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> "DraftBlock":
        """A drafter in the EAGLE-3 layout, with its KV entries as layer `place` of the cache."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm alone, (..., D)."""


def choose_by_head(
    model: Backend,
    tokens: Tensor,
    states: Tensor | None,
    start: int,
    stop: int,
    kept: Sequence[int],
    places: Places,
    noise: Noise | None = None,
    add_noise: Callable[[Tensor, Noise], Tensor] = perturbed,
) -> tuple[Tensor, dict[int, Tensor]]:
    """`Backend.choose` by `run_layers` and `unembed`."""
    hidden = model.embed(tokens) if states is None else states
    reached = states_at(model, hidden, dict.fromkeys((*kept, stop)), places, start)
    logits = model.unembed(reached[stop])
    return most_probable(logits if noise is None else add_noise(logits, noise)), reached


def states_at_exits(
    model: Backend, tokens: Tensor, places: Places, exit_layers: Iterable[int]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """(exit, hidden states (..., D) before its head, head) for each exit, of tokens (...) in one
    pass.
    """
    hidden = model.embed(tokens)
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, places)
        block = model.exit_blocks.get(stop)
        if block is None:
            yield stop, hidden, model.unembed
        else:
            yield stop, model.run_layers(hidden, block.layer, block.layer + 1, places), block.head


def check_prompt(
    prompt_ids: list[int],
    model: Backend,
    what: str = "the prompt",
    num_draft_tokens: int = KVCache.steps_back,
) -> None:
    """Raises ConfigError for an empty prompt, ContextError if context or memory have no room for a
    token after it.

    `what`: the prompt's name in the error. `num_draft_tokens`: the most per round.
    """
    if not prompt_ids:
        raise ConfigError(f"{what} is empty")
    limit = model.room_for(num_draft_tokens)
    if len(prompt_ids) >= limit:
        why = (
            "the model's context is"
            if limit == model.spec.context
            else "the memory for keys and values has room for"
        )
        raise ContextError(
            f"{what} must be at most {limit - 1} tokens, got {len(prompt_ids)} ({why} {limit} tokens)"
        )
