"""Log-likelihoods of continuations through several exits, all from one pass of the model.

A batch's common prefix runs once, then each context once, then the continuations on the KV entries of their contexts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.checks import require_exit_layer
from ..errors import ContextError
from ..losses import CHUNK_LOGITS
from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.exit_blocks import target_block

_START = 64  # tokens: contexts that share so many probably share the examples of a few-shot prompt
_WORTHWHILE = 16  # tokens of a common start that are worth a pass of their own
_CHOICES = 8  # continuations that share the pass of a long context, however small a batch is

Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context (at least one) and of its continuation."""


class _Group(NamedTuple):
    """A context, and the indices of the pairs that have it, the longest continuation first."""

    context: tuple[int, ...]
    places: list[int]


class Likelihood(NamedTuple):
    """A continuation's log-probability in nats, and whether each of its tokens is the most probable one."""

    total: float
    greedy: bool


def likelihoods(
    model: Backend, pairs: Sequence[Pair], exits: Sequence[int], batch_size: int
) -> Iterator[tuple[int, dict[int, Likelihood]]]:
    """Yields (place in `pairs`, its likelihood by exit), in the order in which they are computed.

    `exits` count layers, up to L; one that has a block is scored through it. About `batch_size` pairs share a pass. A pair that
    is longer than the model's context loses the beginning of its context.

    Raises:
        ConfigError: an exit outside the model, or one that can only draft.
        ContextError: a continuation that is longer than the model's context.
    """
    for exit_layer in exits:
        require_exit_layer(exit_layer, model.num_layers, may_be_last=True)
        target_block(model.exit_blocks, exit_layer)
    grouped: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(pairs):
        if len(continuation):
            grouped.setdefault(_fitting(context, continuation, model.max_positions), []).append(place)
        else:
            yield place, dict.fromkeys(exits, Likelihood(0.0, True))
    for batch in _batches(_groups(grouped, pairs, batch_size), pairs, batch_size, model.max_positions):
        places = [place for group in batch for place in group.places]
        owners = [number for number, group in enumerate(batch) for _ in group.places]
        contexts = [group.context for group in batch]
        found = _scored(model, contexts, [pairs[place][1] for place in places], owners, sorted(set(exits)))
        for number, place in enumerate(places):
            yield place, {exit_layer: rows[number] for exit_layer, rows in found.items()}


def _fitting(context: Sequence[int], continuation: Sequence[int], limit: int) -> tuple[int, ...]:
    """The end of a context that fits beside the continuation, of which the last token is not read."""
    if len(continuation) > limit:
        raise ContextError(
            f"a continuation must be at most {limit} tokens, got {len(continuation)} (the model's context is {limit} tokens)"
        )
    return tuple(context[-(limit + 1 - len(continuation)) :])


def _groups(grouped: Mapping[tuple[int, ...], list[int]], pairs: Sequence[Pair], batch_size: int) -> list[_Group]:
    """Contexts with their continuations, the longest first.

    A context that is worth sharing keeps up to a batch of continuations, or a few if a batch is smaller.
    """
    groups = []
    for context, places in grouped.items():
        most = batch_size if len(context) < _WORTHWHILE else max(batch_size, _CHOICES)
        places = sorted(places, key=lambda place: -len(pairs[place][1]))
        groups += [_Group(context, places[start : start + most]) for start in range(0, len(places), most)]
    return sorted(groups, key=lambda group: -len(group.context) - len(pairs[group.places[0]][1]))


def _batches(groups: Sequence[_Group], pairs: Sequence[Pair], batch_size: int, limit: int) -> Iterator[list[_Group]]:
    """The groups, about `batch_size` pairs at a time. Contexts that begin alike are put together where they fill a batch."""
    starts = Counter(group.context[:_START] for group in groups)

    def beginning(group: _Group) -> tuple[int, ...]:
        start = group.context[:_START]
        return start if len(start) == _START and starts[start] > 1 and starts[start] >= batch_size // 2 else ()

    batch: list[_Group] = []
    count = longest = continued = 0
    for group in sorted(groups, key=beginning):
        context, more = len(group.context), len(pairs[group.places[0]][1])
        fits = max(longest, context) + max(continued, more) - 1 <= limit  # padding needs positions too
        if batch and (count + len(group.places) > batch_size or not fits or beginning(group) != beginning(batch[0])):
            yield batch
            batch, count, longest, continued = [], 0, 0, 0
        batch.append(group)
        count, longest, continued = count + len(group.places), max(longest, context), max(continued, more)
    if batch:
        yield batch


