"""A KV cache addressed by position: rejecting drafted tokens copies nothing, because later tokens
overwrite their entries.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise, repeat
from math import inf
from operator import add
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

Indices = Sequence[int]
_FEW = 16  # rows of at most so many tokens share a grid, whatever the padding


@dataclass(frozen=True)
class States:
    """Hidden states of N consecutive tokens of a row, or of several rows, row by row."""

    taps: Mapping[int, Tensor]  # (N, D), by the number of layers run
    finals: Tensor  # (N, D), after the last layer

    def __len__(self) -> int:
        return len(self.finals)

    def part(self, start: int, end: int) -> "States":
        taps = {tap: states[start:end] for tap, states in self.taps.items()}
        return States(taps, self.finals[start:end])

    @staticmethod
    def concatenated(parts: Sequence["States"]) -> "States":
        """The states of all parts, in their order; there is at least one."""
        if len(parts) == 1:
            return parts[0]
        taps = {}
        for tap in parts[0].taps:
            taps[tap] = torch.cat([part.taps[tap] for part in parts])
        return States(taps, torch.cat([part.finals for part in parts]))


class KVCache(ABC):
    """KV entries of all L layers for B rows. The index of an entry is the position of its token.

    So a query at position p sees exactly the entries 0..p. Later ones (rejected drafts, padding)
    have weight 0. Entries of a row that leaves are dropped.
    """

    steps_back = 8  # how many tokens at the end of a pass may be rolled back

    def __init__(self, batch_size: int, max_positions: int) -> None:
        """`max_positions`: the context, or the end of the text if known; tokens beyond it are
        refused.
        """
        self.rows = batch_size
        self.max_positions = max_positions
        # By row, by exit or drafter: the feature (D,) of the last token with a KV entry of this
        # block, which reads it to draft.
        self.features = [dict[int | str, Tensor]() for _ in range(batch_size)]
        # By row: states of its last tokens, whose KV entries of blocks that draft are not written
        # yet.
        self.unwritten = [list[States]() for _ in range(batch_size)]

    def span(self, start: int, end: int, no_rollback: bool = False) -> "Places":
        """The positions start..end-1 of every row. `no_rollback`: see Places."""
        counts = [end - start] * self.rows
        return Places(self, [start] * self.rows, counts, no_rollback=no_rollback)

    @property
    def num_unwritten(self) -> list[int]:
        """By row: how many tokens still need KV entries of blocks that draft."""
        return [sum(map(len, unwritten)) for unwritten in self.unwritten]

    @property
    @abstractmethod
    def memory(self) -> dict[int, int]:
        """Bytes of each allocation that it holds, by address: caches may share some."""

    def free_pages(self, ends: Sequence[int] = ()) -> float:
        """Pages left for all rows of the model, once this cache's rows have pages up to `ends`;
        infinite without a limit.
        """
        return inf

    @property
    def branch_pages(self) -> int:
        """The most pages that a branch of a row takes before it runs a token."""
        return 1

    def first(self, row: int) -> int:
        """The first position that a row can continue from; larger than its end if it can continue
        only there.
        """
        return 0

    @abstractmethod
    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps only the rows at the indices `rows`, which differ, in that order."""
        self.rows = len(rows)
        self.features = [self.features[row] for row in rows]
        self.unwritten = [self.unwritten[row] for row in rows]

    @abstractmethod
    def join(self, other: "KVCache") -> None:
        """Adds the rows of another cache of the same model after its own."""
        self.max_positions = max(self.max_positions, other.max_positions)
        self.rows = self.rows + other.rows
        self.features = self.features + other.features
        self.unwritten = self.unwritten + other.unwritten

    def _branched(self, rows: Indices, max_positions: int | None) -> Self:
        """A copy for the rows at the indices `rows`, whose storage is still this cache's."""
        branch = copy(self)
        branch.rows = len(rows)
        branch.max_positions = max_positions or self.max_positions
        branch.features = [{} for _ in rows]
        branch.unwritten = [[] for _ in rows]
        return branch

    @abstractmethod
    def branch(
        self,
        rows: Indices,
        starts: Indices,
        ends: Indices | None = None,
        max_positions: int | None = None,
    ) -> "KVCache":
        """A cache with the entries of `rows` up to `ends` (default: `starts`), where each row
        continues from its start.

        A row may occur several times. Later writes to one cache do not change the other.
        `max_positions`: of the branch.
        """


