"""Any decoder of transformers, cut at its layers by its own forward.

In a call that runs some of the layers, those before them get a `forward` of ours, which passes on what it is given; the first
layer that runs takes the states of the call, and the last one ends the forward with an exception. So masks, rotary embeddings
and everything else that a model computes around its layers stay transformers' own. Which modules are the layers, and what they
return and write to the cache, is seen in forwards of a few tokens: the cut model must reproduce the logits of the whole one.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from threading import RLock
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from .cache import Entry, EntryWriter, MixedCache

_TOKENS, _KNOWN, _STARTS = 7, 4, (2, 4)  # of the probe's two rows: tokens, how many are prefilled, and where each goes on
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a token's logits, relative to their spread
_LOW_TOLERANCE = 0.1  # in bf16 and fp16, where two experts may be almost equally likely
_BASE = 256  # of the digits of token ids, which every precision holds exactly
_SHARED = "shared_kv_states"  # through which a layer gives its keys and values to later layers (Gemma 3n and 4)
_RECURRENT = "it keeps a state beside its keys and values, which no length rolls back"

_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)  # (B, T) in calls of rows at different ones

Forward = Callable[..., Any]


class _Reached(Exception):
    """Ends a forward with what was wanted of it."""

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted


class _Written(Exception):
    """Ends a layer that had to write its entries only."""


@dataclass(frozen=True)
class Form:
    """What the forwards of a model show.

    Attributes:
        layers: the chain of layers, in the module `owner`.
        norm: the module between the last layer and the owner's output; None if something else is there.
        output: type of the owner's output.
        container: type and length of what a layer returns, if that is no tensor but begins with one.
        leading: whether hidden states have a dimension before those of rows and tokens.
        shape: their other dimensions.
        shares: by layer, the key under which it gives its keys and values to later ones.
        shapes: number and width of the heads of each cache entry.
        written: the entries that each layer writes, in order.
        reads_ids: whether later layers read the tokens too, so that states carry them.
        by_position: whether rows at different positions can be in one call.
    """

    layers: nn.ModuleList
    owner: Any
    norm: Any
    output: Any
    container: tuple[Any, int] | None
    leading: bool
    shape: tuple[int, ...]
    shares: Mapping[int, Any]
    shapes: Mapping[Entry, tuple[int, int]] = field(default_factory=dict)
    written: Mapping[int, Sequence[Entry]] = field(default_factory=dict)
    reads_ids: bool = False
    by_position: bool = True

    @property
    def width(self) -> int:
        """Of a state without its token."""
        return torch.Size(self.shape).numel()

    def state(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """(B, T, D), from the hidden states of a layer, of tokens (B, T)."""
        hidden = hidden.movedim(0, 2) if self.leading else hidden
        state = hidden.flatten(2) if hidden.dim() > 3 else hidden
        if self.reads_ids:
            digits = [ids % _BASE, ids // _BASE % _BASE, ids // _BASE**2]
            state = torch.cat([state, torch.stack(digits, dim=-1).to(state.dtype)], dim=-1)
        return state

    def hidden(self, state: Tensor) -> Tensor:
        """The reverse of `state`."""
        hidden = (
            state[..., : self.width].view(*state.shape[:2], *self.shape) if self.reads_ids or len(self.shape) > 1 else state
        )
        return hidden.movedim(2, 0) if self.leading else hidden

    def ids(self, state: Tensor) -> Tensor:
        """The tokens (B, T) of states. Where these carry none, any will do."""
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


class Writer(Protocol):
    """What a PositionCache needs of an EntryWriter."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...

    def put(self, entry: Entry, new: Tensor) -> Tensor: ...
    def get(self, entry: Entry, like: Tensor) -> Tensor: ...


class _Recorder:
    """An EntryWriter of a prefill, for a model whose entries are not known yet: keeps them all."""

    def __init__(self, count: int) -> None:
        self.start, self.stop = 0, count
        self.kept: dict[Entry, Tensor] = {}

    def put(self, entry: Entry, new: Tensor) -> Tensor:
        self.kept[entry] = new
        return new

    def get(self, entry: Entry, like: Tensor) -> Tensor:
        return self.kept[entry]


