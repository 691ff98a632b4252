"""Keys and values in pages, for kernels that find a position by its page: texts grow without moving, and share what they begin
with (Kwon et al., PagedAttention, SOSP 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ..errors import LayerSkipError
from .cache import KVCache, Places

PAGE = 64  # positions; as in attention.h
_SLAB_BYTES = 1 << 25  # of the pages that are made together, about; at first fewer


class PagePool:
    """Memory for keys and values in pages, (layers that have them, 2 for key and value, kv heads, PAGE, head dim) each.

    A page goes back to the pool with its last reference. The next row that takes it sees none of its old numbers, and by the
    kernels' way with what is not seen (attention.h) they change no bit.
    `most`: pages that there may be.
    """

    def __init__(self, num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (num_layers, 2, kv_heads, PAGE, head_dim), dtype
        self.page_bytes = torch.Size(self.shape).numel() * dtype.itemsize
        self.most: float = inf
        self._slabs: list[_Slab] = []

    @property
    def used(self) -> int:
        """How many pages are held."""
        return sum(len(slab.pages) - len(slab.free) for slab in self._slabs)

    def take(self) -> "Page":
        """A page that nobody else has. Raises LayerSkipError if there are as many as there may be."""
        if self.used >= self.most:
            raise LayerSkipError(f"the memory for keys and values is full: {self.used} pages of {self.page_bytes} bytes")
        slab = next((slab for slab in self._slabs if slab.free), None)
        if slab is None:
            # Slabs without a page in use are given back, those of another size than texts have now.
            self._slabs = [slab for slab in self._slabs if len(slab.free) < len(slab.pages)]
            there = sum(len(slab.pages) for slab in self._slabs)
            count = int(max(1, min(_SLAB_BYTES // self.page_bytes, 1 + there, self.most - there)))
            slab = _Slab(torch.zeros(count, *self.shape, dtype=self.dtype))
            self._slabs.append(slab)
        return Page(slab, slab.free.pop())

    def copy_of(self, page: "Page") -> "Page":
        copy = self.take()
        copy.content.copy_(page.content)
        return copy


class _Slab:
    """Pages that lie together in memory, and the indices of those that are free."""

    def __init__(self, pages: Tensor) -> None:
        self.pages, self.free = pages, list(reversed(range(len(pages))))


@dataclass(frozen=True, eq=False, slots=True)
class Page:
    """A page of a pool, for whoever refers to it."""

    _slab: _Slab
    _index: int

    @property
    def content(self) -> Tensor:
        return self._slab.pages[self._index]

    @property
    def address(self) -> int:
        return self.content.data_ptr()

    def __del__(self) -> None:
        self._slab.free.append(self._index)


class PagedCache(KVCache):
    """The pages of B rows, in the order of their positions. Rows share pages that they have filled and will not write again."""

    def __init__(self, pool: PagePool, batch_size: int, max_positions: int) -> None:
        super().__init__(batch_size, max_positions)
        self._pool, self._pages = pool, [list[Page]() for _ in range(batch_size)]
        self._addresses: Tensor | None = None  # (B, pages) of all rows; None after a change
        self._capacity = 0  # positions for which every row has pages

    @property
    def memory(self) -> dict[int, int]:
        return {page.address: self._pool.page_bytes for pages in self._pages for page in pages}

    @property
    def free_pages(self) -> float:
        return self._pool.most - self._pool.used

    def lacking(self, stops: Sequence[int]) -> int:
        return sum(max(0, -(-stop // PAGE) - len(pages)) for stop, pages in zip(stops, self._pages, strict=True))

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._set([self._pages[row] for row in rows])

    def join(self, other: KVCache) -> None:
        assert isinstance(other, PagedCache) and other._pool is self._pool
        self.max_positions = max(self.max_positions, other.max_positions)
        self._set(self._pages + other._pages)

    def branch(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int] | None = None, end: int | None = None
    ) -> "PagedCache":
        branch = PagedCache(self._pool, len(rows), end or self.max_positions)
        with torch.inference_mode():
            ends = zip(rows, starts, stops or starts, strict=True)
            branch._set([self._shared(self._pages[row], start, stop) for row, start, stop in ends])
        return branch

    def addresses(self, places: Places) -> Tensor:
        """(B, pages), on the host: where the pages of each row begin, with pages for the tokens of a pass."""
        if places.stop > self._capacity:
            for pages, start, count in zip(self._pages, places.starts, places.counts, strict=True):
                while count and len(pages) * PAGE < start + count:
                    pages.append(self._pool.take())
                    self._addresses = None
            self._capacity = min(map(len, self._pages)) * PAGE
        if self._addresses is None:
            longest = max(map(len, self._pages))
            self._addresses = torch.tensor([[page.address for page in row] + [0] * (longest - len(row)) for row in self._pages])
        return self._addresses

    def _set(self, pages: list[list[Page]]) -> None:
        self._pages, self.rows, self._addresses = pages, len(pages), None
        self._capacity = min(map(len, pages), default=0) * PAGE

    def _shared(self, pages: list[Page], start: int, stop: int) -> list[Page]:
        """The pages of a row before position `stop`, with copies of those that will be written from position `start` on."""
        whole, last = start // PAGE, -(-stop // PAGE)
        return pages[:whole] + [self._pool.copy_of(page) for page in pages[whole:last]]
