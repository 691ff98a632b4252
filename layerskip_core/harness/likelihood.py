"""Log-likelihoods of continuations through several exits: a batch's prefix, its contexts and
continuations run once each.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ContextError
from ..losses import CHUNK_LOGITS
from ..model.backend import Backend, states_at_exits
from ..model.cache import Places

_START = 64  # tokens: contexts that share so many probably have the same few-shot examples
_WORTHWHILE = 16  # shortest common prefix, in tokens, that is worth a pass of its own
_CHOICES = 8  # continuations that share the pass of a long context, also in a smaller batch

Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context (at least one) and of its continuation."""


class Likelihood(NamedTuple):
    """A continuation's log-probability in nats, and whether each of its tokens is the most probable
    one.
    """

    total: float
    greedy: bool


def likelihoods(
    model: Backend, pairs: Sequence[Pair], exits: Sequence[int], batch_size: int
) -> Iterator[tuple[int, dict[int, Likelihood]]]:
    """Yields (index in `pairs`, likelihood by exit). Cuts long contexts at the start; ContextError
    for a long continuation.
    """
    limit = model.spec.context
    of_context = defaultdict[tuple[int, ...], list[int]](list)
    for place, (context, continuation) in enumerate(pairs):
        if not continuation:
            yield place, dict.fromkeys(exits, Likelihood(0.0, True))
        elif len(continuation) > limit:
            found = f"got {len(continuation)} (the model's context is {limit} tokens)"
            raise ContextError(f"a continuation must be at most {limit} tokens, {found}")
        else:  # the continuation's last token needs no pass
            of_context[tuple(context[-(limit + 1 - len(continuation)) :])].append(place)
    for batch in _batches(of_context, pairs, batch_size, limit):
        places = [place for _, group in batch for place in group]
        owners = [number for number, (_, group) in enumerate(batch) for _ in group]
        continuations = [pairs[place][1] for place in places]
        scored = _scored(
            model, [context for context, _ in batch], continuations, owners, sorted(set(exits))
        )
        for number, place in enumerate(places):
            by_exit = {}
            for exit_layer, (totals, greedy) in scored.items():
                by_exit[exit_layer] = Likelihood(float(totals[number]), bool(greedy[number]))
            yield place, by_exit


# A context, and the indices of its pairs, longest continuation first
_Group = tuple[tuple[int, ...], list[int]]


def _batches(
    of_context: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair], batch_size: int, limit: int
) -> Iterator[list[_Group]]:
    """Batches of about `batch_size` pairs, longest first. Pairs of a long context, and of common
    beginnings, share batches.
    """
    groups: list[_Group] = []
    for context, places in of_context.items():
        most = batch_size if len(context) < _WORTHWHILE else max(batch_size, _CHOICES)
        places.sort(key=lambda place: -len(pairs[place][1]))
        groups += [(context, places[start : start + most]) for start in range(0, len(places), most)]
    starts = Counter(context[:_START] for context, _ in groups)

    def beginning(group: _Group) -> tuple[int, ...]:
        start = group[0][:_START]
        return start if len(start) == _START and 1 < starts[start] >= batch_size // 2 else ()

    def continued(group: _Group) -> int:
        return len(pairs[group[1][0]][1])

    groups.sort(key=lambda group: (beginning(group), -len(group[0]) - continued(group)))
    batch: list[_Group] = []
    for group in groups:
        together = [*batch, group]
        padded = max(len(context) for context, _ in together) + max(map(continued, together)) - 1
        count = sum(len(places) for _, places in together)
        if batch and (
            count > batch_size or padded > limit or beginning(group) != beginning(batch[0])
        ):
            yield batch
            together = [group]
        batch = together
    if batch:
        yield batch


@torch.inference_mode()
def _scored(
    model: Backend,
    contexts: Sequence[tuple[int, ...]],
    continuations: Sequence[Sequence[int]],
    owners: Sequence[int],
    exits: Sequence[int],
) -> dict[int, tuple[Tensor, Tensor]]:
    """By exit: each continuation's log-probability, and whether it is greedy. `owners`: the index
    of its context.
    """
    lengths = [len(context) for context in contexts]
    count = len(continuations)
    rests = [continuation[:-1] for continuation in continuations]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False))
    shared = min(sum(1 for _ in alike), min(lengths) - 1)  # every context keeps a token of its own
    if len(contexts) == 1 or shared < _WORTHWHILE:
        shared = 0
    cache = model.new_cache(1 if shared else len(contexts), max(lengths) + max(map(len, rests)))
    if shared:
        prefix = torch.tensor(contexts[0][:shared], device=model.device)
        for _ in states_at_exits(model, prefix, cache.span(0, shared, no_rollback=True), exits):
            pass
        cache = cache.branch([0] * len(contexts), [shared] * len(contexts))
    scores = {
        stop: (torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool))
        for stop in exits
    }

    def score(
        texts: Sequence[Sequence[int]],
        starts: Sequence[int],
        after: Sequence[tuple[int, int, int, int]],
    ) -> None:
        """Runs `texts` from positions `starts`. `after`: (continuation, target, row and column in
        `texts` that predict it).
        """
        owner, targets, rows, columns = torch.tensor(after).T
        places = Places(cache, starts, list(map(len, texts)), no_rollback=True)
        ids = torch.tensor([*chain(*texts)], device=model.device)
        at = torch.tensor(places.bounds)[rows] + columns
        for stop, hidden, head in states_at_exits(model, ids, places, exits):
            totals, greedy = scores[stop]
            logs, best = _log_probabilities(
                head, hidden[at], targets.to(hidden.device), model.spec.vocab
            )
            totals.index_add_(0, owner, logs.double())
            greedy[owner[~best]] = False

    firsts = [
        (number, continuations[number][0], row, lengths[row] - shared - 1)
        for number, row in enumerate(owners)
    ]
    score([context[shared:] for context in contexts], [shared] * len(contexts), firsts)
    if any(rests):
        cache = cache.branch(owners, [lengths[row] for row in owners])
        later = [
            (number, token, number, column)
            for number, each in enumerate(continuations)
            for column, token in enumerate(each[1:])
        ]
        score(rests, [lengths[row] for row in owners], later)
    return scores


def _log_probabilities(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target (N,) given its state (N, D), and whether it is the argmax;
    both on the CPU.
    """
    parts = []
    rows = max(1, CHUNK_LOGITS // vocab_size)
    for part, tokens in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
        logits = head(part).float()
        parts.append(
            (
                logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1),
                logits.argmax(-1) == tokens,
            )
        )
    logs, best = zip(*parts, strict=True)
    return torch.cat(logs).cpu(), torch.cat(best).cpu()
