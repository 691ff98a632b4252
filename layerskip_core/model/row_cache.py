"""KV caches as tensors of rows, for PyTorch's kernels and for transformers' layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Indices, KVCache, Places

_BLOCK = 64  # positions that are added together, and read together: a multiple of the kernels' tiles
_AHEAD = 256  # positions that get room before they are needed, at least, unless the text ends earlier


def _in_blocks(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


class RowCache(KVCache):
    """A tensor for all rows, (L, 2 for key and value, slots, kv heads, capacity, head dim), for PyTorch's kernels.

    They read all places and mask the rest, and 0 * NaN is NaN, so what another text left in a place is cleared. Rows have the
    first slots. The others are free: rows join and leave without moving the tensor, whose address recorded passes have.
    """

    def __init__(self, shape: tuple[int, int, int], batch_size: int, max_positions: int, like: Tensor) -> None:
        """`shape`: L, kv heads, head dim."""
        super().__init__(batch_size, max_positions)
        self.written = 0  # nothing was ever written from this position on
        self._matrices: dict[tuple[int, int | None, int | None], list[tuple[Tensor, Tensor, Tensor]]]  # the last views
        layers, heads, width = shape
        self._hold(like.new_zeros(layers, 2, batch_size, heads, 0, width))

    @property
    def memory(self) -> dict[int, int]:
        return {self.storage.data_ptr(): self.storage.nbytes}

    @property
    def capacity(self) -> int:
        """How many positions have room now."""
        return self.storage.shape[4]

    @property
    def slots(self) -> int:
        """How many rows have room now."""
        return self.storage.shape[2]

    @torch.inference_mode()
    def keep_rows(self, rows: Sequence[int]) -> None:
        if any(row < slot for slot, row in enumerate(rows)):  # in another order
            self._hold(self.storage[:, :, rows])
        else:
            for slot, row in enumerate(rows):
                if row != slot:
                    self.storage[:, :, slot, :, : self.written] = self.storage[:, :, row, :, : self.written]
        super().keep_rows(rows)

    @torch.inference_mode()
    def join(self, other: KVCache) -> None:
        assert isinstance(other, RowCache)
        first, theirs = self.rows, other.written
        super().join(other)
        held = self.reach(theirs)[:, :, first : self.rows]
        held[..., theirs : self.written, :] = 0
        held[..., :theirs, :] = other.storage[:, :, : other.rows, :, :theirs]
        self.written = max(self.written, theirs)

    def branch(self, rows: Indices, starts: Indices, stops: Indices | None = None, end: int | None = None) -> "RowCache":
        branch, stops = copy(self), stops or starts
        branch.rows, branch.max_positions, branch.features = len(rows), end or self.max_positions, [{} for _ in rows]
        branch.written = min(_in_blocks(max(stops)), self.capacity)
        with torch.inference_mode():  # which it may have been written in
            held = branch._hold(self.storage[:, :, list(rows), :, : branch.written])
            for row, stop in enumerate(stops):
                held[:, :, row, :, stop:] = 0
        return branch

    def reach(self, stop: int) -> Tensor:
        """The storage, which moves if it has too little room for all rows or for positions before `stop`.

        It grows to twice as many slots, and by half as many positions, or to the end of the texts.

        The keys of a head are contiguous, because attention over a long text is bound by reading them. Places come in whole
        blocks, the last of them partly filled, so that kernels can read all and mask the rest.
        """
        held, slots, capacity = self.storage, self.slots, self.capacity
        if capacity < stop or slots < self.rows:
            if capacity < stop:
                capacity = _in_blocks(min(self.max_positions, stop + max(_AHEAD, stop // 2)))
            places = min(_in_blocks(self.written), self.capacity)
            more = slots if slots >= self.rows else max(self.rows, 2 * slots)
            moved = held.new_zeros(*held.shape[:2], more, held.shape[3], capacity, held.shape[5])
            moved[:, :, :slots, :, :places] = held[..., :places, :]
            held = self._hold(moved)
        return held

    def matrices(self, rows: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer, the first three of LayerSlots, of all rows or some; of keys and values the blocks that were written."""
        held, key = self.storage[:, :, rows], (_in_blocks(self.written), rows.start, rows.stop)
        if key not in self._matrices:
            keys, values = held[..., : key[0], :].flatten(2, 3).unbind(1)
            self._matrices = {key: list(zip(held.unbind(), keys.transpose(2, 3).unbind(), values.unbind(), strict=True))}
        return self._matrices[key]

    def half(self, index: int, stop: int) -> Tensor:
        """(B, kv heads, capacity >= stop, head dim): the keys of layer 0, its values, those of layer 1, ... of all rows."""
        self.written = max(self.written, stop)
        self.reach(stop)
        return self._halves[index][: self.rows]

    def _hold(self, storage: Tensor) -> Tensor:
        self.storage, self._halves, self._matrices = storage, storage.flatten(0, 1).unbind(), {}
        return storage


