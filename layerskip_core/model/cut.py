"""Runs any span of layers of a transformers decoder by the model's own forward.

A call for a span is a forward of the whole model in which earlier layers return their input, the
first layer of the span reads the states of the call, and the last one ends the forward by an
exception. So transformers computes masks, rotary embeddings and everything else around the layers.
`probe` finds the layers, their outputs and their cache entries.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from threading import RLock
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .cache import Places
from .position_cache import (
    Forward,
    PositionCache,
    Writer,
    Written,
    hidden_of,
    replaced,
    with_hidden,
)
from .row_cache import Entry, EntryWriter, MixedCache

# Names of the cache among a forward's arguments
_CACHES = ("cache", "past_key_values", "cache_params")
_BASE = 256  # states carry token ids as digits of this base, exact in every precision
# The argument that hands keys and values to later layers (Gemma 3n and 4)
SHARED = "shared_kv_states"

# (B, T), if they differ between rows
_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)


class _Reached(Exception):
    """Ends a forward with a result."""

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted


@dataclass(frozen=True)
class Form:
    """The structure of a model, as its forwards show it."""

    layers: nn.ModuleList  # the chain of layers, in the module `owner`
    owner: Any
    # The module between the last layer and the owner's output; None if it is not one module
    norm: Any
    output: Any  # type of the owner's output
    container: tuple[Any, int] | None  # type and length of a layer's output; None if it is a tensor
    leading: bool  # whether hidden states have a dimension before rows and tokens
    shape: tuple[int, ...]  # of hidden states, without rows and tokens
    # By layer, the key under which it hands its keys and values to later layers
    shares: Mapping[int, Any]
    # Number and width of each cache entry's heads
    shapes: Mapping[Entry, tuple[int, int]] = field(default_factory=dict)
    # The entries that each layer writes, in order
    written: Mapping[int, Sequence[Entry]] = field(default_factory=dict)
    reads_ids: bool = False  # whether later layers read token ids; states then carry them
    by_position: bool = True  # whether rows at different positions can share a call
    # By recurrent layer: its recurrent modules, each with the linear layer of its output. Other
    # states are convolution inputs.
    recurrent: Mapping[int, Mapping[nn.Module, nn.Linear | None]] = field(default_factory=dict)
    continues: bool = True  # whether these modules can run several tokens from a state

    @property
    def width(self) -> int:
        """Width of a state without its token id."""
        return torch.Size(self.shape).numel()

    @property
    def attending(self) -> int | None:
        """The last layer with keys and values of its own, which exit blocks copy."""
        return max((index for index, entries in self.written.items() if entries), default=None)

    def state(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The state (B, T, D) from a layer's hidden states, for token ids (B, T)."""
        if self.leading:
            hidden = hidden.movedim(0, 2)
        state = hidden
        if hidden.dim() > 3:
            state = hidden.flatten(2)
        if self.reads_ids:
            digits = [ids % _BASE, ids // _BASE % _BASE, ids // _BASE**2]
            state = torch.cat([state, torch.stack(digits, dim=-1).to(state.dtype)], dim=-1)
        return state

    def hidden(self, state: Tensor) -> Tensor:
        """The reverse of `state`."""
        hidden = state
        if self.reads_ids or len(self.shape) > 1:
            hidden = state[..., : self.width].view(*state.shape[:2], *self.shape)
        if self.leading:
            return hidden.movedim(2, 0)
        return hidden

    def ids(self, state: Tensor) -> Tensor:
        """The token ids (B, T) of states; zeros if states carry none."""
        if not self.reads_ids:
            return torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        low, middle, high = state[..., self.width :].long().unbind(-1)
        return low + _BASE * (middle + _BASE * high)

    def returned(self, hidden: Tensor) -> Any:
        """Hidden states as a layer returns them."""
        if self.container is None:
            return hidden
        kind, length = self.container
        return kind((hidden, *[None] * (length - 1)))


class Copy(NamedTuple):
    """An exit block: a layer like the last attending one, in whose place it runs."""

    layer: nn.Module
    shift: int  # of its cache indices from those of its original, see `CutModel.shift_of_block`


class CutModel:
    """A causal language model of transformers whose layers 0..L-1 run in spans.
    `probe.cut_at_layers` makes it.
    """

    form: Form

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lock = RLock()  # for threads that share the model
        parameters = inspect.signature(type(model).forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._cache_class = _cache_class(model)
        # transformers 5.24 renamed past_key_values; models swallow a wrong keyword in **kwargs
        # without an error.
        self.cache_keyword = next((name for name in _CACHES if name in parameters), None)

    def embed(self, ids: Tensor) -> Tensor:
        """The states (B, T, D) of tokens before layer 0; the ids themselves, (B, T, 1), if later
        layers read them.
        """
        if self.form.reads_ids:
            return ids[..., None]
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def run(
        self,
        state: Tensor,
        start: int,
        end: int,
        places: Places,
        *,
        only_writes: bool = False,
        block: Copy | None = None,
    ) -> Tensor:
        """Runs layers start..end-1 over states (..., D) of the tokens at `places`; see `embed` for
        states before layer 0.

        `only_writes`: each layer gets `state` and only writes its entries. `block`: an exit block,
        which runs in place of its original instead of the span.
        """
        shift = 0
        cache = places.cache
        assert isinstance(cache, MixedCache)
        if block is not None:
            assert self.form.attending is not None
            start = self.form.attending
            end = self.form.attending + 1
            shift = block.shift

        def run(state: Tensor, positions: Tensor, row: int | None) -> Tensor:
            writer = EntryWriter(cache, positions, row, shift, places.no_rollback)
            return self.run_span(state, start, end, positions, writer, only_writes, block)

        is_ragged = len(set(places.counts)) > 1
        differ = is_ragged or len(set(places.starts)) > 1
        together = self.form.by_position or not differ
        if is_ragged and not cache.rolls_back:
            together = False  # padding would change recurrent states
        return places.in_grids(state, run, together)

    def normed(self, state: Tensor) -> Tensor:
        """The head's input (the output of `Form.owner`), from states (..., D) after any layer."""
        form = self.form
        if form.norm is not None:
            normed: Tensor = form.norm(state[..., : form.width])
            return normed
        with self._lock:
            forward = form.owner.forward
            found: Tensor = self._tail(
                state, (form.owner, lambda *args, **keywords: _reach(forward(*args, **keywords)[0]))
            )
        return found

    def unembed(self, state: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """States (..., D) after any layer to logits (..., V). `norm`: replaces the model's."""
        form = self.form
        norm = norm or form.norm
        if norm is None:
            return self._tail(state)
        flat = state[..., : form.width].reshape(1, -1, form.width)
        output = form.output(last_hidden_state=norm(flat))
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=state.device)
        logits: Tensor = self.forward(
            {"input_ids": ids}, None, [(form.owner, lambda *_, **__: output)]
        ).logits
        return logits.view(*state.shape[:-1], logits.shape[-1])

    def new_cache(
        self,
        batch_size: int,
        max_positions: int,
        blocks: int = 0,
        others: Mapping[Entry, tuple[int, int]] | None = None,
    ) -> MixedCache:
        """An empty cache, also for exit blocks, `blocks` of them. `others`: number and width of
        heads of further entries.
        """
        shapes = dict(self.form.shapes)
        if others is not None:
            shapes.update(others)
        for block in range(blocks):
            shift = self.shift_of_block(block)
            for index, kind in self._of_original:
                shapes[index + shift, kind] = self.form.shapes[index, kind]
        return MixedCache(shapes, batch_size, max_positions, rolls_back=not self.form.recurrent)

    def place_of_block(self, block: int) -> int:
        """The first cache index of an exit block, after those of layers and earlier blocks."""
        last = max([len(self.form.layers) - 1, *(index for index, _ in self.form.shapes)])
        return 1 + last + block * len({index for index, _ in self._of_original})

    def shift_of_block(self, block: int) -> int:
        """The offset of an exit block's cache indices from those of its original."""
        return self.place_of_block(block) - self._of_original[0][0]

    @property
    def _of_original(self) -> Sequence[Entry]:
        """The entries of the layer that exit blocks copy (at two indices in LongCat-Flash)."""
        if self.form.attending is None:
            return ()
        return self.form.written[self.form.attending]

    def run_span(
        self,
        state: Tensor,
        start: int,
        end: int,
        positions: Tensor,
        writer: Writer | None = None,
        only_writes: bool = False,
        block: Copy | None = None,
    ) -> Tensor:
        """`run` for states (B, T, D) at `positions` (B, T), in one forward of the whole model.

        `writer`: of the cache; None: the tokens are whole texts.
        """
        form = self.form
        reads_embedding = start == 0 and block is None
        given = None  # hidden states before the span
        if reads_embedding and form.reads_ids:
            ids = state[..., 0]
            inputs = {"input_ids": ids}
        elif reads_embedding:
            ids = form.ids(state)
            inputs = {"inputs_embeds": state}
        else:
            ids = form.ids(state)
            inputs = {"input_ids": ids}
            given = form.hidden(state)
        span = range(start, end)
        cache = None
        if writer is not None:
            cache = self._cache_class(writer, self._last_entries(span) if only_writes else ())
        with self._lock:
            changes: list[tuple[nn.Module, Forward]] = []
            for index in range(start):
                # Layers before an exit block did not run in its call: they have no entries to share
                skip = partial(self._pass, index, None if block else cache)
                changes.append((form.layers[index], skip))
            changes += self._running(span, given, cache, only_writes, block)
            if cache is not None:
                changes += self._stepping(span, cache, block)
            hidden = self.forward(inputs, positions, changes, cache)
        return form.state(hidden, ids)

    def _last_entries(self, span: range) -> set[Entry]:
        """The entries after which layers have written all; a recurrent layer has to run to its
        end.
        """
        form = self.form
        entries = set[Entry]()
        for index in span:
            if form.written[index] and index not in form.recurrent:
                entries.add(form.written[index][-1])
        return entries

    def _running(
        self,
        span: range,
        given: Tensor | None,
        cache: PositionCache | None,
        only_writes: bool,
        block: Copy | None,
    ) -> list[tuple[nn.Module, Forward]]:
        """Replaces the first layer of a span, which reads `given`, and the last, which ends the
        forward; with `only_writes` all, which pass on their input.
        """
        first = span[0]
        last = span[-1]

        def run_layer(index: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
            if given is not None and index == first:
                args, keywords = with_hidden(given, args, keywords)
            if only_writes:
                with suppress(Written):
                    forward(*args, **keywords)
                output = self._pass(index, cache, *args, **keywords)
            else:
                output = forward(*args, **keywords)
            if index == last:
                raise _Reached(hidden_of(output))
            return output

        changes: list[tuple[nn.Module, Forward]] = []
        for index in span if only_writes else {first, last}:
            layer = self.form.layers[index]
            forward = layer.forward if block is None else block.layer
            changes.append((layer, partial(run_layer, index, forward)))
        return changes

    def _stepping(
        self, span: range, cache: PositionCache, block: Copy | None
    ) -> list[tuple[nn.Module, Forward]]:
        """Runs the recurrent modules of a span step by step, see `PositionCache.stepped`."""
        modules: dict[nn.Module, nn.Linear | None] = {}
        for index in span:
            modules.update(self.form.recurrent.get(index, {}))
        if block is not None:  # its own modules, by the names of its original's
            own: Any = dict(block.layer.named_modules())
            original = self.form.layers[span[0]]
            copies = {part: own.get(name) for name, part in original.named_modules()}
            modules = {copies[part]: copies.get(last) for part, last in modules.items()}
        continues = self.form.continues
        return [
            (part, partial(cache.stepped, part, last, continues, part.forward))
            for part, last in modules.items()
        ]

    def _pass(self, index: int, cache: PositionCache | None, /, *args: Any, **keywords: Any) -> Any:
        """Returns a layer's input in place of its output, and hands on cached keys and values that
        later layers share.
        """
        hidden = args[0] if args else keywords["hidden_states"]
        if cache is not None and index in self.form.shares:
            keys, values = self.form.written[index][:2]
            shared = cache.writer.get(keys, hidden), cache.writer.get(values, hidden)
            keywords[SHARED][self.form.shares[index]] = shared
        return self.form.returned(hidden)

    def _tail(self, state: Tensor, *changes: tuple[nn.Module, Forward]) -> Tensor:
        """Runs what follows the last layer, from states (..., D); returns logits, or the result
        with which `changes` end it.
        """
        form = self.form
        flat = state.reshape(-1, 1, state.shape[-1])  # rows of one token, at any position
        last = form.returned(form.hidden(flat))
        replacements: list[tuple[Any, Forward]] = []
        for index, layer in enumerate(form.layers[:-1]):
            replacements.append((layer, partial(self._pass, index, None)))
        replacements.append((form.layers[-1], lambda *_, **__: last))
        replacements += changes
        positions = torch.zeros(len(flat), 1, dtype=torch.long)
        found = self.forward({"input_ids": form.ids(flat)}, positions, replacements)
        output: Tensor = found if isinstance(found, Tensor) else found.logits
        return output.view(*state.shape[:-1], output.shape[-1])

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        positions: Tensor | None,
        changes: Sequence[tuple[Any, Forward]],
        cache: PositionCache | None = None,
    ) -> Any:
        """Runs the model with replaced forwards of modules; returns its output, or the result with
        which one ends it.
        """
        keywords: dict[str, Any] = {"use_cache": cache is not None}
        if positions is not None and self.takes_positions:
            positions = positions.to(next(iter(inputs.values())).device, non_blocking=True)
            keywords["position_ids"] = positions
        if cache is not None and self.cache_keyword is not None:
            keywords[self.cache_keyword] = cache
        differ = cache is not None and not cache.writer.contiguous
        if differ:
            _know_positions(self.model.config.get_text_config(decoder=True)._attn_implementation)
        token = _POSITIONS.set(positions if differ else None)  # of this thread
        try:
            with self._lock, replaced(changes):
                return self.model(**inputs, **keywords)
        except _Reached as reached:
            return reached.wanted
        finally:
            _POSITIONS.reset(token)


def _cache_class(model: Any) -> type[PositionCache]:
    """PositionCache, also a subclass of the model's own cache class if the model requires that
    (MiniMax).
    """
    parameters = inspect.signature(type(model.base_model).forward).parameters
    kinds = []
    for name in _CACHES:
        if name not in parameters:
            continue
        for kind in getattr(parameters[name].annotation, "__args__", ()):
            if getattr(kind, "__module__", None) == type(model).__module__:
                kinds.append(kind)
    return type("PositionCache", (PositionCache, *kinds), {})


def _reach(wanted: Any) -> NoReturn:
    raise _Reached(wanted)


def _know_positions(attention: str) -> None:
    """Makes transformers' masks for this attention read `_POSITIONS`, for calls with rows at
    different positions.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    stock = ALL_MASK_ATTENTION_FUNCTIONS[attention]
    if hasattr(stock, "knows_positions"):
        return

    @wraps(stock)
    def mask(*, mask_function: Callable[..., Tensor], **options: Any) -> Tensor | None:
        positions = _POSITIONS.get()
        if positions is None:
            made: Tensor | None = stock(mask_function=mask_function, **options)
            return made
        queries = positions[:, None, :, None]
        options |= {"allow_is_causal_skip": False, "use_vmap": False}
        made = stock(
            mask_function=lambda row, head, _, key: mask_function(row, head, queries, key),
            **options,
        )
        return made

    mask.knows_positions = True  # type: ignore[attr-defined]
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = mask
