"""A paged KV cache: texts grow without moving and share pages of common prefixes (Kwon et al.,
PagedAttention, SOSP 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import inf

import torch
from torch import Tensor

from ..errors import MemoryFull
from .cache import Indices, KVCache, Places

Sizes = tuple[int, int, int]
PAGE = 64  # positions; as in attention.h
_SLAB_BYTES = 1 << 25  # allocated at once, about; at first less


class PagePool:
    """Memory for KV entries in pages, each (2 for key and value, kv heads, PAGE, head dim) of all
    layers that have them.

    A page returns to the pool with its last reference. It is not cleared: the next row masks the
    old entries, and masked entries change no bit (attention.h). Pages beside memories of texts are
    allocated and freed one by one, because both share the limit: free pages would hold what a
    text's memory needs. `most`: the limit of pages. `window`: the positions that a token sees, if
    all layers have a sliding window: pages before it are given back. If some layers have full
    attention, a page stays for them, with its entries of the other layers.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        memory: Sizes = (0, 0, 0),
        window: int | None = None,
    ) -> None:
        """`sizes`: by layer, kv heads and head dim. `memory`: of layers without attention, see
        Memory: bytes of a text's state, bytes of a slot, and the least number of slots.
        """
        self.sizes = sizes
        self.dtype = dtype
        self.memory = memory
        self.window = window
        self._numbers = sum(2 * PAGE * kv_heads * head_dim for kv_heads, head_dim in sizes)
        self.page_bytes = self._numbers * dtype.itemsize
        self.most: float = inf
        self.remembered = 0  # size of all memories, in pages
        self.in_use = 0  # pages
        self._slabs: list[_Slab] = []  # allocations whose pages stay in the pool

    @property
    def used(self) -> int:
        """The number of pages in use, memories included."""
        return self.remembered + self.in_use

    @property
    def allocated(self) -> int:
        """The number of allocated pages, memories included."""
        kept = sum(len(slab.free) for slab in self._slabs)
        return self.used + kept

    @cached_property
    def nowhere(self) -> "Page":
        """Replaces pages that were given back: kernels read it at masked positions, and write late
        entries to it.
        """
        return Page(self._new_slab(1), 0, self)

    def take(self) -> "Page":
        """A free page. Raises MemoryFull if the pool is full."""
        self.require(1)
        slab = next((slab for slab in self._slabs if slab.free), None)
        if slab is None:
            slab = self._grow()
        self.in_use += 1
        return Page(slab, slab.free.pop(), self)

    def _grow(self) -> "_Slab":
        """Allocates free pages."""
        has_memories = any(self.memory)
        if has_memories:
            return self._new_slab(1)
        there = sum(len(slab.pages) for slab in self._slabs)
        count = int(max(1, min(_SLAB_BYTES // self.page_bytes, 1 + there, self.most - there)))
        slab = self._new_slab(count)
        self._slabs.append(slab)
        return slab

    def _new_slab(self, count: int) -> "_Slab":
        return _Slab(torch.zeros(count, self._numbers, dtype=self.dtype))

    def require(self, pages: int) -> None:
        """Raises MemoryFull if the pool has no room for `pages` more."""
        if self.used + pages > self.most:
            raise MemoryFull(
                f"the memory for keys and values is full: {self.used} pages of {self.page_bytes} bytes"
            )

    def slots_for(self, num_draft_tokens: int) -> int:
        """The slots of a text's memory: a round's drafts, and the last token, may run again."""
        return num_draft_tokens + self.memory[2]

    def pages_of_memory(self, slots: int) -> int:
        """The size of a text's memory, in pages."""
        state, slot, _ = self.memory
        return -(-(state + slots * slot) // self.page_bytes)


class _Slab:
    """Pages of one allocation, and the indices of the free ones."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        self.free = list(reversed(range(len(pages))))
        self.start = pages.data_ptr()
        self.page_bytes = pages[0].nbytes


@dataclass(frozen=True, eq=False, slots=True)
class Page:
    """A page of a pool, freed with the last reference to it."""

    _slab: _Slab
    _index: int
    _pool: PagePool

    @property
    def content(self) -> Tensor:
        return self._slab.pages[self._index]

    @property
    def address(self) -> int:
        # data_ptr() of a page takes ten times as long
        return self._slab.start + self._index * self._slab.page_bytes

    def __del__(self) -> None:
        self._slab.free.append(self._index)
        self._pool.in_use -= 1


class Memory:
    """A text's memory in layers without attention (native/recurrence.h): a state, and a ring in
    which slot p % slots holds the update by the token at position p. The state includes only tokens
    that cannot be rejected any more.
    """

    def __init__(
        self, pool: PagePool, slots: int, of: "Memory | None" = None, end: int = 0
    ) -> None:
        """`of`: the memory to copy, for a text that continues at position `end`."""
        state, slot, _ = pool.memory
        self._pool = pool
        self._pages = 0  # until they are granted: `__del__` gives back what was
        self.end = end
        self.first = 0  # position that the text can continue from
        pages = pool.pages_of_memory(slots)
        pool.require(pages)
        self._pages = pages
        pool.remembered += pages
        self.state = torch.zeros(state, dtype=torch.uint8)
        self.ring = torch.zeros(slots, slot, dtype=torch.uint8)
        self.bytes = state + slots * slot
        if of is not None:
            self.first = of.first
            self.state.copy_(of.state)
            places = torch.arange(max(0, end - min(slots, len(of.ring))), end)
            self.ring[places % slots] = of.ring[places % len(of.ring)]

    def __del__(self) -> None:
        self._pool.remembered -= self._pages


class PagedCache(KVCache):
    """The pages of B rows, in the order of their positions. Rows share pages that they have filled
    and will not write again.
    """

    def __init__(self, pool: PagePool, batch_size: int, max_positions: int) -> None:
        super().__init__(batch_size, max_positions)
        self._pool = pool
        self._pages = [list[Page]() for _ in range(batch_size)]
        self._memories: list[Memory | None] = [None] * batch_size  # of rows that have one
        self._addresses: Tensor | None = None  # (B, pages) of all rows; None after a change
        self._capacity = 0  # positions for which every row has pages

    @property
    def memory(self) -> dict[int, int]:
        held = {}
        for memory in self._memories:
            if memory is not None:
                held[memory.ring.data_ptr()] = memory.bytes
        for page in chain.from_iterable(self._pages):
            held[page.address] = self._pool.page_bytes
        return held

    def free_pages(self, ends: Sequence[int] = ()) -> float:
        free = self._pool.most - self._pool.used
        for end, pages, memory in zip(ends, self._pages, self._memories, strict=False):
            free -= max(0, -(-end // PAGE) - len(pages))
            if not memory or len(memory.ring) < self._slots:
                free -= self._pool.pages_of_memory(self._slots)
        return free

    @property
    def branch_pages(self) -> int:
        slots = [len(memory.ring) for memory in self._memories if memory]
        return 1 + max(map(self._pool.pages_of_memory, slots), default=0)

    def first(self, row: int) -> int:
        pages = self._pages[row]
        window = self._pool.window
        memory = self._memories[row]
        if memory is not None:
            return memory.first
        if window is None or self._pool.nowhere not in pages:
            return 0
        return pages.count(self._pool.nowhere) * PAGE + window - 1

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        self._set([self._pages[row] for row in rows], [self._memories[row] for row in rows])

    def join(self, other: KVCache) -> None:
        assert isinstance(other, PagedCache) and other._pool is self._pool
        super().join(other)
        self._set(self._pages + other._pages, self._memories + other._memories)

    def branch(
        self,
        rows: Indices,
        starts: Indices,
        ends: Indices | None = None,
        max_positions: int | None = None,
    ) -> "PagedCache":
        branch = self._branched(rows, max_positions)
        pages: list[list[Page]] = []
        memories: list[Memory | None] = []
        with torch.inference_mode():
            for row, start, end in zip(rows, starts, ends or starts, strict=True):
                pages.append(self._shared(self._pages[row], start, end))
                memory = self._memories[row]
                memories.append(memory and Memory(self._pool, len(memory.ring), memory, start))
            branch._set(pages, memories)
        return branch

    def addresses(self, places: Places) -> Tensor:
        """(B, pages), on the host: the addresses of each row's pages, with new ones for the tokens
        of a pass.
        """
        if places.end > self._capacity:
            for row, (start, count) in enumerate(zip(places.starts, places.counts, strict=True)):
                pages = self._pages[row]
                while count and len(pages) * PAGE < start + count:
                    self._forget(pages, places.origins[row])
                    pages.append(self._pool.take())
                    self._addresses = None
            self._capacity = min(map(len, self._pages)) * PAGE
        if self._addresses is None:
            longest = max(map(len, self._pages))
            table = []
            for pages in self._pages:
                addresses = [page.address for page in pages]
                table.append(addresses + [0] * (longest - len(pages)))
            self._addresses = torch.tensor(table)
        return self._addresses

    def _forget(self, pages: list[Page], start: int) -> None:
        """Gives back pages before the window of a text that continues at `start`, but for
        `steps_back` tokens and a page.
        """
        window = self._pool.window
        if window is None:
            return
        for index in reversed(range((start - window - self.steps_back) // PAGE - 1)):
            if pages[index] is self._pool.nowhere:  # so are all before it
                return
            pages[index] = self._pool.nowhere

    @property
    def _margin(self) -> int:
        """How many tokens at the end of a pass may run again: rejected drafts, and the last token
        of a text.
        """
        return self.steps_back + 1

    @property
    def _slots(self) -> int:
        return self._pool.slots_for(self.steps_back)

    def memories(self, places: Places) -> Tensor:
        """(4, T), on the host, for the T rows with tokens in a pass: addresses of states and of
        rings, the number of slots, and the position before which tokens stay.
        """
        found = []
        for row, (start, count) in enumerate(zip(places.starts, places.counts, strict=True)):
            if not count:
                continue
            memory = self._memories[row]
            if memory is None:
                self._memories[row] = memory = Memory(self._pool, self._slots)
            elif len(memory.ring) < self._slots:
                self._memories[row] = memory = Memory(self._pool, self._slots, memory, memory.end)
            may_rerun = self._margin
            if places.no_rollback or count > self._margin:  # no draft has so many tokens
                may_rerun = 1
            memory.first = max(memory.first, start + count - may_rerun)
            found.append(
                (memory.state.data_ptr(), memory.ring.data_ptr(), len(memory.ring), memory.first)
            )
        return torch.tensor(found).T.contiguous()

    def _set(self, pages: list[list[Page]], memories: list[Memory | None]) -> None:
        self._pages = pages
        self._memories = memories
        self._addresses = None
        self._capacity = min(map(len, pages), default=0) * PAGE

    def _shared(self, pages: list[Page], start: int, end: int) -> list[Page]:
        """The pages of a row before position `end`: shared if full before `start`, else copied, to
        be written.
        """
        whole = start // PAGE
        last = -(-end // PAGE)
        shared = pages[:whole]
        written = pages[whole:last]
        for page in written:
            shared.append(self._pool.take())
            shared[-1].content.copy_(page.content)
        return shared
