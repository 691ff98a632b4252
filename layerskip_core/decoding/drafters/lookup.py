"""Drafts copied from the text so far: prompt lookup decoding (Saxena, 2023), over the prompt and the output."""

from collections.abc import Sequence

from torch import tensor

from ..sampling import Verdict
from . import Context, Draft, Drafter, DrafterSetup

SHORTEST = 2  # tokens that must match, unless told otherwise
_LONGEST = 16  # tokens of a match that are compared
_CANDIDATES = 8  # earlier occurrences that are compared, the latest first


class History:
    """One row's tokens, indexed by every run of `shortest` of them."""

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where the text goes on after each run
        self._indexed = 0  # runs that end here or before are in the index

    def continuation(self, ids: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest match of the last ones, and their evidence; none and 0 for no match.

        The evidence is by how many tokens this match is longer than any that went on otherwise: where solved examples in a
        prompt begin alike, matches are long and say little. The last tokens are not their own match. A continuation that
        reaches the end of the text goes on with itself, which continues a repetition. `ids` are those of the last call and
        what was added to them.
        """
        size, end = self._shortest, len(ids)
        for stop in range(max(self._indexed + 1, size), end):
            self._ends.setdefault(tuple(ids[stop - size : stop]), []).append(stop)
        self._indexed = max(self._indexed, end - 1)
        start, longest = 0, 0
        by_next: dict[int, int] = {}  # the longest match before each token that followed one
        for candidate in self._ends.get(tuple(ids[end - size :]), [])[: -_CANDIDATES - 1 : -1]:
            match = size
            while match < min(_LONGEST, candidate) and ids[candidate - match - 1] == ids[end - match - 1]:
                match += 1
            by_next[ids[candidate]] = max(match, by_next.get(ids[candidate], 0))
            if match > longest:
                start, longest = candidate, match
        if not longest:
            return [], 0
        del by_next[ids[start]]
        period = end - start
        return [ids[start + place % period] for place in range(most)], longest - max(by_next.values(), default=0)


class LookupDrafter:
    """Drafts what followed the last tokens where they occurred before. A draft is certain: it has no probabilities.

    Where no row has a match, the drafter `otherwise` drafts, if there is one.
    """

    source = "lookup"

    def __init__(self, shortest: int, eos_ids: frozenset[int] = frozenset(), otherwise: Drafter | None = None) -> None:
        """`shortest`: how many tokens must match."""
        self._shortest = shortest
        self._eos_ids = eos_ids
        self._otherwise = otherwise
        self._histories: dict[int, History] = {}
        self._otherwise_drafted = False

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        self.keep_rows(context.rows)
        found = [self.find(row, ids, limit)[0] for row, ids, limit in zip(context.rows, context.ids, limits, strict=True)]
        self._otherwise_drafted = self._otherwise is not None and not any(found)
        if self._otherwise is not None and self._otherwise_drafted:
            return self._otherwise.draft(context, limits)
        return copied(context, found)

    def find(self, row: int, ids: Sequence[int], most: int) -> tuple[list[int], int]:
        """A row's draft, which ends after an EOS, and its evidence, see `History.continuation`."""
        history = self._histories.setdefault(row, History(self._shortest))
        tokens, evidence = history.continuation(ids, max(most, 0))
        if self._eos_ids:
            end = next((place for place, token in enumerate(tokens, start=1) if token in self._eos_ids), len(tokens))
            tokens = tokens[:end]
        return tokens, evidence

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets the texts of all rows but these: a loop that others join has ever new ones."""
        if len(self._histories) > len(rows):
            self._histories = {row: self._histories[row] for row in rows if row in self._histories}

    def observe(self, verdict: Verdict) -> None:
        if self._otherwise is not None and self._otherwise_drafted:
            self._otherwise.observe(verdict)


def copied(context: Context, drafts: Sequence[list[int]]) -> Draft:
    """Token lists as a draft, padded to the longest."""
    source = LookupDrafter.source
    longest = max(map(len, drafts))
    if longest == 0:
        return Draft(context.newest, (0,) * len(drafts), source=source)
    padded = [[*tokens, *[0] * (longest - len(tokens))] for tokens in drafts]
    rows = [[ids[-1], *tokens] for ids, tokens in zip(context.ids, padded, strict=True)]
    return Draft(tensor(rows).to(context.newest.device, non_blocking=True), tuple(map(len, drafts)), source=source)


def drafter(setup: DrafterSetup) -> LookupDrafter:
    return LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids)
