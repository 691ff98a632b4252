"""KV caches as tensors of rows, for PyTorch's kernels and for transformers' layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Indices, KVCache, Places

_STRIDE = 64  # positions by which tensors grow and are read: a multiple of the kernels' tiles
_AHEAD = 256  # least number of positions allocated ahead, unless the text ends earlier


def _in_strides(count: int) -> int:
    return -(-count // _STRIDE) * _STRIDE


class RowCache(KVCache):
    """One tensor for all rows, (L, 2 for key and value, slots, kv heads, capacity, head dim), for
    PyTorch's kernels.

    Kernels read all positions under a mask, and 0 * NaN is NaN, so entries of other texts are
    zeroed. Rows have the first slots; thanks to free ones, rows join and leave without moving the
    tensor, whose address recorded passes hold.
    """

    def __init__(
        self, shape: tuple[int, int, int], batch_size: int, max_positions: int, like: Tensor
    ) -> None:
        """`shape`: L, kv heads, head dim."""
        super().__init__(batch_size, max_positions)
        self.written = 0  # nothing was ever written from this position on
        self._matrices: dict[
            tuple[int, int | None, int | None], list[tuple[Tensor, Tensor, Tensor]]
        ]  # the latest views
        layers, heads, width = shape
        self._hold(like.new_zeros(layers, 2, batch_size, heads, 0, width))

    @property
    def memory(self) -> dict[int, int]:
        return {self.storage.data_ptr(): self.storage.nbytes}

    @property
    def capacity(self) -> int:
        """The number of allocated positions."""
        return self.storage.shape[4]

    @property
    def slots(self) -> int:
        """The number of allocated rows."""
        return self.storage.shape[2]

    @torch.inference_mode()
    def keep_rows(self, rows: Sequence[int]) -> None:
        if any(row < slot for slot, row in enumerate(rows)):  # in another order
            self._hold(self.storage[:, :, rows])
        else:
            for slot, row in enumerate(rows):
                if row != slot:
                    self.storage[:, :, slot, :, : self.written] = self.storage[
                        :, :, row, :, : self.written
                    ]
        super().keep_rows(rows)

    @torch.inference_mode()
    def join(self, other: KVCache) -> None:
        assert isinstance(other, RowCache)
        first = self.rows
        theirs = other.written
        super().join(other)
        held = self.reach(theirs)[:, :, first : self.rows]
        held[..., theirs : self.written, :] = 0
        held[..., :theirs, :] = other.storage[:, :, : other.rows, :, :theirs]
        self.written = max(self.written, theirs)

    def branch(
        self,
        rows: Indices,
        starts: Indices,
        ends: Indices | None = None,
        max_positions: int | None = None,
    ) -> "RowCache":
        branch = copy(self)
        ends = ends or starts
        branch.rows = len(rows)
        branch.max_positions = max_positions or self.max_positions
        branch.features = [{} for _ in rows]
        branch.unwritten = [[] for _ in rows]
        branch.written = min(_in_strides(max(ends)), self.capacity)
        with torch.inference_mode():  # the storage may be an inference tensor
            held = branch._hold(self.storage[:, :, list(rows), :, : branch.written])
            for row, end in enumerate(ends):
                held[:, :, row, :, end:] = 0
        return branch

    def reach(self, end: int) -> Tensor:
        """The storage, reallocated if it lacks slots for all rows or positions before `end`.

        Slots at least double; positions grow to half more than `end`, or to the end of the texts.

        A head's keys are contiguous, because attention over a long text is bound by reading them.
        Capacity comes in whole blocks, the last of them partly filled, so that kernels can read all
        under a mask.
        """
        held = self.storage
        slots = self.slots
        capacity = self.capacity
        if capacity < end or slots < self.rows:
            if capacity < end:
                capacity = _in_strides(min(self.max_positions, end + max(_AHEAD, end // 2)))
            places = min(_in_strides(self.written), self.capacity)
            more = slots if slots >= self.rows else max(self.rows, 2 * slots)
            moved = held.new_zeros(*held.shape[:2], more, held.shape[3], capacity, held.shape[5])
            moved[:, :, :slots, :, :places] = held[..., :places, :]
            held = self._hold(moved)
        return held

    def matrices(self, rows: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer, the first three fields of LayerSlots for `rows`; keys and values in whole
        blocks, as far as written.
        """
        held = self.storage[:, :, rows]
        key = (_in_strides(self.written), rows.start, rows.stop)
        if key not in self._matrices:
            keys, values = held[..., : key[0], :].flatten(2, 3).unbind(1)
            self._matrices = {
                key: list(
                    zip(held.unbind(), keys.transpose(2, 3).unbind(), values.unbind(), strict=True)
                )
            }
        return self._matrices[key]

    def half(self, index: int, end: int) -> Tensor:
        """(B, kv heads, capacity >= end, head dim): the keys of layer 0, its values, the keys of
        layer 1, ..., of all rows.
        """
        self.written = max(self.written, end)
        self.reach(end)
        return self._halves[index][: self.rows]

    def _hold(self, storage: Tensor) -> Tensor:
        self.storage = storage
        self._halves = storage.flatten(0, 1).unbind()
        self._matrices = {}
        return storage


