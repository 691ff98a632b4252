"""A KV cache addressed by position: rejecting drafted tokens copies nothing, because later tokens overwrite their places."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
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


@lru_cache(256)
def _starts(rows: int, count: int) -> Tensor:
    return torch.arange(0, rows * count + 1, count, dtype=torch.int32)


class KVCache:
    """Keys and values of all L layers for B rows. The index of a key is the position of its token.

    So a query at position p sees exactly the indices 0..p. What stands after them (rejected drafts, padding) has weight 0. It
    is read all the same, and 0 * NaN is NaN, so what another text left there is cleared: see `join` and `clear`.

    A row that leaves is only forgotten, and one that joins takes its slot if it can: `slots` are the places of the `rows` in
    the storage of `scattered`. Other readers ask for `room`, where the rows stand next to each other.
    """

    rolls_back = True  # whether a row can go on from any position, and not only from those that MixedCache keeps states of
    steps_back = 8  # how far before the end of a call its rows may go on
    ends: Sequence[int] | None = None  # by row, the position from which it goes on after this call; None: from any within

    def __init__(self, num_layers: int, batch_size: int, max_positions: int) -> None:
        """`max_positions`: a token beyond it is refused. It is the context, or the end of the text where that is known."""
        self.max_positions = max_positions
        self.rows = batch_size
        self.slots = torch.arange(batch_size)
        self.written = 0  # nothing was ever written from this position on
        self._matrices: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # for so many places
        self.halves: Sequence[Tensor] = ()  # (slots, kv heads, capacity, head dim): the keys of layer 0, its values, ...
        self._num_layers = num_layers
        self._spares = False  # whether its readers find rows by their slots, so that there may be slots without a row
        self._storage: Tensor | None = None  # (L, 2 for key and value, slots, kv heads, capacity, head dim)

    @property
    def storages(self) -> list[Tensor]:
        """All that is written, as it is stored; of keys and values, rows stand at dimension 2, positions at dimension 4."""
        return [] if self._storage is None else [self._storage]

    @property
    def capacity(self) -> int:
        """How many positions have room now."""
        return 0 if self._storage is None else self._storage.shape[4]

    def keep_rows(self, rows: list[int]) -> None:
        """Keeps only the rows at the indices `rows`, in that order. One that is there several times is copied.

        The storage shrinks when at most a quarter of its slots are left in use, so rows that come and go seldom move it.
        """
        self.rows, self.slots = len(rows), self.slots[rows]
        held = self._storage
        if held is not None and (len(set(rows)) < len(rows) or 4 * self.rows <= held.shape[2]):
            self._move(held, self.rows)

    def join(self, other: "KVCache") -> None:
        """Adds the rows of another cache of the same model after its own. Both have keys and values."""
        held, added = self._storage, other._storage
        assert held is not None and added is not None
        rows, slots = self.rows + other.rows, held.shape[2]
        places = min(_in_blocks(other.written), added.shape[4])
        self.max_positions = max(self.max_positions, other.max_positions)
        if slots < rows:
            slots = max(rows, 2 * slots) if self._spares else rows
        if held.shape[2] < slots or held.shape[4] < places:
            held = self._move(held, slots, places)
        used = set(self.slots.tolist())
        free = [slot for slot in range(held.shape[2]) if slot not in used][: other.rows]
        for slot, source in zip(free, other.slots.tolist(), strict=True):
            held[:, :, slot, :, :places] = added[:, :, source, :, :places]
            held[:, :, slot, :, places : self.written] = 0
        self.rows, self.written = rows, max(self.written, other.written)
        self.slots = torch.cat((self.slots, torch.tensor(free)))

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, kv heads, T, head dim) of a layer that runs on PyTorch's kernels, whatever the others do.

        `positions` (B, T) are on the host. Returns the layer's keys and values at all positions up to the last of them.
        """
        stop, (_, heads, _, width) = int(positions.max()) + 1, keys.shape
        like = keys if self._storage is None else self._storage
        storage = (self.scattered if self._spares else self.room)(stop, heads, width, like)
        held, rows = storage[layer], self.slots if self._spares else torch.arange(self.rows)
        first = int(rows[0])
        rows, places = (part.to(held.device, non_blocking=True) for part in (rows, positions))
        for part, new in zip(held, (keys, values), strict=True):
            part[rows[:, None], :, places] = new.transpose(1, 2).to(part.dtype)
        self.written = max(self.written, stop)
        own = held[:, rows] if len(rows) > 1 else held[:, first, None]
        return own[0, ..., :stop, :].to(keys.dtype), own[1, ..., :stop, :].to(keys.dtype)

    def fill(self, other: "KVCache", row: int, stop: int) -> None:
        """Copies what a row of another cache has at positions before `stop` into this one, which is empty, of one row."""
        held = other._storage
        if held is not None:
            self._spares, self.written = other._spares, min(_in_blocks(stop), held.shape[4])
            self._move(held[:, :, int(other.slots[row]), None, :, : self.written], 1)
            self.clear(stop)

    def clear(self, start: int) -> None:
        """Forgets what all rows have from position `start` on, so that another text can go on there.

        The compiled kernels need no clearing: they keep finite values only, in an order of their own.
        """
        if self._storage is not None and start < self.written and not self._spares:
            with torch.inference_mode():  # which it may have been written in
                self._storage[..., start : self.written, :] = 0

    def writer(self, positions: Tensor) -> "SpanWriter":
        """Where a span of layers writes its keys and values, for tokens at `positions` (B, T).

        On the device they are those of a pass that is recorded: it attends to the whole capacity, under masks, and finds room.
        """
        return SpanWriter(self, positions)

    def room(self, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        """The storage, (L, 2, B, kv heads, capacity >= stop, head dim), grown if necessary.

        The keys of a head are contiguous, because attention over a long text is bound by reading them. Places come in whole
        blocks, the last of them partly filled, so that kernels can read all and mask the rest. Within a block, a head's numbers
        may stand in an order of the backend's own.
        """
        held, rows = self._begun(kv_heads, head_dim, like), self.rows
        if held.shape[2] != rows or not torch.equal(self.slots, torch.arange(rows)):
            return self._move(held, rows, stop)
        return self.reach(stop)

    def scattered(self, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        """The same, for a reader that finds each row at its slot: (L, 2, slots, kv heads, capacity >= stop, head dim)."""
        self._spares = True
        self._begun(kv_heads, head_dim, like)
        return self.reach(stop)

    def reach(self, stop: int) -> Tensor:
        """The storage, which has begun; it moves if it has too little room for positions before `stop`."""
        held = self._storage
        assert held is not None
        return held if held.shape[4] >= stop else self._move(held, held.shape[2], stop)

    def matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer, the first three of LayerSlots; of keys and values the blocks that were written."""
        held, places = self._storage, _in_blocks(self.written)
        assert held is not None
        if places not in self._matrices:
            keys, values = held[..., :places, :].flatten(2, 3).unbind(1)
            self._matrices = {places: list(zip(held.unbind(), keys.transpose(2, 3).unbind(), values.unbind(), strict=True))}
        return self._matrices[places]

    def sequences(self, count: int) -> tuple[Tensor, Tensor]:
        """For a call of `count` tokens of each row: the slot of each token, and where each row's tokens begin, and end."""
        return self.slots if count == 1 else self.slots.repeat_interleave(count), _starts(self.rows, count)

    def _begun(self, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        if self._storage is None:
            self._storage = like.new_zeros(self._num_layers, 2, self.rows, kv_heads, 0, head_dim)
            self.slots = torch.arange(self.rows)
        return self._storage

    def _move(self, held: Tensor, slots: int, stop: int = 0) -> Tensor:
        """Moves the rows to the first slots of another storage. For positions before `stop` it grows by half, or to the end."""
        capacity = held.shape[4]
        if stop > capacity:
            capacity = _in_blocks(min(self.max_positions, stop + max(_AHEAD, stop // 2)))
        moved = held.new_zeros(*held.shape[:2], slots, held.shape[3], capacity, held.shape[5])
        places = min(_in_blocks(self.written), held.shape[4])
        for row, slot in enumerate(self.slots.tolist()):
            moved[:, :, row, :, :places] = held[:, :, slot, :, :places]
        self.slots, self._storage, self.halves = torch.arange(self.rows), moved, moved.flatten(0, 1).unbind()
        self._matrices = {}
        return moved


class TokenRows(KVCache):
    """Another cache, for a call of some tokens of each of its rows: each token is a row of its own, row by row.

    For readers of `scattered` alone.
    """

    def __init__(self, cache: KVCache, counts: Sequence[int]) -> None:
        """`counts`: of tokens, by row."""
        super().__init__(cache._num_layers, sum(counts), cache.max_positions)
        self._cache, self._counts = cache, torch.tensor(counts)

    def writer(self, positions: Tensor) -> "SpanWriter":
        return self._cache.writer(positions)

    def scattered(self, stop: int, kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
        return self._cache.scattered(stop, kv_heads, head_dim, like)

    def sequences(self, count: int) -> tuple[Tensor, Tensor]:
        ends = self._counts[self._counts > 0].cumsum(0, dtype=torch.int32)
        return self._cache.slots.repeat_interleave(self._counts), F.pad(ends, (1, 0))


Entry = tuple[int, str]
"""Of a layer, for each token: the index by which its attention addresses the cache, and `keys`, `values` or another kind."""

State = tuple[int, str, int]
"""Of a recurrent layer, for all tokens: the index by which it addresses the cache, `conv` or `recurrent`, and a number."""


class MixedCache(KVCache):
    """Entries of any shapes, for layers of transformers: keys as wide as values or not, and other widths in other layers.

    Entries of one shape lie in one KVCache, in pairs: a layer's keys and values, where all have one shape.

    No length rolls a recurrent state back. So the states after the last tokens of a call are kept: after each from which a row
    may go on, by `steps_back` and `ends`, and after the token before the call.
    """

    def __init__(
        self, shapes: Mapping[Entry, tuple[int, int]], batch_size: int, max_positions: int, rolls_back: bool = True
    ) -> None:
        """`shapes`: number and width of the heads of each entry. `rolls_back`: whether no layer is recurrent."""
        super().__init__(0, batch_size, max_positions)
        self.rolls_back = rolls_back
        self.states: dict[State, Tensor] = {}  # (S, B, ...): after position p at p modulo S
        of_shape = defaultdict[tuple[int, int], list[Entry]](list)
        for entry, shape in shapes.items():
            of_shape[shape].append(entry)
        self.parts = [KVCache(-(-len(entries) // 2), batch_size, max_positions) for entries in of_shape.values()]
        self.places = {
            entry: (part, shape, index)
            for part, (shape, entries) in zip(self.parts, of_shape.items(), strict=True)
            for index, entry in enumerate(entries)
        }

    @property
    def storages(self) -> list[Tensor]:
        return [*(storage for part in self.parts for storage in part.storages), *self.states.values()]

    def keep_rows(self, rows: list[int]) -> None:
        self.rows = len(rows)
        self.states = {state: held[:, rows] for state, held in self.states.items()}
        for part in self.parts:
            part.keep_rows(rows)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, MixedCache)
        for part, added in zip(self.parts, other.parts, strict=True):
            if part.capacity:
                part.join(added)
            else:  # of layers that an early exit never runs
                part.rows += added.rows
                part.slots = torch.arange(part.rows)
        self.states = {state: torch.cat((held, other.states[state]), dim=1) for state, held in self.states.items()}
        self.rows, self.written = self.rows + other.rows, max(self.written, other.written)
        self.max_positions = max(self.max_positions, other.max_positions)

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        writer = EntryWriter(self, positions)
        return writer.put((layer, "keys"), keys), writer.put((layer, "values"), values)

    def fill(self, other: KVCache, row: int, stop: int) -> None:
        assert isinstance(other, MixedCache)
        for part, source in zip(self.parts, other.parts, strict=True):
            part.fill(source, row, stop)
        self.states = {state: held[(stop - 1) % len(held), row].clone()[None, None] for state, held in other.states.items()}
        self.written = stop

    def clear(self, start: int) -> None:
        for part in self.parts:
            part.clear(start)


class EntryWriter:
    """Where one call writes and reads the entries of tokens at `positions` (B, T), on the host, and recurrent states.

    `row`: the call has this row of the cache alone, with positions (1, T). `shift`: what is added to the indices by which
    layers address the cache.
    """

    def __init__(self, cache: MixedCache, positions: Tensor, row: int | None = None, shift: int = 0) -> None:
        span = SpanWriter(cache, positions)
        self.start, self.stop, self.contiguous = span.start, span.stop, span.contiguous
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
        part, shape, index = self._cache.places[entry[0] + self._shift, entry[1]]
        if id(part) not in self._ready:
            part.written = max(part.written, self.stop)
            part.room(self.stop, *shape, like)
            self._ready.add(id(part))
        held = part.halves[index]
        return held if self._row is None else held[self._row : self._row + 1]


class SpanWriter:
    """Where a call writes its tokens."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._cache, self._positions = cache, positions
        if positions.device.type != "cpu":
            self.start, self.stop, self.contiguous = 0, cache.capacity, False
        else:
            rows: list[list[int]] = positions.tolist()
            self.start, self.stop = rows[0][0], max(map(max, rows)) + 1
            if self.stop > (limit := cache.max_positions):
                raise ConfigError(f"the context limit of {limit} tokens is reached: position {self.stop - 1} was requested")
            # Rows at the same consecutive positions (always so for a single row) are written as one slice.
            span = list(range(self.start, self.start + positions.shape[1]))
            self.contiguous = all(row == span for row in rows)
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
