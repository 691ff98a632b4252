"""Drafts copied from the text so far: prompt lookup decoding (Saxena, 2023), over the prompt, the
output and earlier answers.

Suffix decoding (Oliaro et al., 2024, arXiv 2411.04975) searches earlier answers too, in a suffix
tree.
"""

from array import array
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ...config.decoding import REMEMBERED
from ..row import Row

SHORTEST = 2  # tokens that must match, by default
_LONGEST = 16  # most tokens of a match that are compared
_CANDIDATES = 8  # earlier occurrences that are compared, the latest first
# The same for earlier answers, where matches of repeated answers are longer.
_OF_ANSWERS = 3
_LONGEST_OF_ANSWERS = 64
_CANDIDATES_OF_ANSWERS = 4
_END = -1  # before each answer


class History:
    """One row's tokens, indexed by their n-grams of `shortest` tokens."""

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self._index = _NgramIndex(shortest)

    def continuation(
        self, ids: Sequence[int], most: int, drafts: Sequence[int] = ()
    ) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest earlier match of the text's end, and
        their evidence; [], 0 if none.

        The evidence: by how many tokens this match is longer than any match with another next token
        (few-shot examples that begin alike give long matches that say little). A continuation that
        reaches the end of the text starts over, which continues a repetition. `ids` only grow from
        call to call; `drafts` follow them.
        """
        size = self._shortest
        known = len(self._index.ids)
        self._index.extend(ids[known:], known)
        if drafts:
            ids = [*ids, *drafts]
        _, start, longest, evidence = _longest_match(
            ids, self._index.after(ids, _CANDIDATES), size, max(size, _LONGEST)
        )
        if not longest:
            return [], evidence
        period = len(ids) - start
        return [ids[start + index % period] for index in range(most)], evidence


class EarlierAnswers:
    """Answers of this process that lookups search besides a row's own text: at most `most` tokens,
    the oldest dropped first.

    Each answer follows the last tokens of its prompt, so that its beginning can match. The index
    has n-grams of `_OF_ANSWERS` tokens. A token takes at most about 110 bytes, less where answers
    repeat each other.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most // 2  # most tokens of each of two generations
        self._newer = _NgramIndex(_OF_ANSWERS)
        self._older = _NgramIndex(_OF_ANSWERS)

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._newer.ids) + len(self._older.ids)

    def add(self, ids: Sequence[int], start: int) -> None:
        """Keeps the answer that begins at `start`, unless it is longer than a generation."""
        first = max(start - _LONGEST, 0)
        text = ids[first:]
        if len(self._newer.ids) + len(text) >= self._most:
            self._newer, self._older = _NgramIndex(_OF_ANSWERS), self._newer
        if len(text) < self._most:
            self._newer.extend((_END, *text), len(self._newer.ids) + 1 + start - first)

    def continuation(self, ids: Sequence[int], most: int) -> tuple[list[int], int]:
        """As `History.continuation`, up to the end of an answer.

        At most twice as many tokens as match, because after short matches texts soon differ; as in
        suffix decoding.
        """
        candidates = self._newer.after(ids, _CANDIDATES_OF_ANSWERS)
        candidates += self._older.after(ids, _CANDIDATES_OF_ANSWERS - len(candidates))
        text, start, longest, evidence = _longest_match(
            ids, candidates, _OF_ANSWERS, _LONGEST_OF_ANSWERS
        )
        tokens = list(text[start : start + min(2 * longest, most)])
        if _END in tokens:
            tokens = tokens[: tokens.index(_END)]
        return tokens, evidence


class _NgramIndex:
    """Tokens, and for each n-gram of `size` tokens the positions after it, the latest first."""

    def __init__(self, size: int) -> None:
        self.ids = array("i")
        self._size = size
        self._before = array("i")  # by position: the previous one after the same n-gram, or -1
        # By the n-gram's hash; comparing the tokens rules out collisions
        self._latest: dict[int, int] = {}

    def extend(self, tokens: Sequence[int], first: int) -> None:
        """Adds tokens; positions from `first` on are indexed."""
        ids = self.ids
        size = self._size
        first = max(first, self._size)
        ids.extend(tokens)
        self._before.extend((-1,) * len(tokens))
        ngrams = zip(
            *(ids[first - size + index : len(ids) - size + index] for index in range(size)),
            strict=False,
        )
        for end, ngram in enumerate(map(hash, ngrams), first):
            self._before[end] = self._latest.get(ngram, -1)
            self._latest[ngram] = end

    def after(self, ids: Sequence[int], count: int) -> list[tuple[Sequence[int], int]]:
        """The latest `count` positions after the last n-gram of a text, each with the tokens that
        it indexes.
        """
        found: list[tuple[Sequence[int], int]] = []
        end = self._latest.get(hash(tuple(ids[-self._size :])), -1)
        while end >= 0 and len(found) < count:
            found.append((self.ids, end))
            end = self._before[end]
        return found


def _longest_match(
    ids: Sequence[int], candidates: Sequence[tuple[Sequence[int], int]], least: int, most: int
) -> tuple[Sequence[int], int, int, int]:
    """Of candidates (text, position), the longest match of the end of `ids`: text, position after
    it, length, evidence.

    `least`: how many tokens must match. `most`: how many are compared.
    """
    last = ids[: -most - 1 : -1]
    found: dict[int, tuple[int, Sequence[int], int]] = {}  # by the token after a match, the longest
    for text, end in candidates:
        match = 0
        for token in last[:end]:
            if text[end - match - 1] != token:
                break
            match += 1
        following = text[end]
        if match >= least and (following not in found or match > found[following][0]):
            found.pop(following, None)  # of equally long matches the latest stays first
            found[following] = match, text, end
    if not found:
        return (), 0, 0, 0
    (longest, text, end), *others = sorted(found.values(), key=lambda match: -match[0])
    return text, end, longest, longest - (others[0][0] if others else 0)


class RowLookup:
    """Looks up the end of each row in the row's own text."""

    def __init__(self, shortest: int) -> None:
        """`shortest`: how many tokens must match."""
        self._shortest = shortest
        self._histories: WeakKeyDictionary[Row, History] = WeakKeyDictionary()

    def continuation(
        self, row: Row, most: int, drafts: Sequence[int] = ()
    ) -> tuple[list[int], int]:
        """As `History.continuation`."""
        history = self._histories.get(row)
        if history is None:
            history = self._histories[row] = History(self._shortest)
        return history.continuation(row.ids, most, drafts)

    def guessed(self, row: Row, most: int, drafts: Sequence[int]) -> list[int]:
        """At most `most` tokens that probably follow the row's drafts: as many as its evidence."""
        if most <= 0:
            return []
        tokens, evidence = self.continuation(row, most, drafts)
        return tokens[:evidence]
