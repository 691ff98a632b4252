"""The protocols that decoding needs of a model. They are complete: no backend is asked at run time for more."""

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
from .spec import AnySpec
from .vocabulary import DraftVocabulary, most_probable

Spans = tuple[tuple[int, int], ...]
"""Spans of layers (start, stop), in ascending order."""


class Layers(Protocol):
    """An embedding and a chain of layers. Hidden states are (..., D), of the N tokens of a pass in their order.

    The layers of exit blocks come after the `num_layers` of the model, as further layers of the chain.
    """

    num_layers: int

    @property
    def device(self) -> torch.device: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) to hidden states (..., D)."""

    def run_layers(self, hidden: Tensor, start: int, stop: int, places: Places) -> Tensor:
        """Layers start..stop-1 over the hidden states of the tokens at `places`; returns pre-norm hidden states.

        The span writes the tokens' keys and values, and each attends to those of its row up to its own.
        """


def states_at(layers: Layers, hidden: Tensor, stops: Iterable[int], places: Places, start: int = 0) -> dict[int, Tensor]:
    """The hidden states after each of some ascending counts of layers, from those after `start`; see `Layers.run_layers`."""
    states = {}
    for stop in stops:
        states[stop] = hidden = layers.run_layers(hidden, start, stop, places)
        start = stop
    return states


@dataclass(frozen=True)
class Submodel:
    """What drafts: layers 0..exit_layer-1 and what follows them (a sub-model: Elhoushi et al., 2024).

    An exit of the model ends with the draft side's head. Draft & Verify runs further spans of layers, `beyond`, before it. An
    exit block (`block`, one of the draft side's) has a head of its own. `taps`: ascending exits below `exit_layer` whose
    hidden states are returned too. A block that reads embeddings is at exit 0.
    """

    exit_layer: int
    beyond: Spans = ()
    block: "DraftBlock | None" = None
    taps: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
        """All counts of layers after which states are kept, ascending."""
        return (*self.taps, self.exit_layer)


class DraftEnds(NamedTuple):
    """What ends a greedy draft before its largest length.

    Attributes:
        ids: a draft ends after one of these tokens.
        confidence: it ends before a token of lower probability.
        survival: it ends after the token that lowers the probability that all drafts are accepted below this. A token of
            probability p is taken to be accepted with probability 1 - doubt (1 - p)^power.
    """

    ids: frozenset[int] = frozenset()
    confidence: float = 0.0
    survival: float = 0.0
    doubt: float = 1.0
    power: int = 1

    @property
    def needs_probs(self) -> bool:
        return self.confidence > 0 or self.survival > 0

    def length(self, probs: Sequence[float], most: int) -> int:
        """The length of a draft whose tokens have these probabilities: at most `most`, if it ends at none of them."""
        survival = 1.0
        for place, prob in enumerate(probs):
            if prob < self.confidence:
                return min(place, most)
            survival *= 1 - self.doubt * (1 - prob) ** self.power
            if survival < self.survival:
                return min(place + 1, most)
        return most


class DraftHead(NamedTuple):
    """What chooses drafts.

    Attributes:
        unembed: norm and head, (..., D) to logits (..., N) in the order of `vocabulary`.
        vocabulary: the tokens that it scores; None for all.
    """

    unembed: Callable[[Tensor], Tensor]
    vocabulary: DraftVocabulary | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """The token ids (...) with the largest of the logits (..., N)."""
        chosen = most_probable(logits)
        return chosen if self.vocabulary is None else self.vocabulary.tokens(chosen)


DraftKernel = Callable[
    [DraftHead, Tensor, Submodel, Places, DraftEnds, Tensor | None, bool], tuple[Tensor, dict[int, Tensor], list[float]]
]
"""Drafts greedily for one row: at most d tokens after the last of a text (n,), which has the first of d + 1 places.

In a text of several tokens guesses are looked up, which a pass verifies beside the newest token: for layers up to an exit
without earlier stops. The last arguments are that token's feature (1, D), if the block needs one, and whether the last draft
runs too. Returns the tokens (K+1,), the newest first; the states of those that ran, (K+1, D) or (K, D), after each of the
submodel's stops; and the probabilities of the drafts, empty if the ends need none.
"""


@dataclass(frozen=True)
class DraftSide:
    """Layers and heads that draft for a backend; each is shared with the backend or a cheaper copy.

    Attributes:
        layers: may be followed by those of exit blocks.
        num_layers: without those of exit blocks.
        whole: the head after all layers, or all but some.
        at_exits: the head at exits without a block, which may score fewer tokens.
        exit_blocks: by exit.
        shares_states: whether hidden states equal the backend's, so that verification can continue from them.
        kernel: makes a whole greedy draft in one call.
    """

    layers: Layers
    num_layers: int
    whole: DraftHead
    at_exits: DraftHead
    exit_blocks: Mapping[int, PlacedBlock] = field(default_factory=dict)
    shares_states: bool = True
    kernel: DraftKernel | None = None

    def head(self, submodel: Submodel) -> DraftHead:
        if (block := submodel.block) is not None:
            return DraftHead(block.head, block.vocabulary)
        return self.at_exits if submodel.exit_layer < self.num_layers and not submodel.beyond else self.whole


def beyond_exit(
    side: DraftSide, submodel: Submodel, states: Tensor, places: Places, feature: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (..., V) of the side's head from the states (..., D) of tokens after the exit, and the features of the next ones.

    `feature` (..., D): of these tokens, if the block needs it.
    """
    block = submodel.block
    if block is not None:
        hidden = block.run(side.layers, states, feature, places)
        return block.head(hidden), block.own_feature(hidden)
    for start, stop in submodel.beyond:
        states = side.layers.run_layers(states, start, stop, places)
    return side.head(submodel).unembed(states), None


class Backend(Layers, Protocol):
    """A causal language model as three operations: `unembed(run_layers(embed(ids), 0, L, places))` gives its logits.

    Attributes:
        spec: what the model is.
        implementation: which kernels run, for reports.
        exact: whether calls are split to be batch-invariant. Such a backend takes one row.
        batch_invariant: whether a token has the same bits alone as among others, so that drafts change no greedy output.
        row_cost: about how long a token's arithmetic takes, over the time in which memory gives all weights.
        recordable: whether passes can be recorded as CUDA graphs: no weight ever moves.
        room: positions of the longest text, which are the context's, or fewer if memory has no room for more.
        exit_blocks: the blocks of its exits, by their exits.
        drafters: beside it, by the strategy that drafts with each: `mtp`, `eagle3`.
        draft_model: a smaller model of the same vocabulary that drafts for it, if one was loaded.
        draft_sides: what can draft, by the precision of its layers; None stands for the backend's own layers.
    """

    implementation: str
    exact: bool
    batch_invariant: bool
    recordable: bool
    draft_model: "Backend | None"

    @property
    def spec(self) -> AnySpec: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def row_cost(self) -> float: ...
    @property
    def room(self) -> int: ...

    @property
    def exit_blocks(self) -> Mapping[int, PlacedBlock]: ...
    @property
    def drafters(self) -> "Mapping[str, DraftBlock]": ...
    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]: ...

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for all layers. `max_positions` can only lower the context limit."""

    def choose(
        self, tokens: Tensor, states: Tensor | None, start: int, stop: int, kept: Sequence[int], places: Places
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens (N,) with the largest of the logits after `stop` layers, and the states after some ascending counts of
        layers above `start`.

        `states` (N, D): of the tokens (N,) after `start` layers; None for their embeddings.
        """

    def write_kv(self, hidden: Tensor, start: int, stop: int, places: Places) -> None:
        """Writes the keys and values of layers start..stop-1 as if `hidden` were the input of each layer.

        For tokens that exited before layer `start` (state propagation: Schuster et al., NeurIPS 2022, section 3.3). Arguments
        as for `run_layers`.
        """

    def placed_eagle3(self, stored: Eagle3Weights, place: int, packing: PackingConfig) -> "DraftBlock":
        """A drafter in the EAGLE-3 layout, whose keys and values are those of layer `place` of the cache."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm alone, (..., D)."""