class Places:
    """Rows and positions of the N tokens of a pass: consecutive tokens of each row of a cache, row
    by row.
    """

    def __init__(
        self,
        cache: KVCache,
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        no_rollback: bool = False,
        recorded: Tensor | None = None,
        origins: Sequence[int] | None = None,
    ) -> None:
        """Raises ConfigError for a token beyond the cache's `max_positions`.

        Args:
            cache: whose rows these are.
            starts: by row, the position of its first token in the pass, or of its next token if it
                has none.
            counts: by row, the number of its tokens in the pass.
            no_rollback: rows continue only from the end of this pass; else up to the cache's
                `steps_back` tokens may be rolled back.
            recorded: (B, T) on the device, the positions of a recorded pass, in the first slots of
                a RowCache.
            origins: starts of the whole pass or draft, of which this is a part; None: `starts`.
        """
        self.cache = cache
        self.starts = starts
        self.counts = counts
        self.no_rollback = no_rollback
        self.recorded = recorded
        self.origins = starts if origins is None else origins
        ends = [start + count for start, count in zip(starts, counts, strict=True) if count]
        self.end = max(ends, default=0)
        if self.end > cache.max_positions:
            last = self.end - 1
            raise ConfigError(
                f"the context limit of {cache.max_positions} tokens is reached: position {last} was requested"
            )

    @property
    def each(self) -> tuple["array[int]", "array[int]"]:
        """The positions and the rows of the N tokens."""
        positions = map(range, self.starts, map(add, self.starts, self.counts))
        rows = map(repeat, range(len(self.counts)), self.counts)
        return array("q", chain.from_iterable(positions)), array("q", chain.from_iterable(rows))

    @cached_property
    def positions(self) -> Tensor:
        """(N,) on the host, unless they are `recorded`."""
        if self.recorded is not None:
            return self.recorded.flatten()
        return torch.tensor(self.each[0], dtype=torch.long)

    @property
    def rows(self) -> Tensor:
        """(N,) on the host: the row of each token."""
        return torch.tensor(self.each[1], dtype=torch.long)

    @property
    def bounds(self) -> list[int]:
        """The index of each row's first token among the N, and N."""
        return [0, *accumulate(self.counts)]

    def moved(self, by: int, skipped: Sequence[int] | None = None) -> "Places":
        """The same tokens at positions shifted by `by`, without the first `skipped` tokens of each
        row.
        """
        skipped = skipped or [0] * len(self.counts)
        counts = [count - less for count, less in zip(self.counts, skipped, strict=True)]
        return self._part([by + less for less in skipped], counts)

    def parts(self, most: int) -> Iterator["Places"]:
        """The same tokens, split into consecutive passes of at most `most`."""
        bounds = self.bounds
        if 0 < bounds[-1] <= most:
            yield self
            return
        for first in range(0, bounds[-1], most):
            # By row: its tokens in earlier parts, and in this one
            done = []
            counts = []
            for start, end in pairwise(bounds):
                before = min(max(first, start), end)
                done.append(before - start)
                counts.append(max(min(first + most, end), before) - before)
            yield self._part(done, counts)

    def _part(self, ahead: Sequence[int], counts: Sequence[int]) -> "Places":
        """By row, `counts` tokens that begin `ahead` positions after its first."""
        # The start of a row without tokens may be below 0
        starts = [max(0, start + by) for start, by in zip(self.starts, ahead, strict=True)]
        return Places(
            self.cache, starts, counts, no_rollback=self.no_rollback, origins=self.origins
        )

    def padded(self, counts: Sequence[int], slots: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The first `counts` tokens of each row as a grid, padded as in `in_grids`: positions (B,
        T), indices (B, T) in the pass, and flat indices of the grid's places that are no padding.
        The grid has at least `slots` rows.
        """
        free = [0] * (slots - len(counts))
        real = torch.tensor([*counts, *free])[:, None]
        columns = torch.arange(max(counts)).minimum((real - 1).clamp_min(0))
        places = (torch.tensor([*self.starts, *free])[:, None] + columns).clamp_max(
            self.cache.max_positions - 1
        )
        tokens = (torch.tensor([*self.bounds[:-1], *free])[:, None] + columns).clamp_max(
            sum(self.counts) - 1
        )
        return places, tokens, (torch.arange(max(counts)) < real).flatten().nonzero()[:, 0]

    def in_grids(self, hidden: Tensor, run: "RunGrid", together: bool = True) -> Tensor:
        """Runs all tokens in few grids of rows and columns; returns what `run` does, in the shape
        of `hidden` (..., D).

        A row shorter than the longest is padded by its last token; an empty row by any token, at
        the position of its next token, which overwrites the entry. Where padding would fill most of
        a large grid, rows with many tokens run alone. Without `together`, all rows do.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        counts = self.counts
        width = max(counts, default=1)
        shape = (*hidden.shape[:-1], -1)
        grid = self.recorded
        if grid is None and together and min(counts) == width:
            grid = self.positions.view(len(counts), width)
        if grid is not None:
            return run(flat.view(*grid.shape, -1), grid, None).reshape(shape)
        outputs: list[tuple[Tensor | slice, Tensor]] = []
        few = 0  # rows of at most so many tokens share a grid
        if together and len(counts) * width <= 2 * len(flat):
            few = width
        elif together:
            few = _FEW
        short = [count if count <= few else 0 for count in counts]
        if any(short):
            places, tokens, real = self.padded(short)
            output = run(flat[tokens.to(flat.device, non_blocking=True)], places, None)
            tokens = tokens.flatten()[real].to(flat.device, non_blocking=True)
            real = real.to(flat.device, non_blocking=True)
            outputs.append((tokens, output.flatten(0, 1)[real]))
        for row, (start, end) in enumerate(pairwise(self.bounds)):
            if end - start > few:
                own = slice(start, end)
                outputs.append((own, run(flat[None, own], self.positions[None, own], row)[0]))
        whole = outputs[0][1].new_empty(len(flat), outputs[0][1].shape[-1])
        for index, output in outputs:
            whole[index] = output
        return whole.view(shape)


class _OnDevice(Protocol):
    """A tensor, or a backend."""

    @property
    def device(self) -> torch.device: ...


def on_device(numbers: Sequence[int], like: _OnDevice) -> Tensor:
    """Integers on the device of `like`, by a copy that the host does not wait for."""
    # torch.tensor takes three times as long
    made = torch.from_numpy(np.array(numbers, dtype=np.int64))
    return made.to(like.device, non_blocking=True)


RunGrid = Callable[[Tensor, Tensor, int | None], Tensor]
"""Runs layers over hidden states (B, T, D) at positions (B, T); given a row of the cache, for it alone, (1, T, D)."""