@torch.inference_mode()
def _scored(
    model: Backend,
    contexts: list[tuple[int, ...]],
    continuations: list[Sequence[int]],
    owners: list[int],
    exits: Sequence[int],
) -> dict[int, list[Likelihood]]:
    """The likelihood of each continuation, by exit. `owners`: the places of their contexts."""
    lengths = [len(context) for context in contexts]
    rests = [continuation[:-1] for continuation in continuations]
    shared = _common_start(contexts) if len(contexts) > 1 else 0
    cache = model.new_cache(1 if shared else len(contexts), max(lengths) + max(map(len, rests)))
    if shared:
        for _ in _states(model, [contexts[0][:shared]], [0], cache, exits):
            pass
        cache.keep_rows([0] * len(contexts))
    ends = [lengths[owner] - shared - 1 for owner in owners]
    first = [continuation[0] for continuation in continuations]
    states = _states(model, [context[shared:] for context in contexts], [shared] * len(contexts), cache, exits)
    found = {stop: _log_probabilities(head, hidden[owners, ends], first, model.vocab_size) for stop, hidden, head in states}
    rows = list(range(len(continuations)))
    if any(rests):
        cache.keep_rows(owners)
        rows += [row for row, rest in enumerate(rests) for _ in rest]
        columns = [column for rest in rests for column in range(len(rest))]
        targets = list(chain.from_iterable(continuation[1:] for continuation in continuations))
        for stop, hidden, head in _states(model, rests, [lengths[owner] for owner in owners], cache, exits):
            picked = hidden[rows[len(continuations) :], columns]
            later = _log_probabilities(head, picked, targets, model.vocab_size)
            found[stop] = (found[stop][0] + later[0], found[stop][1] + later[1])
    return {stop: _summed(rows, len(continuations), *tokens) for stop, tokens in found.items()}


def _common_start(contexts: Sequence[tuple[int, ...]]) -> int:
    """Length of the common prefix, which leaves each context a token; 0 if it is not worth a pass of its own."""
    first, last = min(contexts), max(contexts)  # in order: what these share is shared by all between them
    most = min(map(len, contexts)) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    return shared if shared >= _WORTHWHILE else 0


def _states(
    model: Backend, texts: Sequence[Sequence[int]], starts: Sequence[int], cache: KVCache, exits: Sequence[int]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """(exit, states (B, T, D) for its head, head) of B texts that begin at the positions `starts`, each padded at its end.

    The KV entries of the padding come after the text's: no token of the text sees them, and the next tokens overwrite them.
    """
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=model.device)
    positions = torch.tensor(starts)[:, None] + torch.arange(width)
    hidden = model.embed(ids)
    for start, stop in pairwise([0, *exits]):
        hidden = model.run_layers(hidden, start, stop, positions, cache)
        block = target_block(model.exit_blocks, stop)
        if block is None:
            yield stop, hidden, model.unembed
        else:
            yield stop, model.run_layers(hidden, block.layer, block.layer + 1, positions, cache), block.head


def _log_probabilities(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Sequence[int], vocab_size: int
) -> tuple[list[float], list[bool]]:
    """The log-probability of each target (N,) after its state (N, D), and whether it is the most probable token."""
    logs: list[float] = []
    best: list[bool] = []
    rows = max(1, CHUNK_LOGITS // vocab_size)
    wanted = torch.tensor(targets, device=states.device)
    for part, tokens in zip(torch.split(states, rows), torch.split(wanted, rows), strict=True):
        logits = head(part).float()
        logs += (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        best += (logits.argmax(-1) == tokens).tolist()
    return logs, best


def _summed(rows: Sequence[int], count: int, logs: Sequence[float], best: Sequence[bool]) -> list[Likelihood]:
    """The sums over the tokens of each of `count` rows; `rows`: that of each token."""
    totals, greedy = [0.0] * count, [True] * count
    for row, log, most_probable in zip(rows, logs, best, strict=True):
        totals[row] += log
        greedy[row] = greedy[row] and most_probable
    return [Likelihood(total, all_best) for total, all_best in zip(totals, greedy, strict=True)]