class PositionCache:
    """The KV cache as transformers' layers address it, for one call. It has no state that a length could not roll back."""

    is_compileable = False

    def __init__(self, writer: Writer, ends: Collection[Entry] = ()) -> None:
        """`ends`: entries after which a layer has written all, and ends."""
        self.writer, self._ends = writer, ends

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Takes keys and values (B, heads, T, width), and returns those of all positions."""
        return self._put((layer_idx, "keys"), keys), self._put((layer_idx, "values"), values)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """The same for the keys (B, T, width) of an indexer, which chooses what sparse attention reads."""
        return self._put((layer_idx, "indexer"), keys[:, None])[:, 0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.writer.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.writer.start

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self.writer.stop, 0

    def _put(self, entry: Entry, new: Tensor) -> Tensor:
        written = self.writer.put(entry, new)
        if entry in self._ends:
            raise _Written
        return written


class CutModel:
    """A causal language model of transformers whose layers 0..L-1 run in spans."""

    form: Form

    def __init__(self, model: Any) -> None:
        """Raises CheckpointError, which says why, for a model that cannot be cut."""
        self._model, self._lock = model, RLock()  # for threads that share the model
        parameters = inspect.signature(type(model).forward).parameters
        self._takes_positions = "position_ids" in parameters
        # transformers 5.24 renamed past_key_values; models swallow a wrong keyword in **kwargs without an error.
        self._cache_keyword = next((name for name in ("cache", "past_key_values") if name in parameters), None)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                self._check()
        except _Different as error:
            raise CheckpointError(f"model_type {model.config.model_type} cannot be cut at its layers: {error}") from error
        finally:
            model.train(was_training)

    def embed(self, ids: Tensor) -> Tensor:
        """The states (B, T, D) of tokens before layer 0; the tokens themselves, (B, T, 1), where later layers read them too."""
        embedded: Tensor = ids[..., None] if self.form.reads_ids else self._model.get_input_embeddings()(ids)
        return embedded

    def run(
        self,
        state: Tensor,
        start: int,
        stop: int,
        positions: Tensor,
        cache: MixedCache | None = None,
        *,
        key_mask: Tensor | None = None,
        only_writes: bool = False,
        block: tuple[nn.Module, int] | None = None,
    ) -> Tensor:
        """Layers start..stop-1 over states (B, T, D) of the tokens at `positions`; see `embed` for those before layer 0.

        `key_mask` (B, T), True where a key may be seen, is for calls without a cache. `only_writes`: each layer gets `state`
        and writes its entries. `block`: a layer that runs instead of the last one, and its `place_of_block`.
        """
        writer = None if cache is None else EntryWriter(cache, positions)
        if cache is not None and writer is not None and not writer.contiguous and not self.form.by_position:
            rows = []
            for row, places in enumerate(positions):
                count = len(places.unique_consecutive())  # what follows is padding, at the end of the context
                own = EntryWriter(cache, places[None, :count], row)
                part = state[row : row + 1, :count]
                done = self._run(part, start, stop, places[None, :count], own, None, only_writes, block)
                rows.append(torch.cat([done, done[:, -1:].expand(-1, len(places) - count, -1)], dim=1))
            return torch.cat(rows)
        return self._run(state, start, stop, positions, writer, key_mask, only_writes, block)

    def normed(self, state: Tensor) -> Tensor:
        """The owner's output, which the head reads, for the states (..., D) after any layer."""
        form = self.form
        if form.norm is not None:
            normed: Tensor = form.norm(state[..., : form.width])
            return normed
        with self._lock:
            forward = form.owner.forward
            found: Tensor = self._tail(state, (form.owner, lambda *args, **keywords: _reach(forward(*args, **keywords)[0])))
        return found

    def unembed(self, state: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """States (..., D) after any layer to logits (..., V). `norm`: another than the model's."""
        form = self.form
        norm = norm or form.norm
        if norm is None:
            return self._tail(state)
        flat = state[..., : form.width].reshape(1, -1, form.width)
        output = form.output(last_hidden_state=norm(flat))
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=state.device)
        logits: Tensor = self._forward({"input_ids": ids}, None, [(form.owner, lambda *_, **__: output)]).logits
        return logits.view(*state.shape[:-1], logits.shape[-1])

    def new_cache(self, batch_size: int, max_positions: int, blocks: int = 0) -> MixedCache:
        """An empty cache. `blocks`: how many further layers write what the last one writes, see `place_of_block`."""
        shapes = dict(self.form.shapes)
        for block in range(blocks):
            for index, kind in self.form.written[len(self.form.layers) - 1]:
                shapes[self.place_of_block(block), kind] = self.form.shapes[index, kind]
        return MixedCache(shapes, batch_size, max_positions)

    def place_of_block(self, block: int) -> int:
        """The `layer_idx` by which the attention of an exit block addresses the cache."""
        last: int = max(index for index, _ in self.form.shapes)
        return 1 + last + block

    def _run(
        self,
        state: Tensor,
        start: int,
        stop: int,
        positions: Tensor,
        writer: Writer | None,
        key_mask: Tensor | None = None,
        only_writes: bool = False,
        block: tuple[nn.Module, int] | None = None,
    ) -> Tensor:
        form, layers = self.form, self.form.layers
        first = start == 0 and block is None
        ids = state[..., 0] if first and form.reads_ids else form.ids(state)
        inputs = {"inputs_embeds": state} if first and not form.reads_ids else {"input_ids": ids}
        ends = {form.written[index][-1] for index in range(start, stop) if form.written[index]} if only_writes else set()
        if block is not None:
            ends = {(block[1], kind) for _, kind in ends}
        cache = None if writer is None else PositionCache(writer, ends)
        given = None if first else form.hidden(state)
        running = range(start, stop) if only_writes else {start, stop - 1} if start else {stop - 1}
        with self._lock:
            changes = [(layers[index], partial(self._pass, index, cache)) for index in range(start)]
            for index in running:
                forward = layers[index].forward if block is None else block[0]
                entering, ending = given if index == start else None, index == stop - 1
                changes.append((layers[index], partial(self._run_layer, index, cache, forward, entering, ending)))
            hidden = self._forward(inputs, positions, changes, cache, key_mask)
        return form.state(hidden, ids)

    def _pass(self, index: int, cache: PositionCache | None, /, *args: Any, **keywords: Any) -> Any:
        """The forward of a layer that does not run."""
        hidden = args[0] if args else keywords["hidden_states"]
        if cache is not None and index in self.form.shares:
            keys, values = self.form.written[index][:2]
            shared = cache.writer.get(keys, hidden), cache.writer.get(values, hidden)
            keywords[_SHARED][self.form.shares[index]] = shared
        return self.form.returned(hidden)

    def _run_layer(
        self,
        index: int,
        cache: PositionCache | None,
        forward: Forward,
        given: Tensor | None,
        ending: bool,
        /,
        *args: Any,
        **keywords: Any,
    ) -> Any:
        """The forward of the first and the last layer that run, and of all that only write."""
        if given is not None and args:
            args = (given, *args[1:])
        elif given is not None:
            keywords["hidden_states"] = given
        try:
            output = forward(*args, **keywords)
        except _Written:
            output = self._pass(index, cache, *args, **keywords)
        return _reach(_hidden(output)) if ending else output

    def _tail(self, state: Tensor, *changes: tuple[nn.Module, Forward]) -> Tensor:
        """What the forward makes of states (..., D) after the last layer: its logits, or what `changes` end it with."""
        form, flat = self.form, state.reshape(-1, 1, state.shape[-1])  # rows of one token, for which any position is one
        last = form.returned(form.hidden(flat))
        skipped = [(layer, partial(self._pass, index, None)) for index, layer in enumerate(form.layers[:-1])]
        positions = torch.zeros(len(flat), 1, dtype=torch.long)
        found = self._forward(
            {"input_ids": form.ids(flat)}, positions, [*skipped, (form.layers[-1], lambda *_, **__: last), *changes]
        )
        found = found if isinstance(found, Tensor) else found.logits
        return found.view(*state.shape[:-1], found.shape[-1])

    def _forward(
        self,
        inputs: Mapping[str, Tensor],
        positions: Tensor | None,
        changes: Sequence[tuple[Any, Forward]],
        cache: PositionCache | None = None,
        key_mask: Tensor | None = None,
    ) -> Any:
        """The model's forward while modules have other forwards: its output, or what one of them ended it with."""
        keywords: dict[str, Any] = {"use_cache": cache is not None}
        if positions is not None and self._takes_positions:
            positions = positions.to(next(iter(inputs.values())).device, non_blocking=True)
            keywords["position_ids"] = positions
        if cache is not None and self._cache_keyword is not None:
            keywords[self._cache_keyword] = cache
        if key_mask is not None:
            keywords["attention_mask"] = key_mask
        differ = isinstance(cache, PositionCache) and not getattr(cache.writer, "contiguous", True)
        if differ:
            _know_positions(self._model.config.get_text_config(decoder=True)._attn_implementation)
        token = _POSITIONS.set(positions if differ else None)
        try:
            with self._lock, _replaced(changes):
                return self._model(**inputs, **keywords)
        except _Reached as reached:
            return reached.wanted
        finally:
            _POSITIONS.reset(token)

    def _check(self) -> None:
        """Learns the form in three passes: the whole model, layer by layer, and rows that go on at different positions."""
        model = self._model
        if getattr(model, "_is_stateful", False):
            raise _Different(_RECURRENT)
        if self._cache_keyword is None:
            raise _Different("it has no KV cache")
        vocab = model.config.get_text_config(decoder=True).vocab_size
        ids = (7 + 5 * torch.arange(2 * _TOKENS, device=model.device).view(2, _TOKENS)) % vocab
        expected = self._see(ids)
        try:
            kept = self._layer_by_layer(ids[:, :_KNOWN], expected[:, :_KNOWN], reads_ids=False)
        except _Different as different:
            try:
                kept = self._layer_by_layer(ids[:, :_KNOWN], expected[:, :_KNOWN], reads_ids=True)
            except _Different:
                raise different from None
        self.form = replace(self.form, shapes={entry: (new.shape[1], new.shape[3]) for entry, new in kept.items()})
        cache, prefix = self.new_cache(2, _TOKENS), torch.arange(_KNOWN).expand(2, -1)
        for entry, new in kept.items():
            EntryWriter(cache, prefix).put(entry, new)
        try:
            self._go_on(ids, expected, cache)
        except _Different:
            self.form = replace(self.form, by_position=False)
            self._go_on(ids, expected, cache)

    def _layer_by_layer(self, ids: Tensor, expected: Tensor, reads_ids: bool) -> dict[Entry, Tensor]:
        """The first layer, then the others, which hand on hidden states and nothing else. Returns what they write."""
        positions, recorder, written = (
            torch.arange(ids.shape[1]).expand(2, -1),
            _Recorder(ids.shape[1]),
            dict[int, list[Entry]](),
        )
        self.form = form = replace(self.form, reads_ids=reads_ids, written=written)

        def alone(index: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
            before = len(recorder.kept)
            hidden = _hidden(forward(*args, **keywords))
            written[index] = list(recorder.kept)[before:]
            return form.returned(hidden)

        changes = [(layer, partial(alone, index, layer.forward)) for index, layer in enumerate(form.layers)]
        with _reasons(), _replaced(changes):
            state = self._run(self.embed(ids), 0, 1, positions, recorder)
            if len(changes) > 1:
                state = self._run(state, 1, len(changes), positions, recorder)
            _compare(self.unembed(state), expected, "when each layer runs alone")
        return recorder.kept

    def _go_on(self, ids: Tensor, expected: Tensor, cache: MixedCache) -> None:
        """Drafts of the first layers and their verification, after a prefix of which one row has more than the other."""
        rows, count = torch.arange(2)[:, None], len(self.form.layers)
        places = torch.tensor(_STARTS)[:, None] + torch.arange(_TOKENS - max(_STARTS))
        exit_layer = max(self.form.shares, default=(count - 1) // 2) + 1
        with _reasons():
            state = self.embed(ids[rows, places.to(ids.device)])
            state = self.run(state, 0, exit_layer, places, cache)
            if exit_layer < count:
                state = self.run(state, exit_layer, count, places, cache)
            _compare(self.unembed(state), expected[rows, places], "when it goes on from a cache")

    def _see(self, ids: Tensor) -> Tensor:
        """The logits (2, T, V) of the whole model, and the form as far as its forward shows it."""
        model, lists = self._model, _outermost_lists(self._model)
        seen: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
        shares: dict[str, dict[int, Any]] = defaultdict(dict)

        def watch(name: str, index: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
            hidden, before = args[0] if args else keywords.get("hidden_states"), set(keywords.get(_SHARED) or ())
            output = forward(*args, **keywords)
            seen[name].append((index, hidden, output))
            for key in set(keywords.get(_SHARED) or ()) - before:
                shares[name][index] = key
            return output

        changes = [
            (part, partial(watch, name, index, part.forward))
            for name, parts in lists.items()
            for index, part in enumerate(parts)
        ]
        calls: list[tuple[nn.Module, Any, Any]] = []
        handles = [
            part.register_forward_hook(lambda *call: calls.append(call))
            for owner in {name.rpartition(".")[0] for name in lists}
            for part in (model.get_submodule(owner), *model.get_submodule(owner).children())
        ]
        try:
            with _reasons():
                logits: Tensor = self._forward({"input_ids": ids}, None, changes).logits
        finally:
            for handle in handles:
                handle.remove()
        chains = [name for name, found in seen.items() if [index for index, *_ in found] == list(range(len(lists[name])))]
        if not chains:
            raise _Different("its forward is no chain of layers")
        name = max(chains, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
        owner = model.get_submodule(name.rpartition(".")[0])
        *_, (_, _, output) = seen[name]
        last = _hidden(output)
        if any(hidden is None or hidden.shape != last.shape for _, hidden, _ in seen[name]):
            raise _Different("its layers have hidden states of different shapes")
        leading = int(last.shape[:2] != ids.shape)
        if last.shape[leading : leading + 2] != ids.shape:
            raise _Different(f"its layers have hidden states of the shape {list(last.shape)} for tokens {list(ids.shape)}")
        (owned,) = (output for part, _, output in calls if part is owner)
        normed = getattr(owned, "last_hidden_state", None)
        norms = [part for part, inputs, output in calls if inputs and inputs[0] is last and _equals(output, normed)]
        container = None if isinstance(output, Tensor) else (type(output), len(output))
        self.form = Form(
            lists[name],
            owner,
            norms[0] if len(norms) == 1 else None,
            type(owned),
            container,
            bool(leading),
            (last.shape[0], *last.shape[3:]) if leading else tuple(last.shape[2:]),
            shares[name],
        )
        return logits


def _hidden(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _reach(wanted: Any) -> NoReturn:
    raise _Reached(wanted)


@contextmanager
def _replaced(changes: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Modules have other forwards."""
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


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = part
    return lists


def _equals(output: Any, normed: Any) -> bool:
    return isinstance(output, Tensor) and isinstance(normed, Tensor) and torch.equal(output, normed)


def _compare(found: Tensor, expected: Tensor, when: str) -> None:
    """Raises _Different for logits (B, T, V) of which a token's differ. Those that are not finite are not compared."""
    counted, precision = expected.isfinite().all(-1), expected.dtype
    found, expected = found[counted].double(), expected[counted].double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    error = float(((found - expected).norm(dim=-1) / spread).nan_to_num(torch.inf).max()) if len(spread) else 0.0
    if error > _TOLERANCE.get(precision, _LOW_TOLERANCE):
        raise _Different(f"its logits differ by {error:.2g} of their spread {when}")


class _Different(Exception):
    """How a cut model differs from the whole one."""


@contextmanager
def _reasons() -> Iterator[None]:
    """Any error becomes the reason why a model cannot be cut."""
    try:
        yield
    except AttributeError as error:
        more = isinstance(error.obj, PositionCache)
        raise _Different(f"{_RECURRENT} ({error.name})" if more else first_line(error)) from error
    except Exception as error:
        raise _Different(first_line(error)) from error


def _know_positions(attention: str) -> None:
    """Makes transformers' masks for this attention see the positions of a call whose rows stand at different ones."""
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
        made = stock(mask_function=lambda row, head, _, key: mask_function(row, head, queries, key), **options)
        return made

    mask.knows_positions = True  # type: ignore[attr-defined]
    ALL_MASK_ATTENTION_FUNCTIONS[attention] = mask
