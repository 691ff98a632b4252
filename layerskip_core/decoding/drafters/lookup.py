"""Drafts copied from the text so far: prompt lookup decoding (Saxena, 2023), over the prompt, the output and earlier answers.

Suffix decoding (Oliaro et al., 2024, arXiv 2411.04975) searches earlier answers too, in a suffix tree.
"""

from array import array
from collections.abc import Sequence

from torch import tensor

from ...config.decoding import REMEMBERED
from ..output import Row
from . import Context, Draft, Drafter, DrafterSetup

SHORTEST = 2  # tokens that must match, unless told otherwise
_LONGEST = 16  # tokens of a match that are compared
_CANDIDATES = 8  # earlier occurrences that are compared, the latest first
# The same in earlier answers: a text that repeats one of them has the longest matches.
_OF_ANSWERS, _LONGEST_OF_ANSWERS, _CANDIDATES_OF_ANSWERS = 3, 64, 4
_END = -1  # before each answer

Found = list[tuple[list[int], int]]
"""By row a draft, which ends after an EOS, and its evidence, see `History.continuation`."""


class History:
    """One row's tokens, indexed by every run of `shortest` of them."""

    def __init__(self, shortest: int) -> None:
        self._shortest, self._runs = shortest, _Runs(shortest)

    def continuation(self, ids: Sequence[int], most: int, drafts: Sequence[int] = ()) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest match of the last ones, and their evidence; none and 0 for no match.

        The evidence is by how many tokens this match is longer than any that went on otherwise: where solved examples in a
        prompt begin alike, matches are long and say little. The last tokens are not their own match. A continuation that
        reaches the end of the text goes on with itself, which continues a repetition. `ids` are those of the last call and
        what was added to them; the last tokens may be `drafts` after them.
        """
        size, known = self._shortest, len(self._runs.ids)
        self._runs.extend(ids[known:], known)
        ids = [*ids, *drafts] if drafts else ids
        _, start, longest, evidence = _longest_match(ids, self._runs.after(ids, _CANDIDATES), size, max(size, _LONGEST))
        period = len(ids) - start
        return [ids[start + index % period] for index in range(most if longest else 0)], evidence


class EarlierAnswers:
    """Answers of this process that lookups search besides a row's own text: `most` tokens, of which the oldest go first.

    An answer stands after the last tokens of its prompt, so that its beginning is found. Such a text is searched where the
    last `_OF_ANSWERS` tokens of a row occur in it. A token takes about 110 bytes at most, less where answers repeat each other.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most // 2  # tokens of a generation
        self._newer, self._older = _Runs(_OF_ANSWERS), _Runs(_OF_ANSWERS)

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._newer.ids) + len(self._older.ids)

    def add(self, ids: Sequence[int], start: int) -> None:
        """Keeps the answer that begins at `start`, unless it is longer than half of all that is kept."""
        first = max(start - _LONGEST, 0)
        text = ids[first:]
        if len(self._newer.ids) + len(text) >= self._most:
            self._newer, self._older = _Runs(_OF_ANSWERS), self._newer
        if len(text) < self._most:
            self._newer.extend((_END, *text), len(self._newer.ids) + 1 + start - first)

    def continuation(self, ids: Sequence[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens, up to the end of an answer, and their evidence, as of `History.continuation`.

        Twice as many as match, at most: a short match soon goes on otherwise. Suffix decoding has such a limit.
        """
        places = self._newer.after(ids, _CANDIDATES_OF_ANSWERS)
        places += self._older.after(ids, _CANDIDATES_OF_ANSWERS - len(places))
        text, start, longest, evidence = _longest_match(ids, places, _OF_ANSWERS, _LONGEST_OF_ANSWERS)
        tokens = list(text[start : start + min(2 * longest, most)])
        return tokens[: tokens.index(_END)] if _END in tokens else tokens, evidence


class _Runs:
    """Tokens, and the places after each run of `size` of them as a list, the latest first."""

    def __init__(self, size: int) -> None:
        self.ids, self._size = array("i"), size
        self._before = array("i")  # by place: the one before it in its list, or -1
        self._latest: dict[int, int] = {}  # by the run's hash; runs that share one are told apart when they are compared

    def extend(self, tokens: Sequence[int], first: int) -> None:
        """Adds tokens, whose places from `first` on are found."""
        ids, size, first = self.ids, self._size, max(first, self._size)
        ids.extend(tokens)
        self._before.extend((-1,) * len(tokens))
        runs = zip(*(ids[first - size + index : len(ids) - size + index] for index in range(size)), strict=False)
        for place, run in enumerate(map(hash, runs), first):
            self._before[place] = self._latest.get(run, -1)
            self._latest[run] = place

    def after(self, ids: Sequence[int], count: int) -> list[tuple[Sequence[int], int]]:
        """The latest `count` places after the last tokens of a text, with the tokens that they are in."""
        found: list[tuple[Sequence[int], int]] = []
        place = self._latest.get(hash(tuple(ids[-self._size :])), -1)
        while place >= 0 and len(found) < count:
            found.append((self.ids, place))
            place = self._before[place]
        return found


def _longest_match(
    ids: Sequence[int], candidates: Sequence[tuple[Sequence[int], int]], least: int, most: int
) -> tuple[Sequence[int], int, int, int]:
    """Of the places in texts where the last of `ids` may stand too, the longest match: where it ends, its length and evidence.

    `least`: how many tokens must match. `most`: how many are compared.
    """
    last = ids[: -most - 1 : -1]
    found: dict[int, tuple[int, Sequence[int], int]] = {}  # by the token after a match, the longest
    for text, place in candidates:
        match = 0
        for token in last[:place]:
            if text[place - match - 1] != token:
                break
            match += 1
        following = text[place]
        if match >= least and (following not in found or match > found[following][0]):
            found.pop(following, None)  # of two that are as long, the later one stays first
            found[following] = match, text, place
    if not found:
        return (), 0, 0, 0
    (longest, text, place), *others = sorted(found.values(), key=lambda match: -match[0])
    return text, place, longest, longest - (others[0][0] if others else 0)


class LookupDrafter:
    """Drafts what followed the last tokens where they occurred before. A draft is certain: it has no probabilities.

    Where no row has a match, the drafter `otherwise` drafts, if there is one.
    """

    def __init__(
        self,
        shortest: int,
        eos_ids: frozenset[int] = frozenset(),
        otherwise: Drafter | None = None,
        earlier: EarlierAnswers | None = None,
    ) -> None:
        """`shortest`: how many tokens must match; 0: nothing is looked up, and only what a grammar forces is drafted.

        `earlier`: answers that are searched too; the better match drafts.
        """
        self._shortest, self._eos_ids, self._otherwise, self._earlier = shortest, eos_ids, otherwise, earlier
        self._histories: dict[Row, History] = {}
        self._drafted_last: Drafter | None = None  # `otherwise`, if it drafted last

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        found = []
        forced = [context.forced(index, limit) for index, limit in enumerate(limits)]
        lookups = zip(forced, self.find(context, limits), self.recall(context, limits), strict=True)
        for must, (own, evidence), (answer, of_answer) in lookups:
            is_better = of_answer > evidence and of_answer >= max(self._shortest, _OF_ANSWERS)
            found.append(must or (answer if is_better else own))
        self._drafted_last = None if any(found) else self._otherwise
        if self._drafted_last is not None:
            return self._drafted_last.draft(context, limits)
        return copied(context, found, "grammar" if any(forced) else "lookup")

    def find(self, context: Context, limits: Sequence[int]) -> Found:
        """What followed in each row's own text."""
        if len(self._histories) > len(context.rows):  # a loop that others join has ever new rows
            self._histories = {row: self._histories[row] for row in context.rows if row in self._histories}
        if not self._shortest:
            return [([], 0)] * len(limits)
        found = Found()
        for index, (row, ids, limit) in enumerate(zip(context.rows, context.ids, limits, strict=True)):
            history = self._histories.setdefault(row, History(self._shortest))
            found.append(self._ended(history.continuation(ids, limit), context, index))
        return found

    def recall(self, context: Context, limits: Sequence[int]) -> Found:
        """What followed in earlier answers."""
        if not (earlier := self._earlier):
            return [([], 0)] * len(limits)
        rows = enumerate(zip(context.ids, limits, strict=True))
        return [self._ended(earlier.continuation(ids, limit), context, index) for index, (ids, limit) in rows]

    def _ended(self, found: tuple[list[int], int], context: Context, index: int) -> tuple[list[int], int]:
        """Up to an EOS, or to where the row's grammar forbids it."""
        tokens, evidence = found
        if not self._eos_ids.isdisjoint(tokens):
            tokens = tokens[: next(count for count, token in enumerate(tokens, start=1) if token in self._eos_ids)]
        processor = context.rows[index].processor
        return tokens if processor is None or not tokens else processor.permitted(tokens), evidence

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        if self._drafted_last is not None:
            self._drafted_last.observe(row, drafted, verified)


def copied(context: Context, drafts: Sequence[list[int]], source: str = "lookup") -> Draft:
    """Token lists as a draft."""
    counts = tuple(map(len, drafts))
    if not any(counts):
        return Draft(context.newest, counts, source=source)
    tokens = [token for ids, own in zip(context.ids, drafts, strict=True) for token in (ids[-1], *own)]
    return Draft(tensor(tokens).to(context.newest.device, non_blocking=True), counts, source=source)


def drafter(setup: DrafterSetup) -> LookupDrafter:
    return LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids, earlier=setup.earlier)