Entry = tuple[int, str]
"""Of a layer, for each token: the index by which its attention addresses the cache, and `keys`, `values` or another kind."""

State = tuple[int, str, int]
"""Of a recurrent layer, for all tokens: the index by which it addresses the cache, `conv` or `recurrent`, and a number."""


class MixedCache(KVCache):
    """Entries of any shapes, for layers of transformers: keys as wide as values or not, and other widths in other layers.

    Entries of one shape lie in one RowCache, in pairs: a layer's keys and values, where all have one shape.

    No length rolls a recurrent state back. So the states after the last tokens of a pass are kept: after each from which a row
    may go on, by `steps_back`, and after the token before the pass.
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
        self.parts: dict[tuple[int, int], RowCache] = {}  # by shape, once there are entries
        self._pairs = {shape: -(-len(entries) // 2) for shape, entries in of_shape.items()}
        self.places = {entry: (shape, index) for shape, own in of_shape.items() for index, entry in enumerate(own)}

    def first(self, row: int) -> int:
        return 0 if self.rolls_back else self.max_positions

    @property
    def memory(self) -> dict[int, int]:
        held = {state.data_ptr(): state.nbytes for state in self.states.values()}
        return held | {address: size for part in self.parts.values() for address, size in part.memory.items()}

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        self.states = {state: held[:, rows] for state, held in self.states.items()}
        for part in self.parts.values():
            part.keep_rows(rows)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, MixedCache)
        for shape, part in {**other.parts, **self.parts}.items():
            self._part(shape, part.storage).join(other._part(shape, part.storage))
        for state in {*self.states, *other.states}:
            parts = [(self.states.get(state), self.rows), (other.states.get(state), other.rows)]
            like = max((held for held, _ in parts if held is not None), key=len)
            both = [like.new_zeros(1, count, *like.shape[2:]) if held is None else held for held, count in parts]
            self.states[state] = torch.cat([held.repeat_interleave(len(like) // len(held), 0) for held in both], dim=1)
        super().join(other)

    def branch(self, rows: Indices, starts: Indices, stops: Indices | None = None, end: int | None = None) -> "MixedCache":
        """Without stops only the states before the starts are kept."""
        branch = copy(self)
        branch.rows, branch.max_positions, branch.features = len(rows), end or self.max_positions, [{} for _ in rows]
        branch.states = {}
        branch.parts = {shape: part.branch(rows, starts, stops, end) for shape, part in self.parts.items()}
        with torch.inference_mode():
            for state, held in self.states.items():
                last = [(start - 1) % len(held) for start in starts]
                branch.states[state] = held[last, rows][None] if stops is None else held[:, rows]
        return branch

    def held(self, entry: Entry, stop: int, like: Tensor) -> Tensor:
        """(B, heads, capacity >= stop, width): what all rows have of an entry."""
        shape, index = self.places[entry]
        return self._part(shape, like).half(index, stop)

    def _part(self, shape: tuple[int, int], like: Tensor) -> RowCache:
        """The entries of a shape, which begin with the first."""
        if shape not in self.parts:
            self.parts[shape] = RowCache((self._pairs[shape], *shape), self.rows, self.max_positions, like)
        return self.parts[shape]


def write_entries(layer: int, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """Writes keys and values (N, kv heads, head dim) of a layer that runs on PyTorch's kernels, whatever the others do.

    Returns the layer's keys and values at all positions before the pass's last, (B, kv heads, S, head dim).
    """
    cache, found = places.cache, []
    assert isinstance(cache, RowCache | MixedCache)
    rows, positions = (part.to(keys.device, non_blocking=True) for part in (places.rows, places.positions))
    for index, new in enumerate((keys, values)):
        if isinstance(cache, RowCache):
            held = cache.half(2 * layer + index, places.stop)
        else:
            held = cache.held((layer, ("keys", "values")[index]), places.stop, new)
        held[rows, :, positions] = new.to(held.dtype)
        found.append(held[:, :, : places.stop].to(new.dtype))
    return found[0], found[1]


class EntryWriter:
    """Where one call writes and reads the entries of tokens at `positions` (B, T), on the host, and recurrent states.

    `row`: the call has this row of the cache alone, with positions (1, T). `shift`: what is added to the indices by which
    layers address the cache. `settled`: see Places.
    """

    def __init__(
        self, cache: MixedCache, positions: Tensor, row: int | None = None, shift: int = 0, settled: bool = False
    ) -> None:
        self.start, self.stop, self.contiguous = _places(positions)
        self._cache, self._positions, self._row, self._shift = cache, positions, row, shift
        self._indices: tuple[Tensor, slice, Tensor] | None = None  # of all tokens, where they do not stand in one slice
        self.first_kept = max(positions.shape[1] - 1 - (0 if settled else cache.steps_back), 0)
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
            if held is None or len(held) > 1:  # the only one is of rows that go on from a kept text, perhaps after this call
                held = new.new_zeros(1, self._cache.rows, *new.shape[1:])
            held = self._cache.states[state] = held.repeat_interleave(count, 0)
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
        held = self._cache.held((entry[0] + self._shift, entry[1]), self.stop, like)
        return held if self._row is None else held[self._row : self._row + 1]


def _places(positions: Tensor) -> tuple[int, int, bool]:
    """(the first of positions (B, T) on the host, the last + 1, whether all rows are at the same consecutive ones).

    Such rows, always so a single one, are written as one slice.
    """
    rows: list[list[int]] = positions.tolist()
    start, stop = rows[0][0], max(map(max, rows)) + 1
    span = list(range(start, start + positions.shape[1]))
    return start, stop, all(row == span for row in rows)


class SpanWriter:
    """Where a span of layers writes its keys and values, for tokens at `positions` (B, T), or (1, T) of one `row`.

    On the device they are those of a pass that is recorded: it attends to the whole capacity, under masks, and finds room.
    """

    def __init__(self, cache: RowCache, positions: Tensor, row: int | None = None) -> None:
        self._cache, self._positions = cache, positions
        self._rows = slice(len(positions)) if row is None else slice(row, row + 1)
        self.start, self.stop, self.contiguous = 0, cache.capacity, False
        if positions.device.type == "cpu":
            self.start, self.stop, self.contiguous = _places(positions)
        cache.written = max(cache.written, self.stop)

    def layers(self, start: int, stop: int) -> list["LayerSlots"]:
        """Where each layer of a span writes and reads. All views are made in one call: one call per layer is slower."""
        held, indices = self._cache.reach(self.stop)[start:stop, :, self._rows], None
        if self.contiguous:
            slots = held[..., self.start : self.stop, :].unbind()
        else:
            rows = torch.arange(self._positions.shape[0], device=held.device)[:, None]
            slots, indices = held.unbind(), (rows, self._positions.to(held.device, non_blocking=True))
        views = self._cache.matrices(self._rows)[start:stop]
        return [LayerSlots(*of_layer, into, indices) for of_layer, into in zip(views, slots, strict=True)]


class LayerSlots(NamedTuple):
    """One layer's part of the cache in one call."""

    all: Tensor  # (2, B, kv heads, capacity, head dim)
    keys: Tensor  # (B * kv heads, head dim, places), to be read after `write`
    values: Tensor  # (B * kv heads, places, head dim)
    slots: Tensor  # (2, B, kv heads, T, head dim) to write to; the whole layer where `indices` select the places
    indices: tuple[Tensor, Tensor] | None  # rows and columns of all tokens, (B, 1) and (B, T)

    def write(self, new: Tensor) -> None:
        """Stores the keys and values (2, B, kv heads, T, head dim) of the call's tokens."""
        if self.indices is None:
            self.slots.copy_(new)
        else:
            rows, columns = self.indices
            self.slots[:, rows, :, columns] = new.permute(1, 3, 0, 2, 4).to(self.slots.dtype)