Entry = tuple[int, str]
"""What a layer caches per token: the index by which its attention addresses the cache, and `keys`, `values` or another kind."""

State = tuple[int, str, int]
"""A state of a recurrent layer: the index by which the layer addresses the cache, `conv` or `recurrent`, and a number."""


class MixedCache(KVCache):
    """Entries of any shape, for layers of transformers: widths may differ between keys and values,
    and between layers.

    Entries of one shape share a RowCache, in pairs: a layer's keys and values, if all shapes are
    equal.

    A recurrent state cannot be rolled back. So a pass keeps the state after each token from which a
    row may continue, by `steps_back`, and the state before the pass. Without drafts one state is
    kept, which layers may update in place.
    """

    def __init__(
        self,
        shapes: Mapping[Entry, tuple[int, int]],
        batch_size: int,
        max_positions: int,
        rolls_back: bool = True,
    ) -> None:
        """`shapes`: number and width of the heads of each entry. `rolls_back`: whether no layer is
        recurrent.
        """
        super().__init__(batch_size, max_positions)
        self.rolls_back = rolls_back
        self.states: dict[State, Tensor] = {}  # (S, B, ...): after position p at p modulo S
        of_shape = defaultdict[tuple[int, int], list[Entry]](list)
        for entry, shape in shapes.items():
            of_shape[shape].append(entry)
        self.parts: dict[tuple[int, int], RowCache] = {}  # by shape, once there are entries
        self._pairs = {shape: -(-len(entries) // 2) for shape, entries in of_shape.items()}
        self.places = {
            entry: (shape, index)
            for shape, own in of_shape.items()
            for index, entry in enumerate(own)
        }

    def first(self, row: int) -> int:
        return 0 if self.rolls_back else self.max_positions

    @property
    def memory(self) -> dict[int, int]:
        held = {state.data_ptr(): state.nbytes for state in self.states.values()}
        return held | {
            address: size for part in self.parts.values() for address, size in part.memory.items()
        }

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
            both = [
                like.new_zeros(1, count, *like.shape[2:]) if held is None else held
                for held, count in parts
            ]
            self.states[state] = torch.cat(
                [held.repeat_interleave(len(like) // len(held), 0) for held in both], dim=1
            )
        super().join(other)

    def branch(
        self,
        rows: Indices,
        starts: Indices,
        ends: Indices | None = None,
        max_positions: int | None = None,
    ) -> "MixedCache":
        """Without ends, each row gets one recurrent state: the one before its start."""
        branch = copy(self)
        branch.rows = len(rows)
        branch.max_positions = max_positions or self.max_positions
        branch.features = [{} for _ in rows]
        branch.unwritten = [[] for _ in rows]
        branch.states = {}
        branch.parts = {
            shape: part.branch(rows, starts, ends, max_positions)
            for shape, part in self.parts.items()
        }
        with torch.inference_mode():
            for state, held in self.states.items():
                last = [(start - 1) % len(held) for start in starts]
                branch.states[state] = held[last, rows][None] if ends is None else held[:, rows]
        return branch

    def held(self, entry: Entry, end: int, like: Tensor) -> Tensor:
        """(B, heads, capacity >= end, width): an entry of all rows."""
        shape, index = self.places[entry]
        return self._part(shape, like).half(index, end)

    def _part(self, shape: tuple[int, int], like: Tensor) -> RowCache:
        """The RowCache of a shape, created at its first entry."""
        if shape not in self.parts:
            self.parts[shape] = RowCache(
                (self._pairs[shape], *shape), self.rows, self.max_positions, like
            )
        return self.parts[shape]


def write_entries(
    layer: int, keys: Tensor, values: Tensor, places: Places
) -> tuple[Tensor, Tensor]:
    """Writes keys and values (N, kv heads, head dim) of a layer on PyTorch's kernels, whatever the
    other layers run on.

    Returns the layer's keys and values at all positions before the pass's last, (B, kv heads, S,
    head dim).
    """
    cache = places.cache
    found = []
    assert isinstance(cache, RowCache | MixedCache)
    rows, positions = (
        part.to(keys.device, non_blocking=True) for part in (places.rows, places.positions)
    )
    for index, new in enumerate((keys, values)):
        if isinstance(cache, RowCache):
            held = cache.half(2 * layer + index, places.end)
        else:
            held = cache.held((layer, ("keys", "values")[index]), places.end, new)
        held[rows, :, positions] = new.to(held.dtype)
        found.append(held[:, :, : places.end].to(new.dtype))
    return found[0], found[1]


class EntryWriter:
    """Writes and reads, for one call, entries of tokens at `positions` (B, T), on the host, and
    recurrent states.

    `row`: the only row of the cache in the call, with positions (1, T). `shift`: added to the
    indices by which layers address the cache. `no_rollback`: see Places.
    """

    def __init__(
        self,
        cache: MixedCache,
        positions: Tensor,
        row: int | None = None,
        shift: int = 0,
        no_rollback: bool = False,
    ) -> None:
        self.start, self.end, self.contiguous = _places(positions)
        self._cache = cache
        self._positions = positions
        self._row = row
        self._shift = shift
        self._firsts: list[int] = positions[:, 0].tolist()
        self._lent: dict[State, Tensor] = {}  # the cache's own states, which layers update in place
        # Where entries of all tokens go, unless these are one slice
        self._indices: tuple[Tensor, slice, Tensor] | None = None
        self.first_kept = max(positions.shape[1] - 1 - (0 if no_rollback else cache.steps_back), 0)
        self.begins = not any(self._firsts)  # whether no row has an earlier token

    def put(self, entry: Entry, new: Tensor) -> Tensor:
        """Writes an entry (B, heads, T, width); returns it for all positions before `end`, (B,
        heads, S, width).
        """
        held = self._held(entry, new)
        if self.contiguous:
            held[:, :, self.start : self.end] = new
        else:
            if self._indices is None:
                rows = torch.arange(len(self._positions), device=new.device)[:, None]
                self._indices = rows, slice(None), self._positions.to(new.device, non_blocking=True)
            held[self._indices] = new.transpose(1, 2).to(held.dtype)
        return held[:, :, : self.end]

    def get(self, entry: Entry, like: Tensor) -> Tensor:
        """The entry as written so far, for all positions before `end`."""
        return self._held(entry, like)[:, :, : self.end]

    def before(self, state: State) -> Tensor | None:
        """The state (B, ...) before the call; None if no row has one, 0 in rows without earlier
        tokens.

        It is a copy, unless nobody needs it after the call.
        """
        held = self._cache.states.get(self._shifted(state))
        if self.begins or held is None:
            return None
        found = self._rows_of(held)[self._places([first - 1 for first in self._firsts], len(held))]
        if len(held) == self._count == 1:
            self._lent[state] = found
        else:
            found = found.clone()
        if 0 in self._firsts:
            found[[row for row, first in enumerate(self._firsts) if first == 0]] = 0
        return found

    def keep(self, state: State, column: int, new: Tensor) -> None:
        """Stores the state (B, ...) after the tokens in a column of the positions."""
        if self._lent.get(state) is new:
            return
        state = self._shifted(state)
        count = self._count
        held = self._cache.states.get(state)
        if held is None or len(held) != count:
            # A single one stays: branched rows continue from it, perhaps in a later call
            if held is None or len(held) > 1:
                held = new.new_zeros(1, self._cache.rows, *new.shape[1:])
            held = self._cache.states[state] = held.repeat_interleave(count, 0)
        self._rows_of(held)[self._places(self._positions[:, column].tolist(), count)] = new.to(
            held.dtype
        )

    @property
    def _count(self) -> int:
        """The number of states kept per row."""
        return self._cache.steps_back + 2 if self._cache.steps_back else 1

    def _shifted(self, state: State) -> State:
        return state[0] + self._shift, *state[1:]

    def _rows_of(self, held: Tensor) -> Tensor:
        return held if self._row is None else held[:, self._row : self._row + 1]

    def _places(self, positions: Sequence[int], count: int) -> Any:
        """Indices of the rows' states after `positions`, in rings of `count` states."""
        places = [position % count for position in positions]
        return places[0] if len(set(places)) == 1 else (places, list(range(len(places))))

    def _held(self, entry: Entry, like: Tensor) -> Tensor:
        held = self._cache.held((entry[0] + self._shift, entry[1]), self.end, like)
        return held if self._row is None else held[self._row : self._row + 1]


def _places(positions: Tensor) -> tuple[int, int, bool]:
    """(first of positions (B, T) on the host, last + 1, whether all rows are at the same
    consecutive positions).

    Such rows are written as one slice; a single row always is.
    """
    rows: list[list[int]] = positions.tolist()
    start = rows[0][0]
    end = max(map(max, rows)) + 1
    span = list(range(start, start + positions.shape[1]))
    return start, end, all(row == span for row in rows)


class SpanWriter:
    """Writes keys and values of a span of layers, for tokens at `positions` (B, T), or (1, T) of
    one `row`.

    Positions on the device are of a recorded pass: it attends to the whole capacity, under masks;
    its room is allocated.
    """

    def __init__(self, cache: RowCache, positions: Tensor, row: int | None = None) -> None:
        self._cache = cache
        self._positions = positions
        self._rows = slice(len(positions)) if row is None else slice(row, row + 1)
        self.start = 0
        self.end = cache.capacity
        self.contiguous = False
        if positions.device.type == "cpu":
            self.start, self.end, self.contiguous = _places(positions)
        cache.written = max(cache.written, self.end)

    def layers(self, start: int, end: int) -> list["LayerSlots"]:
        """Where each layer of a span writes and reads. All views are made in one call: one call per
        layer is slower.
        """
        held = self._cache.reach(self.end)[start:end, :, self._rows]
        indices = None
        if self.contiguous:
            slots = held[..., self.start : self.end, :].unbind()
        else:
            rows = torch.arange(self._positions.shape[0], device=held.device)[:, None]
            slots = held.unbind()
            indices = (rows, self._positions.to(held.device, non_blocking=True))
        views = self._cache.matrices(self._rows)[start:end]
        return [
            LayerSlots(*of_layer, into, indices)
            for of_layer, into in zip(views, slots, strict=True)
        ]


class LayerSlots(NamedTuple):
    """One layer's part of the cache in one call."""

    all: Tensor  # (2, B, kv heads, capacity, head dim)
    keys: Tensor  # (B * kv heads, head dim, places), to be read after `write`
    values: Tensor  # (B * kv heads, places, head dim)
    # (2, B, kv heads, T, head dim) to write to; the whole layer where `indices` select the places
    slots: Tensor
    indices: tuple[Tensor, Tensor] | None  # rows and columns of all tokens, (B, 1) and (B, T)

    def write(self, new: Tensor) -> None:
        """Stores the keys and values (2, B, kv heads, T, head dim) of the call's tokens."""
        if self.indices is None:
            self.slots.copy_(new)
        else:
            rows, columns = self.indices
            self.slots[:, rows, :, columns] = new.permute(1, 3, 0, 2, 4).to(self.slots.dtype)
