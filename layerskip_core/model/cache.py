"""A KV cache addressed by position: rejecting drafted tokens copies nothing, because later tokens overwrite their places."""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

_BLOCK = 64  # positions that are added together, and read together: a multiple of the kernels' tiles
_AHEAD = 256  # positions that get room before they are needed, at least, unless the text ends earlier


def _in_blocks(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def check_stop(stop: int, limit: int) -> None:
    """Raises ConfigError for tokens that end beyond a limit of positions."""
    if stop > limit:
        raise ConfigError(f"the context limit of {limit} tokens is reached: position {stop - 1} was requested")


class KVCache(ABC):
    """Keys and values of all L layers for B rows. The index of a key is the position of its token.

    So a query at position p sees exactly the indices 0..p. What stands after them (rejected drafts, padding) has weight 0. A
    row that leaves is forgotten.
    """

    rolls_back = True  # whether a row can go on from any position, and not only from those that MixedCache keeps states of
    steps_back = 8  # how far before the end of a call its rows may go on
    ends: Sequence[int] | None = None  # by row, the position from which it goes on after this call; None: from any within

    def __init__(self, batch_size: int, max_positions: int) -> None:
        """`max_positions`: a token beyond it is refused. It is the context, or the end of the text where that is known."""
        self.rows, self.max_positions = batch_size, max_positions

    @property
    @abstractmethod
    def memory(self) -> dict[int, int]:
        """Bytes of each part of memory that it holds, by address: caches may share some of them."""

    @property
    def free_pages(self) -> float:
        """How many more pages there may be, for all rows of the model."""
        return inf

    def lacking(self, stops: Sequence[int]) -> int:
        """How many pages rows need for positions before these stops."""
        return 0

    @abstractmethod
    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps only the rows at the indices `rows`, which differ, in that order."""

    @abstractmethod
    def join(self, other: "KVCache") -> None:
        """Adds the rows of another cache of the same model after its own."""

    @abstractmethod
    def branch(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int] | None = None, end: int | None = None
    ) -> "KVCache":
        """Another cache with these rows, each as far as its stop, where each goes on from its start; without stops from there.

        A row may be there several times. What the one cache writes later changes nothing in the other. `end`: instead of
        `max_positions`.
        """


class RowCache(KVCache):
    """A tensor for all rows, for PyTorch's kernels.

    They read all places and mask the rest, and 0 * NaN is NaN, so what another text left in a place is cleared.
    """

    def __init__(self, num_layers: int, batch_size: int, max_positions: int) -> None:
        super().__init__(batch_size, max_positions)
        self.written = 0  # nothing was ever written from this position on
        self._matrices: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # for so many places
        self.halves: Sequence[Tensor] = ()  # (B, kv heads, capacity, head dim): the keys of layer 0, its values, ...
        self._num_layers = num_layers
        self._storage: Tensor | None = None  # (L, 2 for key and value, B, kv heads, capacity, head dim)

    @property
    def memory(self) -> dict[int, int]:
        return {} if self._storage is None else {self._storage.data_ptr(): self._storage.nbytes}

    @property
    def capacity(self) -> int:
        """How many positions have room now."""
        return 0 if self._storage is None else self._storage.shape[4]

    def entries(self, row: int, stop: int) -> Tensor:
        """(L, 2, kv heads, stop, head dim): what a row has before a position."""
        assert self._storage is not None
        return self._storage[:, :, row, :, :stop]

    def keep_rows(self, rows: Sequence[int]) -> None:
        if self._storage is not None and list(rows) != list(range(self.rows)):
            self._hold(self._storage[:, :, rows])
        self.rows = len(rows)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, RowCache)
        self.max_positions, rows = max(self.max_positions, other.max_positions), self.rows
        self.rows, self.written = rows + other.rows, max(self.written, other.written)
        held, added = self._storage, other._storage
        if held is None or added is None:  # of layers that an early exit never runs
            return
        capacity = max(held.shape[4], added.shape[4])
        self._hold(torch.cat([F.pad(part, (0, 0, 0, capacity - part.shape[4])) for part in (held, added)], dim=2))

    def branch(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int] | None = None, end: int | None = None
    ) -> "RowCache":
        branch, stops = RowCache(self._num_layers, len(rows), end or self.max_positions), stops or starts
        branch.written = min(_in_blocks(max(stops)), self.capacity)
        with torch.inference_mode():  # which it may have been written in
            if self._storage is not None:
                branch._hold(self._storage[:, :, list(rows), :, : branch.written])
                for row, stop in enumerate(stops):
                    branch.entries(row, branch.written)[..., stop:, :] = 0
        return branch

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, kv heads, T, head dim) of a layer that runs on PyTorch's kernels, whatever the others do.

        `positions` (B, T) are on the host. Returns the layer's keys and values at all positions up to the last of them.
        """
        stop, (_, heads, _, width) = int(positions.max()) + 1, keys.shape
        held = self.room(stop, heads, width, keys if self._storage is None else self._storage)[layer]
        rows, places = (part.to(held.device, non_blocking=True) for part in (torch.arange(self.rows)[:, None], positions))
        for part, new in zip(held, (keys, values), strict=True):
            part[rows, :, places] = new.transpose(1, 2).to(part.dtype)
        self.written = max(self.written, stop)
        return held[0, ..., :stop, :].to(keys.dtype), held[1, ..., :stop, :].to(keys.dtype)

    def room(self, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        """The storage, (L, 2, B, kv heads, capacity >= stop, head dim), grown if necessary.

        The keys of a head are contiguous, because attention over a long text is bound by reading them. Places come in whole
        blocks, the last of them partly filled, so that kernels can read all and mask the rest.
        """
        if self._storage is None:
            self._hold(like.new_zeros(self._num_layers, 2, self.rows, kv_heads, 0, head_dim))
        return self.reach(stop)

    def reach(self, stop: int) -> Tensor:
        """The storage, which has begun. It moves if it has too little room for positions before `stop`: it grows by half, or to
        the end.
        """
        held = self._storage
        assert held is not None
        if held.shape[4] < stop:
            capacity = _in_blocks(min(self.max_positions, stop + max(_AHEAD, stop // 2)))
            places = min(_in_blocks(self.written), held.shape[4])
            moved = held.new_zeros(*held.shape[:4], capacity, held.shape[5])
            moved[..., :places, :] = held[..., :places, :]
            held = self._hold(moved)
        return held

    def matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer, the first three of LayerSlots; of keys and values the blocks that were written."""
        held, places = self._storage, _in_blocks(self.written)
        assert held is not None
        if places not in self._matrices:
            keys, values = held[..., :places, :].flatten(2, 3).unbind(1)
            self._matrices = {places: list(zip(held.unbind(), keys.transpose(2, 3).unbind(), values.unbind(), strict=True))}
        return self._matrices[places]

    def _hold(self, storage: Tensor) -> Tensor:
        self._storage, self.halves, self._matrices = storage, storage.flatten(0, 1).unbind(), {}
        return storage


Entry = tuple[int, str]
"""Of a layer, for each token: the index by which its attention addresses the cache, and `keys`, `values` or another kind."""

State = tuple[int, str, int]
"""Of a recurrent layer, for all tokens: the index by which it addresses the cache, `conv` or `recurrent`, and a number."""


class MixedCache(KVCache):
    """Entries of any shapes, for layers of transformers: keys as wide as values or not, and other widths in other layers.

    Entries of one shape lie in one RowCache, in pairs: a layer's keys and values, where all have one shape.

    No length rolls a recurrent state back. So the states after the last tokens of a call are kept: after each from which a row
    may go on, by `steps_back` and `ends`, and after the token before the call.
    """

    def __init__(
        self, shapes: Mapping[Entry, tuple[int, int]], batch_size: int, max_positions: int, rolls_back: bool = True
    ) -> None:
        """`shapes`: number and width of the heads of each entry. `rolls_back`: whether no layer is recurrent."""
        super().__init__(batch_size, max_positions)
        self.rolls_back = rolls_back
        self.states: dict[State, Tensor] = {}  # (S, B, ...): after position p at p modulo S
        of_shape = defaultdict[tuple[int, int], list[Entry]](list)
        for entry, shape in shapes.items():
            of_shape[shape].append(entry)
        self.parts = [RowCache(-(-len(entries) // 2), batch_size, max_positions) for entries in of_shape.values()]
        self.places = {
            entry: (number, shape, index)
            for number, (shape, entries) in enumerate(of_shape.items())
            for index, entry in enumerate(entries)
        }

    @property
    def memory(self) -> dict[int, int]:
        held = {state.data_ptr(): state.nbytes for state in self.states.values()}
        return held | {address: size for part in self.parts for address, size in part.memory.items()}

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.rows = len(rows)
        self.states = {state: held[:, rows] for state, held in self.states.items()}
        for part in self.parts:
            part.keep_rows(rows)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, MixedCache)
        for part, added in zip(self.parts, other.parts, strict=True):
            part.join(added)
        self.states = {state: torch.cat((held, other.states[state]), dim=1) for state, held in self.states.items()}
        self.rows, self.max_positions = self.rows + other.rows, max(self.max_positions, other.max_positions)

    def branch(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int] | None = None, end: int | None = None
    ) -> "MixedCache":
        """Without stops only the states before the starts are kept."""
        branch = copy(self)
        branch.rows, branch.max_positions, branch.ends, branch.states = len(rows), end or self.max_positions, None, {}
        branch.parts = [part.branch(rows, starts, stops, end) for part in self.parts]
        with torch.inference_mode():
            for state, held in self.states.items():
                last = [(start - 1) % len(held) for start in starts]
                branch.states[state] = held[last, rows][None] if stops is None else held[:, rows]
        return branch

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As RowCache's."""
        writer = EntryWriter(self, positions)
        return writer.put((layer, "keys"), keys), writer.put((layer, "values"), values)


class EntryWriter:
    """Where one call writes and reads the entries of tokens at `positions` (B, T), on the host, and recurrent states.

    `row`: the call has this row of the cache alone, with positions (1, T). `shift`: what is added to the indices by which
    layers address the cache.
    """

    def __init__(self, cache: MixedCache, positions: Tensor, row: int | None = None, shift: int = 0) -> None:
        self.start, self.stop, self.contiguous = _places(positions, cache.max_positions)
        self._cache, self._positions, self._row, self._shift = cache, positions, row, shift
        self._indices: tuple[Tensor, slice, Tensor] | None = None  # of all tokens, where they do not stand in one slice
        self._ready = set[int]()  # parts that have room
        count = positions.shape[1]
        self.first_kept = count - 1 if cache.ends is not None else max(count - 1 - cache.steps_back, 0)
        self.begins = not positions[:, 0].any()  # whether no row has an earlier token

    def put(self, entry: Entry, new: Tensor) -> Tensor:
        """Writes (B, heads, T, width); returns what all positions before `stop` have, (B, heads, S, width)."""
        held = self._held(entry, new)
        if self.contiguous:
            held[:, :, self.start : self.stop] = new
        else:
            if self._indices is None:
                rows = torch.arange(len(self._positions), device=new.device)[:, None]
                self._indices = rows, slice(None), self._positions.to(new.device, non_blocking=True)
            held[self._indices] = new.transpose(1, 2).to(held.dtype)
        return held[:, :, : self.stop]

    def get(self, entry: Entry, like: Tensor) -> Tensor:
        """What was written before, for all positions before `stop`."""
        return self._held(entry, like)[:, :, : self.stop]

    def before(self, state: State) -> Tensor | None:
        """A copy of the state (B, ...) after the tokens before the call; None if there are none, 0 in rows without any."""
        held = self._cache.states.get(self._shifted(state))
        if self.begins or held is None:
            return None
        begin = self._positions[:, 0] == 0
        found = self._rows_of(held)[self._places(self._positions[:, 0] - 1, len(held))].clone()
        if begin.any():
            found[begin.to(found.device)] = 0
        return found

    def keep(self, state: State, column: int, new: Tensor) -> None:
        """The state (B, ...) after the tokens in a column of the positions."""
        state, count = self._shifted(state), self._cache.steps_back + 2
        held = self._cache.states.get(state)
        if held is None or len(held) != count:
            held = self._cache.states[state] = new.new_zeros(count, self._cache.rows, *new.shape[1:])
        self._rows_of(held)[self._places(self._positions[:, column], count)] = new.to(held.dtype)

    def _shifted(self, state: State) -> State:
        return state[0] + self._shift, *state[1:]

    def _rows_of(self, held: Tensor) -> Tensor:
        return held if self._row is None else held[:, self._row : self._row + 1]

    def _places(self, positions: Tensor, count: int) -> Any:
        """The index of the states after positions (B,), among so many of each row."""
        places = (positions % count).tolist()
        return places[0] if len(set(places)) == 1 else (places, list(range(len(places))))

    def _held(self, entry: Entry, like: Tensor) -> Tensor:
        number, shape, index = self._cache.places[entry[0] + self._shift, entry[1]]
        part = self._cache.parts[number]
        if number not in self._ready:
            part.written = max(part.written, self.stop)
            part.room(self.stop, *shape, like)
            self._ready.add(number)
        held = part.halves[index]
        return held if self._row is None else held[self._row : self._row + 1]


def _places(positions: Tensor, limit: int) -> tuple[int, int, bool]:
    """(the first of positions (B, T) on the host, the last + 1, whether all rows are at the same consecutive ones).

    Such rows, always so a single one, are written as one slice. Raises ConfigError beyond the limit.
    """
    rows: list[list[int]] = positions.tolist()
    start, stop = rows[0][0], max(map(max, rows)) + 1
    check_stop(stop, limit)
    span = list(range(start, start + positions.shape[1]))
    return start, stop, all(row == span for row in rows)


class SpanWriter:
    """Where a span of layers writes its keys and values, for tokens at `positions` (B, T).

    On the device they are those of a pass that is recorded: it attends to the whole capacity, under masks, and finds room.
    """

    def __init__(self, cache: RowCache, positions: Tensor) -> None:
        self._cache, self._positions = cache, positions
        self.start, self.stop, self.contiguous = 0, cache.capacity, False
        if positions.device.type == "cpu":
            self.start, self.stop, self.contiguous = _places(positions, cache.max_positions)
        cache.written = max(cache.written, self.stop)

    def layers(self, start: int, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> list["LayerSlots"]:
        """Where each layer of a span writes and reads. All views are made in one call: one call per layer is slower."""
        held, indices = self._cache.room(self.stop, kv_heads, head_dim, like)[start:stop], None
        if self.contiguous:
            slots = held[..., self.start : self.stop, :].unbind()
        else:
            rows = torch.arange(self._positions.shape[0], device=like.device)[:, None]
            slots, indices = held.unbind(), (rows, self._positions.to(like.device, non_blocking=True))
        views = self._cache.matrices()[start:stop]
        return [LayerSlots(*of_layer, into, indices) for of_layer, into in zip(views, slots, strict=True)]


class LayerSlots(NamedTuple):
    """One layer's part of the cache in one call."""

    all: Tensor  # (2, B, kv heads, capacity, head dim)
    keys: Tensor  # (B * kv heads, head dim, places), to be read after `write`
    values: Tensor  # (B * kv heads, places, head dim)
    slots: Tensor  # (2, B, kv heads, T, head dim) to write to; the whole layer where `indices` select the places
    indices: tuple[Tensor, Tensor] | None  # rows and columns of all tokens, (B, 1) and (B, T)

    def filled(self, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at positions before `stop`, each (B, kv heads, S, head dim)."""
        keys, values = self.all[..., :stop, :].unbind()
        return keys, values

    def write(self, new: Tensor) -> None:
        """Stores the keys and values (2, B, kv heads, T, head dim) of the call's tokens."""
        if self.indices is None:
            self.slots.copy_(new)
        else:
            rows, columns = self.indices
            self.slots[:, rows, :, columns] = new.permute(1, 3, 0, 2, 4).to(self.slots.dtype)


_CGROUP_FILES = {  # by the controllers of /proc/self/cgroup (versions 2 and 1): limit, use, prefix of names in memory.stat
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine's memory, and within the limits of its cgroups (of a container).

    Cached files count as free, because Linux evicts them.
    """
    available, listed = int(psutil.virtual_memory().available), root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in _CGROUP_FILES:
            *files, prefix = _CGROUP_FILES[controllers]
            own = root / "sys/fs/cgroup" / controllers / path.strip("/")
            for group in (own, *own.parents):  # a container may see only its own group, mounted in place of the machine's root
                with suppress(OSError, ValueError):  # no such file; no limit ("max")
                    limit, used = (int((group / file).read_text()) for file in files)
                    cached = re.findall(rf"\b{prefix}(?:in)?active_file (\d+)", (group / "memory.stat").read_text())
                    available = min(available, limit - used + sum(map(int, cached)))
    return available