def choose_by_head(
    model: Backend, tokens: Tensor, states: Tensor | None, start: int, stop: int, kept: Sequence[int], places: Places
) -> tuple[Tensor, dict[int, Tensor]]:
    """`Backend.choose` by layers, head and the largest logits."""
    hidden = model.embed(tokens) if states is None else states
    reached = states_at(model, hidden, dict.fromkeys((*kept, stop)), places, start)
    return most_probable(model.unembed(reached[stop])), reached


def states_at_exits(
    model: Backend, tokens: Tensor, places: Places, exit_layers: Iterable[int]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """(exit, states (..., D) for its head, head) of tokens (...), in one pass."""
    hidden = model.embed(tokens)
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, places)
        block = model.exit_blocks.get(stop)
        if block is None:
            yield stop, hidden, model.unembed
        else:
            yield stop, model.run_layers(hidden, block.layer, block.layer + 1, places), block.head


def check_prompt(prompt_ids: list[int], model: Backend, what: str = "the prompt") -> None:
    """Raises ConfigError for a prompt that is empty, ContextError for one that leaves no room for a token in the context or in
    the memory for keys and values. `what`: its name in the error.
    """
    if not prompt_ids:
        raise ConfigError(f"{what} is empty")
    if len(prompt_ids) >= (limit := model.room):
        why = "the model's context is" if limit == model.spec.context else "the memory for keys and values has room for"
        raise ContextError(f"{what} must be at most {limit - 1} tokens, got {len(prompt_ids)} ({why} {limit} tokens)")
