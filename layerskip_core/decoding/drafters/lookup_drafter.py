"""Drafts by lookups, and by tokens that a grammar forces."""

from collections.abc import Sequence

from ...model.cache import on_device
from ..row import Row
from .lookup import _OF_ANSWERS, SHORTEST, EarlierAnswers, RowLookup
from .protocol import Draft, Drafter, DrafterSetup, DraftInput

Found = list[tuple[list[int], int]]
"""By row: a draft, cut after an EOS, and its evidence, see `History.continuation`."""
_NOTHING: tuple[list[int], int] = [], 0


class LookupDrafter:
    """Drafts what followed earlier occurrences of the last tokens.

    If no row has a match, the drafter `otherwise` drafts, if there is one.
    """

    def __init__(
        self,
        shortest: int,
        otherwise: Drafter | None = None,
        earlier: EarlierAnswers | None = None,
    ) -> None:
        """`shortest`: how many tokens must match; 0: only tokens that a grammar forces are drafted.

        `earlier`: answers that are searched too; the better match drafts.
        """
        self.otherwise = otherwise
        self._shortest = shortest
        self._own = RowLookup(shortest) if shortest else None
        self._earlier = earlier
        self._drafted_last: Drafter | None = None  # `otherwise`, if it drafted last

    def draft(self, given: DraftInput, limits: Sequence[int]) -> Draft:
        forced = [given.forced(index, limit) for index, limit in enumerate(limits)]
        found = list[list[int]]()
        lookups = zip(forced, self.find(given, limits), self.recall(given, limits), strict=True)
        for must, (own, evidence), (answer, of_answer) in lookups:
            is_better = of_answer > evidence and of_answer >= max(self._shortest, _OF_ANSWERS)
            found.append(must or (answer if is_better else own))
        self._drafted_last = None if any(found) else self.otherwise
        if self._drafted_last is not None:
            return self._drafted_last.draft(given, limits)
        return copied(given, found, "grammar" if any(forced) else "lookup")

    def find(self, given: DraftInput, limits: Sequence[int]) -> Found:
        """Looks up each row's own text."""
        own = self._own
        if own is None:
            return [_NOTHING] * len(limits)
        rows = zip(given.rows, limits, strict=True)
        return [_ended(row, *own.continuation(row, limit)) for row, limit in rows]

    def recall(self, given: DraftInput, limits: Sequence[int]) -> Found:
        """Looks up earlier answers."""
        earlier = self._earlier
        if not earlier:
            return [_NOTHING] * len(limits)
        rows = zip(given.rows, limits, strict=True)
        return [_ended(row, *earlier.continuation(row.ids, limit)) for row, limit in rows]

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        if self._drafted_last is not None:
            self._drafted_last.observe(row, drafted, verified)


def _ended(row: Row, tokens: list[int], evidence: int) -> tuple[list[int], int]:
    """Cuts a draft after an EOS, or before a token that the row's grammar forbids."""
    for count, token in enumerate(tokens, start=1):
        if token in row.eos_ids:
            tokens = tokens[:count]
            break
    if row.processor is not None and tokens:
        tokens = row.processor.permitted(tokens)
    return tokens, evidence


def copied(given: DraftInput, drafts: Sequence[list[int]], source: str = "lookup") -> Draft:
    """Token lists as a draft."""
    counts = tuple(map(len, drafts))
    if not any(counts):
        return Draft(given.newest, counts, source=source)
    tokens = list[int]()
    for row, own in zip(given.rows, drafts, strict=True):
        tokens += [row.ids[-1], *own]
    return Draft(on_device(tokens, given.newest), counts, source=source)


def drafter(setup: DrafterSetup) -> LookupDrafter:
    return LookupDrafter(setup.config.lookup or SHORTEST, earlier=setup.earlier)
