"""Drafts of drafts (ML-SpecQD: Georganas et al., 2025): a copy of the target verifies guesses while
it drafts.

A pass of the copy runs its newest token and guesses of the next ones, and continues after each
guess that it agrees with: the same drafts as token by token, in fewer passes. Guesses are lookups
(those of a trained drafter were slower). Our kernels do the same in C for a draft of one row.
"""

from collections.abc import Sequence

import torch

from ...model.backend import DraftEnds, DraftHead, DraftSide
from ..output import Row
from ..sampling import Sampler, Scores
from . import Context, Draft
from .lookup import SHORTEST, History

_GUESSES = 4  # per pass, of all rows together

Guesses = dict[int, list[int]]  # by unfinished row


class Cascade:
    """Drafts with a copy, for any number of rows, greedy or sampled."""

    def __init__(self, side: DraftSide, head: DraftHead, sampler: Sampler, source: str) -> None:
        self._side = side
        self._head = head
        self._sampler = sampler
        self._source = source
        self._histories = dict[Row, History]()

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds) -> Draft:
        drafts = [list[int]() for _ in limits]
        likely = [list[float]() for _ in limits]
        rooms = list(limits)
        self._histories = {
            row: self._histories.get(row) or History(SHORTEST) for row in context.rows
        }
        while going := [row for row, room in enumerate(rooms) if len(drafts[row]) < room]:
            guesses = self._guesses(
                context, drafts, {row: rooms[row] - len(drafts[row]) - 1 for row in going}
            )
            scores = self._scores(context, drafts, guesses)
            best = self._sampler.best(scores).tolist()
            largest: Sequence[float] = ()
            if ends.needs_probs:
                largest = scores.values.float().softmax(-1).amax(-1).tolist()
            first = 0
            for row, guessed in guesses.items():
                own = drafts[row]
                for place, guess in enumerate((*guessed, None), start=first):
                    if largest:
                        likely[row].append(largest[place])
                        rooms[row] = ends.length(likely[row], rooms[row])
                        if len(own) == rooms[row]:
                            break
                    own.append(best[place])
                    rooms[row] = len(own) if own[-1] in ends.ids else rooms[row]
                    if own[-1] != guess or len(own) == rooms[row]:
                        break
                first += 1 + len(guessed)
        tokens = torch.tensor(
            [
                token
                for ids, own in zip(context.ids, drafts, strict=True)
                for token in (ids[-1], *own)
            ]
        )
        counts = tuple(map(len, drafts))
        confidence = likely[0][: counts[0]] if len(counts) == 1 else ()
        return Draft(tokens, counts, source=self._source, confidence=confidence, ran=counts)

    def _guesses(self, context: Context, drafts: list[list[int]], rooms: dict[int, int]) -> Guesses:
        """By row at most `rooms[row]` guesses; a pass adds one token more than it has guesses."""
        guesses = Guesses()
        most = _GUESSES // len(rooms)
        for row, room in rooms.items():
            text = context.rows[row]
            given = min(most, room)
            tokens, evidence = (
                self._histories[text].continuation(text.ids, given, drafts[row])
                if given > 0
                else ([], 0)
            )
            guesses[row] = tokens[:evidence]
        return guesses

    def _scores(self, context: Context, drafts: list[list[int]], guesses: Guesses) -> Scores:
        """After the newest token and each guess of unfinished rows."""
        layers = self._side.layers
        few = self._head.vocabulary
        newest = [(own or ids)[-1] for own, ids in zip(drafts, context.ids, strict=True)]
        counts = [1 + len(guesses[row]) if row in guesses else 0 for row in range(len(drafts))]
        tokens = torch.tensor(
            [token for row, own in guesses.items() for token in (newest[row], *own)]
        )
        hidden = layers.run_layers(
            layers.embed(tokens),
            0,
            self._side.num_layers,
            context.places(counts, [*map(len, drafts)]),
        )
        logits = self._head.unembed(hidden)
        rows = [context.rows[row] for row in guesses]
        ahead = [len(drafts[row]) for row in guesses]
        noise = self._sampler.noise(rows, ahead, [1 + len(own) for own in guesses.values()])
        return self._sampler.scores(
            logits, noise, None if few is None else few.ids_on(logits.device)
        )
