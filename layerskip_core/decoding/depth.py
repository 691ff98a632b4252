"""How many layers the target runs for a token: always the same number, or as many as the token needs."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.backend import Backend
from ..model.cache import KVCache
from .drafters import Draft


class Pass(NamedTuple):
    """What the target makes of some tokens."""

    logits: Tensor  # (B, T, V)
    layers: int  # that gave them


class Depth(Protocol):
    """The layers of the target, for the steps of one decoding."""

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        """Logits (B, 1, V) after each of the prompts (B, T), whose last tokens stand at the indices `last` (B,)."""

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        """Logits (B, K+1, V) after each of the draft's tokens, which stand at `positions` (B, K+1)."""


class FixedDepth:
    """Layers 0..E-1 for every token; E = L is the whole model."""

    def __init__(self, model: Backend, layers: int) -> None:
        self._model, self._layers = model, layers

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        hidden = self._model.run_layers(self._model.embed(tokens), 0, self._layers, positions, cache)
        return Pass(self._model.unembed(_at(hidden, last)), self._layers)

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        return Pass(target_logits(self._model, draft, positions, cache, self._layers), self._layers)


class DynamicDepth:
    """Each token leaves at the first exit whose most probable token has more than a probability (CALM).

    Confident Adaptive Language Modeling, Schuster et al., NeurIPS 2022, with the softmax of the exit as its confidence. Later
    tokens attend to a token that left at exit E in the layers above E too. Their keys and values are computed from the state
    at E (state propagation), but only when a later token first needs them: those of several tokens are then one pass.

    For one prompt, without drafts. The prompt runs through all layers, and its last token decides as every other. Exits are
    tested with the head that drafts, which may be one over the most frequent tokens; the token itself is one of all.
    """

    def __init__(self, model: Backend, exits: tuple[int, ...], confidence: float) -> None:
        """`exits`: ascending counts of layers below L."""
        self._model, self._draft_side = model, model.draft_sides[None]
        self._confidence = confidence
        self._stops = (*exits, model.num_layers)  # of the spans between exits
        self._begin = 0  # position of the first token after the prompt
        self._left: list[Tensor] = []  # the state (1, 1, D) that each token after the prompt left with
        self._written = [0] * len(self._stops)  # by span: how many of these tokens have keys and values there

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> Pass:
        hidden, start, chosen = self._model.embed(tokens), 0, None
        for stop in self._stops:
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            chosen, start = chosen or self._leaving(_at(hidden, last), stop), stop
        self._begin = positions.shape[1]
        assert chosen is not None
        return chosen

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> Pass:
        place = int(positions[0, 0]) - self._begin
        hidden, start = self._model.embed(draft.tokens), 0
        for span, stop in enumerate(self._stops):
            self._propagate(span, start, stop, place, cache)
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            self._written[span] = place + 1
            chosen = self._leaving(hidden, stop)
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
            self._model.propagate(torch.cat(self._left[written:place], dim=1), start, stop, positions, cache)

    def _leaving(self, hidden: Tensor, layers: int) -> Pass | None:
        """The logits (1, 1, V) after `layers` layers if a token leaves with them."""
        if layers < self._model.num_layers:
            logits = self._draft_side.unembed(hidden)
            if float(logits.float().softmax(-1).amax()) <= self._confidence:
                return None
            if self._draft_side.vocabulary is None:
                return Pass(logits, layers)
        return Pass(self._model.unembed(hidden), layers)


def target_logits(model: Backend, draft: Draft, positions: Tensor, cache: KVCache, target_layers: int) -> Tensor:
    """Logits (B, K+1, V) after each of the draft's tokens: one pass through the layers that its exit states leave."""
    tokens, hidden = draft.tokens, draft.exit_states
    if hidden is None:
        hidden = model.run_layers(model.embed(tokens), 0, target_layers, positions, cache)
    else:
        known = hidden.shape[1]
        if known < tokens.shape[1]:
            last = model.run_layers(model.embed(tokens[:, known:]), 0, draft.exit_layer, positions[:, known:], cache)
            hidden = torch.cat((hidden, last), dim=1)
        hidden = model.run_layers(hidden, draft.exit_layer, target_layers, positions, cache)
    return model.unembed(hidden)


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states (B, 1, D) of one token of each row, at the indices `places` (B,)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), places][:, None]
