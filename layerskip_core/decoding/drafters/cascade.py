"""Drafts of drafts (ML-SpecQD: Georganas et al., 2025): a copy of the target verifies guesses while it drafts.

A pass of the copy runs its newest token and guesses of the next ones, and continues after each guess that it agrees with: the
same drafts as token by token, from the same random numbers, in fewer passes. Guesses are lookups (those of a trained drafter
were slower). Our kernels do the same in C for a greedy draft of one row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.backend import DraftEnds, DraftHead, DraftSide
from ..output import Row
from ..sampling import Sampler
from . import Context, Draft
from .lookup import SHORTEST, History

_GUESSES = 4  # per pass, of all rows together

Guesses = dict[int, list[int]]  # by unfinished row


class Cascade:
    """Drafts with a copy, for any number of rows, greedy or sampled."""

    def __init__(self, side: DraftSide, head: DraftHead, sampler: Sampler, source: str) -> None:
        self._side, self._head, self._sampler, self._source = side, head, sampler, source
        self._histories = dict[Row, History]()

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds) -> Draft:
        drafts, probs = [list[int]() for _ in limits], [list[Tensor]() for _ in limits]
        likely, rooms = [list[float]() for _ in limits], list(limits)
        self._histories = {row: self._histories.get(row) or History(SHORTEST) for row in context.rows}
        while going := [row for row, room in enumerate(rooms) if len(drafts[row]) < room]:
            guesses = self._guesses(context, drafts, {row: rooms[row] - len(drafts[row]) - 1 for row in going})
            logits, first = self._logits(context, drafts, guesses), 0
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
                    rooms[row] = len(own) if own[-1] in ends.ids else rooms[row]
                    if own[-1] != guess or len(own) == rooms[row]:
                        break
                first += 1 + len(guessed)
        tokens = torch.tensor([token for ids, own in zip(context.ids, drafts, strict=True) for token in (ids[-1], *own)])
        kept, counts = [part for own in probs for part in own], tuple(map(len, drafts))
        confidence = likely[0][: counts[0]] if len(counts) == 1 else ()
        all_probs = torch.stack(kept) if kept else None
        return Draft(tokens, counts, all_probs, source=self._source, confidence=confidence, ran=counts)

    def _guesses(self, context: Context, drafts: list[list[int]], rooms: dict[int, int]) -> Guesses:
        """By row at most `rooms[row]` guesses; a pass adds one token more than it has guesses."""
        guesses, most = Guesses(), _GUESSES // len(rooms)
        for row, room in rooms.items():
            text, given = context.rows[row], min(most, room)
            tokens, evidence = self._histories[text].continuation(text.ids, given, drafts[row]) if given > 0 else ([], 0)
            guesses[row] = tokens[:evidence]
        return guesses

    def _logits(self, context: Context, drafts: list[list[int]], guesses: Guesses) -> Tensor:
        """(N, V), after the newest token and each guess of unfinished rows."""
        layers, few = self._side.layers, self._head.vocabulary
        newest = [(own or ids)[-1] for own, ids in zip(drafts, context.ids, strict=True)]
        counts = [1 + len(guesses[row]) if row in guesses else 0 for row in range(len(drafts))]
        tokens = torch.tensor([token for row, own in guesses.items() for token in (newest[row], *own)])
        hidden = layers.run_layers(layers.embed(tokens), 0, self._side.num_layers, context.places(counts, [*map(len, drafts)]))
        logits = self._head.unembed(hidden)
        return logits if few is None else few.spread(logits, -torch.inf)
