"""Kept prefixes: prompts that begin like an earlier text continue from its KV entries."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf

from ..model.backend import Backend
from ..model.cache import KVCache
from .target import Target


class Prefixes:
    """Prefix cache: KV entries of texts in bounded memory. A prompt is prefilled from the end of
    its longest kept prefix.

    The least recently used texts are dropped first. With a batch-invariant backend outputs are
    bitwise equal to those after a full prefill. PyTorch's kernels round a token differently in a
    prompt than decoded alone, so outputs can differ there where two tokens are almost equally
    likely. A backend with exact weights promises that they never do: for it nothing is kept.
    """

    def __init__(self, most_bytes: float, most_texts: float = inf, least: int = 64) -> None:
        """`least`: tokens that a kept prefix must save to be used, and that a text must add to the
        kept ones to be kept.
        """
        self._most_bytes = most_bytes
        self._most_texts = most_texts
        self._least = least
        self._texts: list[_KeptText] = []  # the least recently used first

    @property
    def bytes(self) -> int:
        """Memory of all texts; shared pages count once."""
        memory = dict[int, int]()
        for text in self._texts:
            memory |= text.cache.memory
        return sum(memory.values())

    @property
    def keeps_any(self) -> bool:
        return self._most_bytes > 0

    def start_cache(
        self, model: Backend, target: Target, prompt: Sequence[int], end: int
    ) -> tuple[KVCache, int]:
        """A cache of one row for positions before `end`, and how many of the prompt's first tokens
        need no pass.
        """
        best = None
        num_cached = 0
        for text in self._texts_of(model, target):
            shared = min(_common(text.ids, prompt), len(prompt) - 1) - target.rerun
            if shared >= max(text.first_resumable, self._least, num_cached + 1):
                best = text
                num_cached = shared
        if best is None:
            return model.new_cache(1, end), 0
        self._texts.remove(best)
        self._texts.append(best)
        if not self._has_room(model, best.cache):
            return model.new_cache(1, end), 0
        # A drafter's own KV entry of a rerun token stays
        num_kept = [num_cached + target.rerun] if target.rerun else None
        return best.cache.branch([0], [num_cached], num_kept, end), num_cached

    def branch_point(
        self, model: Backend, target: Target, prompt: Sequence[int], num_cached: int
    ) -> int:
        """Length of the longest prefix shared with a kept text, if `least` tokens longer than what
        could be reused of it; else 0.
        """
        texts = self._texts_of(model, target)
        common = max((_common(text.ids, prompt) for text in texts), default=0)
        if common - num_cached < self._least:
            return 0
        return common

    def would_share(
        self, model: Backend, ids: Sequence[int], others: Sequence[Sequence[int]]
    ) -> bool:
        """True if one of `others`, once kept, will save this text at least `least` more tokens than
        the kept ones.
        """
        if not others or not self._keeps_texts_of(model):
            return False
        kept = max((_common(text.ids, ids) for text in self._texts), default=0)
        return any(_common(other, ids) - kept >= self._least for other in others)

    def drop(self, model: Backend | None = None) -> bool:
        """Drops the least recently used text, of a `model` if given: only its texts have pages of
        its pool.

        Returns False if there is none.
        """
        for text in self._texts:
            if model is None or text.model is model:
                self._texts.remove(text)
                return True
        return False

    def make_room(self, model: Backend, has_room: Callable[[], bool]) -> bool:
        """Drops texts of `model` until there is room. Returns whether there is."""
        while not has_room():
            if not self.drop(model):
                return False
        return True

    def keep(
        self, model: Backend, target: Target, ids: Sequence[int], cache: KVCache, row: int
    ) -> None:
        """Keeps the KV entries of a text, from a row of a cache, if it adds `least` tokens to the
        kept ones.
        """
        if not self._keeps_texts_of(model):
            return
        common = {text: _common(text.ids, ids) for text in self._texts_of(model, target)}
        reusable = [count for text, count in common.items() if count >= text.first_resumable]
        if len(ids) - max(reusable, default=0) < self._least:
            return
        if not self._has_room(model, cache):
            return
        # A recurrent state is that of the end
        first_resumable = min(cache.first(row), len(ids))
        branch = cache.branch([row], [len(ids)])
        # Kept texts that are prefixes of the new one go
        self._texts = [
            text
            for text in self._texts
            if common.get(text) != len(text.ids) or len(text.ids) < first_resumable
        ]
        self._texts.append(_KeptText(model, target.kv_key, list(ids), branch, first_resumable))
        while len(self._texts) > self._most_texts or self.bytes > self._most_bytes:
            self.drop()

    def _texts_of(self, model: Backend, target: Target) -> list["_KeptText"]:
        """The texts that a target can continue."""
        return [
            text for text in self._texts if text.model is model and text.kv_key == target.kv_key
        ]

    def _keeps_texts_of(self, model: Backend) -> bool:
        return self.keeps_any and not model.exact

    def _has_room(self, model: Backend, cache: KVCache) -> bool:
        """Whether there is memory for a branch of a cache, after dropping texts if need be."""
        return self.make_room(model, lambda: cache.free_pages() >= cache.branch_pages)


NO_PREFIXES = Prefixes(0)  # keeps nothing


@dataclass(eq=False)
class _KeptText:
    """A text of Prefixes, and a cache of one row with its KV entries: of the layers and blocks that
    a target writes.
    """

    model: Backend
    kv_key: Hashable
    ids: list[int]
    cache: KVCache
    first_resumable: int  # the first position from which a prompt can continue


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    low = 0
    high = min(len(one), len(other))
    while low < high:  # bisection, because comparing slices is fast and a loop over tokens is not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
