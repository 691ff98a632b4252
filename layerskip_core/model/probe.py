"""Finds where a model can be cut, by forwards of a few tokens, and checks the cut model's
logits.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from .cache import Places
from .cut import SHARED, CutModel, Form
from .position_cache import Forward, PositionCache, hidden_of, replaced
from .row_cache import Entry, EntryWriter, MixedCache, State

# Tokens of each of the two rows, and how many of them are prefilled
_TOKENS = 7
_KNOWN = 4
# Positions from which the rows continue; and again, if layers are recurrent
_STARTS = (2, 4)
_AGAIN = (3, 5)
# Error of a token's logits, relative to their spread
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LEAST = 1e-9  # least spread to divide by: that of padding, whose embedding is 0, may be 0
_LOW_TOLERANCE = 0.1  # in bf16 and fp16: rounding may choose another expert


def cut_at_layers(model: Any) -> CutModel:
    """Cuts a causal language model of transformers at its layers. Raises CheckpointError with the
    reason if it cannot.
    """
    cut = CutModel(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            _check(cut)
    except _Different as error:
        raise CheckpointError(
            f"model_type {model.config.model_type} cannot be cut at its layers: {error}"
        ) from error
    finally:
        model.train(was_training)
    return cut


class EntryRecorder:
    """Replaces EntryWriter in the first prefill: records all entries that layers write."""

    begins = True
    contiguous = True
    first_kept = 0

    def __init__(self, count: int) -> None:
        self.start = 0
        self.end = count
        self.kept: dict[Entry, Tensor] = {}
        self.running: list[nn.Module] = []  # modules in their forwards, the innermost last
        self.linear: tuple[nn.Linear, Tensor] | None = None  # the last linear layer, and its output
        # By module, the linear layer whose output it returns
        self.last: dict[nn.Module, nn.Linear] = {}
        # Modules that wrote a recurrent state; None for a convolution's
        self.recurrent: list[nn.Module | None] = []

    def put(self, entry: Entry, new: Tensor) -> Tensor:
        self.kept[entry] = new
        return new

    def get(self, entry: Entry, like: Tensor) -> Tensor:
        return self.kept[entry]

    def ran(self, module: nn.Module, _: Any, output: Any) -> None:
        """The forward hook of all modules."""
        self.running.pop()
        if isinstance(module, nn.Linear):
            self.linear = module, output
        elif self.linear is not None and output is not None:
            linear, its_output = self.linear
            if hidden_of(output) is its_output:
                self.last[module] = linear

    def before(self, state: State) -> None:
        return None

    def keep(self, state: State, column: int, new: Tensor) -> None:
        self.recurrent.append(None if state[1] == "conv" else self.running[-1])


def _check(cut: CutModel) -> None:
    """Finds the form in three passes: the whole model, layer by layer, and rows that continue from
    different positions.
    """
    model = cut.model
    if cut.cache_keyword is None:
        raise _Different("it has no KV cache")
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (7 + 5 * torch.arange(2 * _TOKENS, device=model.device).view(2, _TOKENS)) % vocab
    expected = _see(cut, ids)
    try:
        kept = _layer_by_layer(cut, ids[:, :_KNOWN], expected[:, :_KNOWN], reads_ids=False)
    except _Different as different:
        try:
            kept = _layer_by_layer(cut, ids[:, :_KNOWN], expected[:, :_KNOWN], reads_ids=True)
        except _Different:
            raise different from None
    cut.form = replace(
        cut.form, shapes={entry: (new.shape[1], new.shape[3]) for entry, new in kept.items()}
    )
    cache = cut.new_cache(2, _TOKENS)
    if cut.form.recurrent:
        _check_pieces(cut, ids, expected)
        with _reasons():
            cut.run(cut.embed(ids[:, :_KNOWN]), 0, len(cut.form.layers), cache.span(0, _KNOWN))
        try:
            _go_on(cut, ids, expected, cache, (_KNOWN, _KNOWN))
        except _Different:
            expected = _step_by_step(cut, ids)
    else:
        for entry, new in kept.items():
            EntryWriter(cache, torch.arange(_KNOWN).expand(2, -1)).put(entry, new)
    try:
        _go_on(cut, ids, expected, cache, _STARTS)
    except _Different:
        cut.form = replace(cut.form, by_position=False)
        _go_on(cut, ids, expected, cache, _STARTS)
    if cut.form.recurrent:
        _go_on(cut, ids, expected, cache, _AGAIN)


def _step_by_step(cut: CutModel, ids: Tensor) -> Tensor:
    """The whole model's logits (2, T, V), run token by token: some recurrent layers then use other
    kernels (Nemotron-H).
    """
    logits = []
    keywords = dict[str, Any]()
    with _reasons():
        for position, token in enumerate(torch.split(ids, 1, dim=1)):
            if cut.takes_positions:
                keywords["position_ids"] = torch.full_like(token, position)
            output = cut.model(input_ids=token, use_cache=True, **keywords)
            keywords[str(cut.cache_keyword)] = output[cut.cache_keyword]
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _check_pieces(cut: CutModel, ids: Tensor, expected: Tensor) -> None:
    """Finds whether recurrent layers can run several tokens from a state."""
    cache = cut.new_cache(2, _TOKENS)
    cache.steps_back = 0
    try:
        for start in range(0, _TOKENS, _KNOWN):
            piece = slice(start, min(start + _KNOWN, _TOKENS))
            with _reasons():
                state = cut.run(
                    cut.embed(ids[:, piece]),
                    0,
                    len(cut.form.layers),
                    cache.span(piece.start, piece.stop),
                )
                _compare(cut.unembed(state), expected[:, piece], "in pieces")
    except _Different:
        cut.form = replace(cut.form, continues=False)


def _layer_by_layer(
    cut: CutModel, ids: Tensor, expected: Tensor, reads_ids: bool
) -> dict[Entry, Tensor]:
    """Runs the first layer, then the others, with hidden states alone passed between layers.
    Returns the entries they write.
    """
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    recorder = EntryRecorder(ids.shape[1])
    written = dict[int, list[Entry]]()
    recurrent = dict[int, dict[nn.Module, nn.Linear | None]]()
    cut.form = form = replace(cut.form, reads_ids=reads_ids, written=written, recurrent=recurrent)

    def alone(index: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
        before = len(recorder.kept)
        hidden = hidden_of(forward(*args, **keywords))
        written[index] = list(recorder.kept)[before:]
        if recorder.recurrent:
            modules = [module for module in recorder.recurrent if module is not None]
            recurrent[index] = {module: recorder.last.get(module) for module in modules}
            recorder.recurrent.clear()
        return form.returned(hidden)

    changes = [
        (layer, partial(alone, index, layer.forward)) for index, layer in enumerate(form.layers)
    ]
    with ExitStack() as hooks, _reasons(), replaced(changes):
        for module in form.layers.modules():
            hooks.enter_context(
                module.register_forward_pre_hook(lambda module, _: recorder.running.append(module))
            )
            hooks.enter_context(module.register_forward_hook(recorder.ran, always_call=True))
        state = cut.run_span(cut.embed(ids), 0, 1, positions, recorder)
        if len(changes) > 1:
            state = cut.run_span(state, 1, len(changes), positions, recorder)
        _compare(cut.unembed(state), expected, "when each layer runs alone")
    return recorder.kept


def _go_on(
    cut: CutModel, ids: Tensor, expected: Tensor, cache: MixedCache, starts: Sequence[int]
) -> None:
    """Continues from cached prefixes of lengths `starts`: runs the first layers as for drafts, then
    the others.
    """
    rows = torch.arange(2)[:, None]
    count = len(cut.form.layers)
    tokens = _TOKENS - max(starts)
    columns = torch.tensor(starts)[:, None] + torch.arange(tokens)
    places = Places(cache, starts, [tokens] * 2)
    exit_layer = max(cut.form.shares, default=(count - 1) // 2) + 1
    with _reasons():
        state = cut.embed(ids[rows, columns.to(ids.device)])
        state = cut.run(state, 0, exit_layer, places)
        if exit_layer < count:
            state = cut.run(state, exit_layer, count, places)
        _compare(cut.unembed(state), expected[rows, columns], "when it goes on from a cache")


class _LayerCall(NamedTuple):
    """A call of a layer in the whole model's forward."""

    layer: int
    hidden: Any  # its input
    output: Any


