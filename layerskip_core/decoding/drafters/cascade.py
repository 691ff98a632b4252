"""Drafts of drafts (ML-SpecQD: Georganas et al., 2025): a copy of the target verifies guesses while it drafts.

A pass of the copy goes on from its newest token and from each guess that it agrees with, so its drafts are those that it makes
token by token, of the same random numbers too, in fewer passes. Guesses are looked up, or made by a drafter beside the model.
Greedy drafts of one row on our kernels, with lookups alone, are made so in C.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...model.backend import Backend, DraftEnds, DraftHead, DraftSide, states_at
from ..output import Row
from ..sampling import Sampler
from ..target import ExitBlockCache
from . import Context, Draft
from .lookup import SHORTEST, History

if TYPE_CHECKING:
    from .exit import ExitDrafter

_GUESSES = 4  # of all rows of a pass; by a drafter 2 of each
_BY_DRAFTER = 2

Guesses = dict[int, list[int]]  # by row, of those that go on


class Cascade:
    """Drafts of a copy of `model` for any rows, greedy or sampled."""

    def __init__(
        self,
        model: Backend,
        side: DraftSide,
        head: DraftHead,
        sampler: Sampler,
        source: str,
        beside: "ExitDrafter | None" = None,
    ) -> None:
        """`beside`: drafts for rows in whose text nothing is found; greedily, from what it reads of the copy's own states."""
        self._side, self._head, self._sampler, self._source, self._beside = side, head, sampler, source, beside
        block = None if beside is None else beside.submodel.block
        self._entries = ExitBlockCache(model, {beside.source: block}) if beside and block else None
        self._histories = dict[Row, History]()

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds) -> Draft:
        drafts, probs = [list[int]() for _ in limits], [list[Tensor]() for _ in limits]
        likely, rooms = [list[float]() for _ in limits], list(limits)
        self._histories = {row: self._histories.get(row) or History(SHORTEST) for row in context.rows}
        features = [*map(dict, context.cache.features)]
        while going := [row for row, room in enumerate(rooms) if len(drafts[row]) < room]:
            guesses = self._guesses(context, drafts, {row: rooms[row] - len(drafts[row]) - 1 for row in going})
            logits, first, last = self._logits(context, drafts, guesses), 0, dict[int, int]()
            drawn_from = self._sampler.probs(logits)
            best = self._sampler.choose(logits, None, ()).tolist() if drawn_from is None else ()
            largest: Sequence[float] = ()
            if ends.needs_probs:
                largest = (logits.float().softmax(-1) if drawn_from is None else drawn_from).amax(-1).tolist()
            for row, guessed in guesses.items():
                own = drafts[row]
                for place, guess in enumerate((*guessed, None), start=first):
                    if largest:  # judged before a token is drawn: dropping a drawn one by its probability would bias samples
                        likely[row].append(largest[place])
                        rooms[row] = ends.length(likely[row], rooms[row])
                        if len(own) == rooms[row]:
                            break
                    if drawn_from is None:
                        own.append(best[place])
                    else:
                        probs[row].append(drawn_from[place])
                        here = slice(place, place + 1)
                        own.append(int(self._sampler.choose(logits[here], drawn_from[here], [context.rows[row]])))
                    last[context.indices[row]] = place
                    rooms[row] = len(own) if own[-1] in ends.ids else rooms[row]
                    if own[-1] != guess or len(own) == rooms[row]:
                        break
                first += 1 + len(guessed)
            if self._entries is not None:
                self._entries.go_on(context.cache, last)
        context.cache.features = features  # what the target's pass goes on from
        tokens = torch.tensor([token for ids, own in zip(context.ids, drafts, strict=True) for token in (ids[-1], *own)])
        kept, counts = [part for own in probs for part in own], tuple(map(len, drafts))
        confidence = likely[0][: counts[0]] if len(counts) == 1 else ()
        all_probs = torch.stack(kept) if kept else None
        return Draft(tokens, counts, all_probs, source=self._source, confidence=confidence, ran=counts)

    def _guesses(self, context: Context, drafts: list[list[int]], rooms: dict[int, int]) -> Guesses:
        """Fewer than `rooms` allow by one, because a pass gives one token more."""
        guesses, most = Guesses(), _GUESSES // len(rooms)
        for row, room in rooms.items():
            text, given = context.rows[row], min(most, room)
            tokens, evidence = self._histories[text].continuation(text.ids, given, drafts[row]) if given > 0 else ([], 0)
            guesses[row] = tokens[:evidence]
        limits = [0 if guesses.get(row, [0]) else min(_BY_DRAFTER, rooms[row]) for row in range(len(drafts))]
        if self._beside is None or not any(limits):
            return guesses
        newest, filled = torch.tensor(_newest(context, drafts)), list(context.filled)
        for index, own in zip(context.indices, drafts, strict=True):
            filled[index] += len(own)
        draft = self._beside.draft(replace(context, newest=newest, filled=filled), limits)
        drafted = (tokens[1:].tolist() for tokens in draft.by_row())
        return {row: guesses[row] or own for row, own in enumerate(drafted) if row in guesses}

    def _logits(self, context: Context, drafts: list[list[int]], guesses: Guesses) -> Tensor:
        """(N, V), after the newest token and each guess of the rows that go on."""
        side, few, newest = self._side, self._head.vocabulary, _newest(context, drafts)
        counts = [1 + len(guesses[row]) if row in guesses else 0 for row in range(len(drafts))]
        tokens = torch.tensor([token for row, own in guesses.items() for token in (newest[row], *own)])
        places, hidden = context.places(counts, [*map(len, drafts)]), side.layers.embed(tokens)
        taps = () if self._entries is None else (tap for tap in self._entries.taps if tap)
        states = {0: hidden, **states_at(side.layers, hidden, dict.fromkeys((*taps, side.num_layers)), places)}
        hidden = states[side.num_layers]
        if self._entries is not None:
            self._entries.write(states, hidden, places)
        logits = self._head.unembed(hidden)
        return logits if few is None else few.spread(logits, -torch.inf)


def _newest(context: Context, drafts: list[list[int]]) -> list[int]:
    return [(own or ids)[-1] for own, ids in zip(drafts, context.ids, strict=True)]
