"""Drafts copied from the text so far: prompt lookup decoding (Saxena, 2023), over the prompt and the output."""

from collections.abc import Sequence

from torch import tensor

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
        return [ids[start + index % period] for index in range(most)], longest - max(by_next.values(), default=0)


class LookupDrafter:
    """Drafts what followed the last tokens where they occurred before. A draft is certain: it has no probabilities.

    Where no row has a match, the drafter `otherwise` drafts, if there is one.
    """

    def __init__(self, shortest: int, eos_ids: frozenset[int] = frozenset(), otherwise: Drafter | None = None) -> None:
        """`shortest`: how many tokens must match."""
        self._shortest, self._eos_ids, self._otherwise = shortest, eos_ids, otherwise
        self._histories: dict[int, History] = {}
        self._drafted_last: Drafter | None = None  # `otherwise`, if it drafted last

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        found = [tokens for tokens, _ in self.find(context, limits)]
        self._drafted_last = None if any(found) else self._otherwise
        return copied(context, found) if self._drafted_last is None else self._drafted_last.draft(context, limits)

    def find(self, context: Context, limits: Sequence[int]) -> list[tuple[list[int], int]]:
        """By row a draft, which ends after an EOS, and its evidence, see `History.continuation`."""
        if len(self._histories) > len(context.rows):  # a loop that others join has ever new rows
            self._histories = {row: self._histories[row] for row in context.rows if row in self._histories}
        found = []
        for row, ids, limit in zip(context.rows, context.ids, limits, strict=True):
            history = self._histories.setdefault(row, History(self._shortest))
            tokens, evidence = history.continuation(ids, max(limit, 0))
            if self._eos_ids:
                end = next((count for count, token in enumerate(tokens, start=1) if token in self._eos_ids), len(tokens))
                tokens = tokens[:end]
            found.append((tokens, evidence))
        return found

    def observe(self, row: int, drafted: int, verified: Sequence[int]) -> None:
        if self._drafted_last is not None:
            self._drafted_last.observe(row, drafted, verified)


def copied(context: Context, drafts: Sequence[list[int]]) -> Draft:
    """Token lists as a draft, padded to the longest."""
    longest = max(map(len, drafts))
    if longest == 0:
        return Draft(context.newest, (0,) * len(drafts), source="lookup")
    rows = [[ids[-1], *tokens, *[0] * (longest - len(tokens))] for ids, tokens in zip(context.ids, drafts, strict=True)]
    return Draft(tensor(rows).to(context.newest.device, non_blocking=True), tuple(map(len, drafts)), source="lookup")


def drafter(setup: DrafterSetup) -> LookupDrafter:
    return LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids)