class _Call(NamedTuple):
    """A call of a module around the layers."""

    module: nn.Module
    inputs: Any
    output: Any


@dataclass
class _Seen:
    """What the whole model's forward shows."""

    lists: dict[str, nn.ModuleList]  # which may be the chain of layers
    logits: Tensor
    of_list: dict[str, list[_LayerCall]]
    shares: dict[str, dict[int, Any]]  # by list, see `Form.shares`
    others: list[_Call]


def _see(cut: CutModel, ids: Tensor) -> Tensor:
    """The logits (2, T, V) of the whole model; sets those fields of `cut.form` that its forward
    shows.
    """
    seen = _watched_forward(cut, ids)
    name = _chain(seen)
    owner = cut.model.get_submodule(name.rpartition(".")[0])
    output = seen.of_list[name][-1].output
    last = hidden_of(output)
    leading = _is_leading(seen.of_list[name], last, ids)
    container = None
    if not isinstance(output, Tensor):
        container = (type(output), len(output))
    (owned,) = (call.output for call in seen.others if call.module is owner)
    cut.form = Form(
        layers=seen.lists[name],
        owner=owner,
        norm=_norm_after(seen, last, owned),
        output=type(owned),
        container=container,
        leading=leading,
        shape=(last.shape[0], *last.shape[3:]) if leading else tuple(last.shape[2:]),
        shares=seen.shares[name],
    )
    return seen.logits


