"""Replacements around transformers' layers: a cache with transformers' interface, forwards of
modules, and hidden states.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .row_cache import Entry, State

Forward = Callable[..., Any]


class Writer(Protocol):
    """Writes and reads entries and recurrent states of the tokens in one call, positions
    start..end-1: `row_cache.EntryWriter`, or in the first prefill `probe.EntryRecorder`.
    """

    start: int
    end: int
    contiguous: bool  # whether all rows are at the same consecutive positions
    first_kept: int  # the first token after which states are kept
    begins: bool  # whether no row has an earlier token

    def put(self, entry: Entry, new: Tensor) -> Tensor: ...
    def get(self, entry: Entry, like: Tensor) -> Tensor: ...
    def before(self, state: State) -> Tensor | None: ...
    def keep(self, state: State, column: int, new: Tensor) -> None: ...


class Written(Exception):
    """Ends the forward of a layer that only had to write its entries."""


class PositionCache:
    """A cache with transformers' interface, for one call: keys, values and recurrent states."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, writer: Writer, ends: Collection[Entry] = ()) -> None:
        """`ends`: the last entries of layers; writing one ends its layer (`Written`)."""
        self.writer = writer
        self._ends = ends
        # The states of the recurrent module that runs, after its tokens so far
        self._states: dict[State, Tensor | None] = {}
        # The last token of the piece that it runs; None while none runs in pieces
        self._column: int | None = None
        self._has_past = not writer.begins

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, heads, T, width); returns those of all positions."""
        return self._put((layer_idx, "keys"), keys), self._put((layer_idx, "values"), values)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """`update` for the keys (B, T, width) of an indexer, which selects positions for sparse
        attention.
        """
        return self._put((layer_idx, "indexer"), keys[:, None])[:, 0]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state((layer_idx, "conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state((layer_idx, "recurrent", state_idx))

    def update_conv_state(
        self,
        new: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: object,
    ) -> Tensor:
        """Takes a convolution's inputs (B, channels, T); returns them after its earlier inputs, if
        any.
        """
        state = (layer_idx, "conv", state_idx)
        width = conv_kernel_size or new.shape[-1]
        before = self._state(state)
        earlier = F.pad(new[..., :0], (width, 0)) if before is None else before
        inputs = torch.cat([earlier, new], dim=-1)
        if self._column is not None:
            self._states[state] = inputs[..., -width:]
        else:
            for column in range(self.writer.first_kept, new.shape[-1]):
                self.writer.keep(state, column, inputs[..., column + 1 : column + 1 + width])
        return new if before is None else inputs

    def update_recurrent_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> Tensor:
        if self._column is None:  # in the probe, which records the module
            self.writer.keep((layer_idx, "recurrent", state_idx), 0, new)
        self._states[layer_idx, "recurrent", state_idx] = new
        return new

    get_linear_cache = get_recurrent_state  # MiniMax's name

    def set_linear_cache(self, layer_idx: int, new: Tensor) -> None:
        self.update_recurrent_state(new, layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """If true, convolutions call `update_conv_state` even for one token; else they then update
        the state in place.
        """
        return self._column is None

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self._has_past

    @property
    def layers(self) -> Any:
        """By layer, the attributes that transformers before 5.24 reads."""
        return _Indexed(
            lambda layer: SimpleNamespace(
                record_past=True,
                conv_states=_Indexed(partial(self.get_conv_state, layer)),
                recurrent_states=_Indexed(partial(self.get_recurrent_state, layer)),
            )
        )

    def stepped(
        self,
        module: nn.Module,
        last: nn.Linear | None,
        whole: bool,
        forward: Forward,
        /,
        *args: Any,
        **keywords: Any,
    ) -> Any:
        """Runs the `forward` of a module with a recurrent state over all tokens of the call.

        Those up to the first state to keep run in one piece, the rest one by one, so that the state
        after each can be kept. Linear layers run once for all pieces: else a verification would
        read their weights once per token. `whole`: whether a piece can start from a state; else all
        tokens run one by one. `last`: the linear layer of the output.
        """
        hidden: Tensor = args[0] if args else keywords["hidden_states"]
        self._states.clear()
        first = 0
        if whole or not self._has_past:
            first = self.writer.first_kept
        bounds = list(pairwise((0, *range(first + 1, hidden.shape[1] + 1))))
        linears = _LinearsOnce(hidden, last)
        changes: list[tuple[nn.Module, Forward]] = []
        if len(bounds) > 1:
            changes = linears.changes(module)
        outputs = []
        with replaced(changes):
            for start, end in bounds:
                self._column = end - 1
                of_piece, named = with_hidden(linears.piece_at(start, end), args, keywords)
                outputs.append(forward(*of_piece, **named))
                if self._column >= self.writer.first_kept:
                    for state, new in self._states.items():
                        assert new is not None
                        self.writer.keep(state, self._column, new)
                self._has_past = True
        self._column = None
        self._has_past = not self.writer.begins
        if len(bounds) == 1:
            return outputs[0]
        output = linears.output(outputs)
        if isinstance(outputs[0], Tensor):
            return output
        return output, *outputs[-1][1:]

    def _state(self, state: State) -> Tensor | None:
        if state not in self._states:
            self._states[state] = self.writer.before(state)
        return self._states[state]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.writer.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self.writer.end, 0

    def _put(self, entry: Entry, new: Tensor) -> Tensor:
        written = self.writer.put(entry, new)
        if entry in self._ends:
            raise Written
        return written


class _LinearsOnce:
    """Runs the linear layers of a recurrent module once, though its tokens run in pieces."""

    def __init__(self, hidden: Tensor, last: nn.Linear | None) -> None:
        """`hidden` (B, T, D): the module's input. `last`: the linear layer of its output."""
        self._hidden = hidden
        self._last = last
        self._inputs_of_last: list[Tensor] = []
        self._outputs: dict[Forward, Tensor] = {}  # of layers that read the module's input
        self.piece_at(0, hidden.shape[1])

    def piece_at(self, start: int, end: int) -> Tensor:
        """The module's input for the tokens that run next."""
        self._bounds = slice(start, end)
        self._piece = self._hidden[:, self._bounds]
        return self._piece

    def changes(self, module: nn.Module) -> list[tuple[nn.Module, Forward]]:
        changes: list[tuple[nn.Module, Forward]] = []
        for part in module.modules():
            if part is self._last:
                changes.append((part, self._postpone))
            elif isinstance(part, nn.Linear):
                changes.append((part, partial(self._project, part.forward)))
        return changes

    def _project(self, linear: Forward, given: Tensor) -> Tensor:
        if given is not self._piece:  # a layer in the middle of the module
            output: Tensor = linear(given)
            return output
        if linear not in self._outputs:
            self._outputs[linear] = linear(self._hidden)
        return self._outputs[linear][:, self._bounds].contiguous()

    def _postpone(self, given: Tensor) -> Tensor:
        self._inputs_of_last.append(given)
        return given.new_empty(*given.shape[:-1], 0)

    def output(self, outputs: list[Any]) -> Tensor:
        """The module's output for all tokens, from the pieces'."""
        if self._last is None:
            return torch.cat([hidden_of(output) for output in outputs], dim=1)
        output: Tensor = self._last(torch.cat(self._inputs_of_last, dim=1))
        return output


class _Indexed(dict[int, Any]):
    def __init__(self, get: Callable[[int], Any]) -> None:
        self._get = get

    def __missing__(self, index: int) -> Any:
        return self._get(index)


def with_hidden(
    hidden: Tensor, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with `hidden` in place of their hidden states."""
    if args:
        return (hidden, *args[1:]), keywords
    return (), keywords | {"hidden_states": hidden}


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@contextmanager
def replaced(changes: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Replaces forwards of modules inside the context."""
    before = [(module.__dict__, module.__dict__.get("forward")) for module, _ in changes]
    try:
        for module, forward in changes:
            module.__dict__["forward"] = forward
        yield
    finally:
        for attributes, own in before:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own
