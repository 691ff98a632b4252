"""How many layers the target runs for a token: always the same number, or as many as the token needs."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.exit_blocks import PlacedBlock, target_block
from ..model.spans import joined, states_at
from .drafters import Draft
from .true_states import TrueStates


class Pass(NamedTuple):
    """What the target makes of some tokens."""

    logits: Tensor | None  # (B, T, V)
    layers: int  # that gave them
    choices: Tensor | None = None  # (B, T), the most probable tokens, instead of logits if these are asked for nothing else


class Depth(Protocol):
    """The layers of the target, for the steps of one decoding."""

    @property
    def prompt_alike(self) -> bool:
        """Whether the cache has of the output's tokens what it would have if they were the prompt's."""

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        """Logits (B, 1, V) after each of the prompts (B, T), whose last tokens stand at the indices `last` (B,).

        The cache already has what comes before `positions`.
        """

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        """Logits (B, K+1, V), or choices, after each of the draft's tokens, which stand at `positions` (B, K+1)."""


class FixedDepth:
    """Layers 0..E-1 for every token; E = L is the whole model. The exit's block follows if it has one."""

    prompt_alike = True

    def __init__(
        self,
        model: Backend,
        layers: int,
        true_states: TrueStates | None = None,
        block: PlacedBlock | None = None,
        greedy: bool = False,
    ) -> None:
        """`true_states`: of the blocks that draft. `block`: that of exit E. `greedy`: logits are needed for choices only."""
        self._model, self.layers = model, layers
        self._only_chooses = greedy and true_states is None and block is None
        self._true_states, self._block = true_states, block
        self._taps = () if true_states is None else true_states.taps

    @property
    def name(self) -> Hashable:
        """Equal for two of one model whose passes differ in nothing but their inputs."""
        return self.layers, self._block is not None, self._taps

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        return self._pass(_at(self._run({0: self._model.embed(tokens)}, positions, cache), last))

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        """One pass through the layers that the draft's exit states leave."""
        tokens, states = draft.tokens, draft.exit_states
        if states and (known := states[max(states)].shape[1]) < tokens.shape[1]:
            last = states_at(self._model, self._model.embed(tokens[:, known:]), sorted(states), positions[:, known:], cache)
            states = joined((states, last))
        if self._only_chooses and self._model.chooser is not None:
            start = max(states, default=0)
            choices = self._model.chooser(tokens, states.get(start), start, self.layers, positions, cache)
            if choices is not None:
                return Pass(None, self.layers, choices)
        return self._pass(self._run(states or {0: self._model.embed(tokens)}, positions, cache))

    def _run(self, states: Mapping[int, Tensor], positions: Tensor, cache: KVCache) -> Tensor:
        """The layers after the highest of the `states`, and the exit's block."""
        start = max(states)
        stops = (*(tap for tap in self._taps if tap > start), self.layers)
        states = {**states, **states_at(self._model, states[start], stops, positions, cache, start)}
        hidden = states[self.layers]
        if self._true_states is not None:
            self._true_states.take([states[tap] for tap in self._taps], hidden, positions, cache)
        if self._block is not None:
            hidden = self._model.run_layers(hidden, self._block.layer, self._block.layer + 1, positions, cache)
        return hidden

    def _pass(self, hidden: Tensor) -> Pass:
        logits = self._model.unembed(hidden) if self._block is None else self._block.head(hidden)
        return Pass(logits, self.layers)


class DynamicDepth:
    """Each token leaves at the first exit whose most probable token has more than a probability (CALM).

    Confident Adaptive Language Modeling, Schuster et al., NeurIPS 2022, with the softmax of the exit as its confidence. Later
    tokens attend to a token that left at exit E in the layers above E too. Their keys and values are computed from the state
    at E (state propagation), but only when a later token first needs them: those of several tokens are then one pass.

    For one prompt, without drafts. The prompt runs through all layers, and its last token decides as every other. Exits are
    tested with the head that drafts, which may be one over the most frequent tokens; the token itself is one of all. Where an
    exit has a block, the block decides.
    """

    prompt_alike = False  # a prompt runs through all layers

    def __init__(self, model: Backend, exits: tuple[int, ...], confidence: float) -> None:
        """`exits`: ascending counts of layers below L. Raises ConfigError for an exit that can only draft."""
        self._model, self._draft_side = model, model.draft_sides[None]
        self._confidence = confidence
        self._stops = (*exits, model.num_layers)  # of the spans between exits
        self._blocks = {stop: target_block(model.exit_blocks, stop) for stop in self._stops}
        self._begin = 0  # position of the first token after the prompt
        self._left: list[Tensor] = []  # the state (1, 1, D) that each token after the prompt left with
        self._written = [0] * len(self._stops)  # by span: how many of these tokens have keys and values there

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        hidden, start, chosen = self._model.embed(tokens), 0, None
        for stop in self._stops:
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            scored = self._through_block(hidden, stop, positions, cache)
            chosen, start = chosen or self._leaving(_at(scored, last), stop), stop
        self._begin = int(positions[0, -1]) + 1
        assert chosen is not None
        return chosen

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        place = int(positions[0, 0]) - self._begin
        hidden, start = self._model.embed(draft.tokens), 0
        for span, stop in enumerate(self._stops):
            self._propagate(span, start, stop, place, cache)
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            self._written[span] = place + 1
            chosen = self._leaving(self._through_block(hidden, stop, positions, cache), stop)
            if chosen is not None:
                break
            start = stop
        assert chosen is not None
        self._left[place:] = [hidden]
        return chosen

    def _propagate(self, span: int, start: int, stop: int, place: int, cache: KVCache) -> None:
        """Writes the span's keys and values of the tokens before `place` that left below it."""
        written = self._written[span]
        if written < place:
            positions = torch.arange(self._begin + written, self._begin + place)[None]
            left = torch.cat(self._left[written:place], dim=1)
            self._model.write_kv(left, start, stop, positions, cache)
            if (block := self._blocks[stop]) is not None:
                self._model.write_kv(left, block.layer, block.layer + 1, positions, cache)

    def _through_block(self, hidden: Tensor, layers: int, positions: Tensor, cache: KVCache) -> Tensor:
        """The states after `layers` layers, and after the block of that exit if it has one."""
        block = self._blocks[layers]
        return hidden if block is None else self._model.run_layers(hidden, block.layer, block.layer + 1, positions, cache)

    def _leaving(self, hidden: Tensor, layers: int) -> Pass | None:
        """The logits (1, 1, V) after `layers` layers, and perhaps a block, if a token leaves with them."""
        block = self._blocks[layers]
        if layers < self._model.num_layers:
            drafting = self._draft_side.unembed if block is None else self._draft_side.exit_blocks[layers].head
            logits = drafting(hidden)
            if float(logits.float().softmax(-1).amax()) <= self._confidence:
                return None
            if self._draft_side.vocabulary is None:
                return Pass(logits, layers)
        return Pass(self._model.unembed(hidden) if block is None else block.head(hidden), layers)


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states (B, 1, D) of one token of each row, at the indices `places` (B,)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), places][:, None]