def _watched_forward(cut: CutModel, ids: Tensor) -> _Seen:
    """Runs the whole model on `ids` (2, T)."""
    lists = _outermost_lists(cut.model)
    of_list: dict[str, list[_LayerCall]] = defaultdict(list)
    shares: dict[str, dict[int, Any]] = defaultdict(dict)
    others: list[_Call] = []

    def watch(name: str, index: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
        hidden = args[0] if args else keywords.get("hidden_states")
        before = set(keywords.get(SHARED) or ())
        output = forward(*args, **keywords)
        of_list[name].append(_LayerCall(index, hidden, output))
        for key in set(keywords.get(SHARED) or ()) - before:
            shares[name][index] = key
        return output

    changes = []
    for name, layers in lists.items():
        for index, layer in enumerate(layers):
            changes.append((layer, partial(watch, name, index, layer.forward)))
    with ExitStack() as hooks, _reasons():
        for owner in map(cut.model.get_submodule, {name.rpartition(".")[0] for name in lists}):
            for module in (owner, *owner.children()):
                hook = module.register_forward_hook(lambda *call: others.append(_Call(*call)))
                hooks.enter_context(hook)
        logits: Tensor = cut.forward({"input_ids": ids}, None, changes).logits
    return _Seen(lists, logits, of_list, shares, others)


def _chain(seen: _Seen) -> str:
    """The name of the list of modules that is the chain of layers: the largest whose modules ran
    one after the other.
    """
    sizes: dict[str, int] = {}
    for name, calls in seen.of_list.items():
        layers = seen.lists[name]
        if [call.layer for call in calls] == list(range(len(layers))):
            sizes[name] = sum(weight.numel() for weight in layers.parameters())
    if not sizes:
        raise _Different("its forward is no chain of layers")
    return max(sizes, key=sizes.__getitem__)


def _is_leading(calls: list[_LayerCall], last: Tensor, ids: Tensor) -> bool:
    """Whether hidden states have a dimension before rows and tokens."""
    if any(call.hidden is None or call.hidden.shape != last.shape for call in calls):
        raise _Different("its layers have hidden states of different shapes")
    if last.shape[:2] == ids.shape:
        return False
    if last.shape[1:3] == ids.shape:
        return True
    raise _Different(
        f"its layers have hidden states of the shape {list(last.shape)} for tokens {list(ids.shape)}"
    )


def _norm_after(seen: _Seen, last: Tensor, owned: Any) -> nn.Module | None:
    """The module that makes the owner's output from the `last` hidden states, if it is one."""
    normed = getattr(owned, "last_hidden_state", None)
    if not isinstance(normed, Tensor):
        return None
    norms = []
    for call in seen.others:
        reads_last = bool(call.inputs) and call.inputs[0] is last
        if reads_last and isinstance(call.output, Tensor) and call.output.equal(normed):
            norms.append(call.module)
    return norms[0] if len(norms) == 1 else None


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in lists
        ):
            lists[name] = part
    return lists


def _compare(found: Tensor, expected: Tensor, when: str) -> None:
    """Raises _Different if logits (B, T, V) of a token differ; ignores tokens whose expected logits
    are not all finite.
    """
    counted = expected.isfinite().all(-1)
    precision = expected.dtype
    # On the CPU, because Apple's GPUs have no fp64
    found = found[counted].cpu().double()
    expected = expected[counted].cpu().double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    errors = (found - expected).norm(dim=-1) / spread.clamp_min(_LEAST)
    error = float(errors.nan_to_num(torch.inf).max()) if len(spread) else 0.0
    if error > _TOLERANCE.get(precision, _LOW_TOLERANCE):
        raise _Different(f"its logits differ by {error:.2g} of their spread {when}")


class _Different(Exception):
    """How a cut model differs from the whole one."""


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns any error into the reason why a model cannot be cut."""
    try:
        yield
    except AttributeError as error:
        reason = first_line(error)
        if isinstance(error.obj, PositionCache | SimpleNamespace):
            needed = f"it needs `{error.name}` of its cache"
            reason = f"{needed}, which has keys, values and recurrent states"
        raise _Different(reason) from error
    except Exception as error:
        raise _Different(first_line(error)) from error
