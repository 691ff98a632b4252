"""From logits to tokens: the most probable ones, or samples after temperature, top-k and top-p; and
verification of drafts.

Before that, a row's own options may change its logits: bias, penalties, forbidden tokens. The
logits of each position change by the tokens before it, drafts included, so a draft is verified
against the same logits as the token that autoregressive decoding chooses in its place. Noise makes
a sample of the most probable token (see model/noise.py), so drafts are verified in the same way
with and without it: those are accepted that the target chooses.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.cache import on_device
from ..model.native.noise import perturbed
from ..model.noise import Noise, key_of, least_temperature
from ..model.vocabulary import most_probable
from .row import Row

_PIECE = 1 << 21  # most logits that are copied at once: some six copies of 8 MB in fp32


class ChoiceRun(NamedTuple):
    """Consecutive tokens of a row that are chosen: so many, the first of them `ahead` tokens after
    the row's next one.
    """

    row: Row
    tokens: int = 1
    ahead: int = 0


class Scores(NamedTuple):
    """What tokens are chosen by: of each row of scores the largest."""

    values: Tensor  # (N, C): logits, of samples with their noise
    ids: Tensor | None = None  # token ids of the columns, (C,) or by row (N, C); None for 0..C-1


def noise_of(runs: Sequence[ChoiceRun]) -> Noise | None:
    """The noise of all choices, for rows that share a temperature. None if nothing is drawn.

    It depends on seed and position alone, so on neither the batch nor drafts.
    """
    temperature = runs[0].row.config.temperature if runs else 0.0
    if temperature == 0:
        return None
    keys = []
    for row, count, ahead in runs:
        start = len(row.ids) + ahead
        keys += [key_of(row.seed, position) for position in range(start, start + count)]
    return Noise(temperature, keys)


def scores_of(logits: Tensor, runs: Sequence[ChoiceRun], ids: Tensor | None = None) -> Scores:
    """The scores to choose by, for rows that share their sampling. `logits` (N, C) may be
    overwritten; `ids` (C,): None for 0..C-1.
    """
    noise = noise_of(runs)
    if noise is None:
        return Scores(logits, ids)
    config = runs[0].row.config
    if truncates(config):
        logits, columns = candidates(logits, config)
        ids = columns if ids is None else ids[columns]
    return Scores(perturbed(logits, noise, ids), ids)


def best_of(scores: Scores, one_thread: bool = False) -> Tensor:
    """The token ids (N,) of the largest scores.

    `one_thread`: by NumPy, which is as fast as one thread of torch and has no barrier, at which
    threads stall on a busy machine.
    """
    values, ids = scores
    by_numpy = one_thread and values.device.type == "cpu"
    found = torch.from_numpy(values.numpy().argmax(-1)) if by_numpy else most_probable(values)
    if ids is None:
        return found
    if ids.dim() == 1:
        return ids[found]
    return ids.gather(-1, found[:, None])[:, 0]


def choose(
    logits: Tensor, runs: Sequence[ChoiceRun], ids: Tensor | None = None, needs_probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The tokens (N,) that rows choose by logits (N, C), which may be overwritten, each row by its
    own sampling; and their probabilities (N,), if needed.

    `ids` (C,): the token ids of the columns, None for 0..C-1. The probability of a sample is that
    of its score among all scores, noise included.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for member, run in enumerate(runs):
        groups.setdefault(_sampling(run.row.config), []).append(member)
    if len(groups) == 1:
        return _chosen_alike(logits, runs, ids, needs_probs)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    probs = None
    if needs_probs:
        probs = torch.empty(len(logits), device=logits.device)
    starts = [0, *accumulate(run.tokens for run in runs)]
    for members in groups.values():
        indices = list[int]()
        for member in members:
            indices += range(starts[member], starts[member + 1])
        index = on_device(indices, logits)
        of_group = [runs[member] for member in members]
        own_tokens, own_probs = _chosen_alike(logits[index], of_group, ids, needs_probs)
        tokens[index] = own_tokens
        if probs is not None and own_probs is not None:
            probs[index] = own_probs
    return tokens, probs


def _sampling(config: DecodingConfig) -> tuple[float, ...]:
    """Equal for rows whose tokens are chosen in the same way, but for their seeds."""
    if config.temperature == 0:
        return (0.0,)
    return config.temperature, config.top_k, config.top_p, config.min_p


def _chosen_alike(
    logits: Tensor, runs: Sequence[ChoiceRun], ids: Tensor | None, needs_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """As `choose`, for rows that share their sampling."""
    scores = scores_of(logits, runs, ids)
    best = best_of(scores, any(run.row.processor for run in runs))
    if not needs_probs:
        return best, None
    return best, scores.values.float().softmax(-1).amax(-1)


def needs_logits(rows: Sequence[Row]) -> bool:
    """Whether a pass must return the logits of these rows. False if the model can choose by itself:
    greedily, or with noise of one temperature.
    """
    for row in rows:
        config = row.config
        if config.changes_logits or config.logprobs is not None:
            return True
        if config.temperature != rows[0].config.temperature:
            return True
        if config.temperature > 0 and truncates(config):
            return True
    return False


def processed(logits: Tensor, runs: Sequence[ChoiceRun], drafts: Sequence[Sequence[int]]) -> Tensor:
    """Applies the options of rows to logits (N, V) of their runs, which may be overwritten.

    A run's last position follows the row's drafts, of which `drafts` has those so far.
    """
    changed = logits.to(torch.promote_types(logits.dtype, torch.float32))
    parts = torch.split(changed, [run.tokens for run in runs])
    for run, own, part in zip(runs, drafts, parts, strict=True):
        if run.row.processor is not None:
            run.row.processor.process(part, own)
    return changed


def verify(tokens: Tensor, runs: Sequence[ChoiceRun], logits: Tensor) -> list[list[int]]:
    """Verifies drafts by the target's logits (S, V) after tokens (S,): of each run a row's newest
    token, then its drafts.

    Waits once for the device, with options of rows twice. The logits may be overwritten, unless log
    probabilities are reported. Returns, by row, the accepted drafts and the target's own token
    after them.
    """
    counts = [run.tokens for run in runs]
    rows = [run.row for run in runs]
    changes = any(row.processor is not None for row in rows)
    if not changes and all(row.config.temperature == 0 for row in rows):
        return accepted_choices(tokens, counts, most_probable(logits))
    is_reported = any(row.config.logprobs is not None for row in rows)
    ids = tokens.tolist() if changes else []
    choices = []
    for start, end in _pieces(len(logits), logits.shape[-1]):
        part = logits[start:end]
        part = part.to(torch.promote_types(part.dtype, torch.float32), copy=is_reported)
        of_part = _cut_runs(runs, start, end)
        if changes:
            drafts = []
            last = start
            for run in of_part:
                newest = last - run.ahead
                last += run.tokens
                drafts.append(ids[newest + 1 : last])
            part = processed(part, of_part, drafts)
        choices.append(choose(part, of_part)[0])
    return accepted_choices(tokens, counts, torch.cat(choices))


def _cut_runs(runs: Sequence[ChoiceRun], start: int, end: int) -> list[ChoiceRun]:
    """What runs have at the indices start..end-1 of all their tokens."""
    parts = []
    first = 0
    for run in runs:
        own_start = max(first, start)
        own_end = min(first + run.tokens, end)
        if own_start < own_end:
            parts.append(ChoiceRun(run.row, own_end - own_start, own_start - first))
        first += run.tokens
    return parts


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most `_PIECE` numbers each, at least one row."""
    most = max(1, _PIECE // columns)
    for start in range(0, rows, most):
        yield start, min(start + most, rows)


def accepted_choices(tokens: Tensor, counts: Sequence[int], choices: Tensor) -> list[list[int]]:
    """Accepts each row's longest prefix of drafts that equal the target's choices (S,); else as
    `verify`.
    """
    if max(counts) == 1:
        return [[chosen] for chosen in choices.tolist()]
    # One copy from the device for both
    given, chosen = torch.stack((tokens, choices)).tolist()
    verified = []
    first = 0
    for count in counts:
        drafts = given[first + 1 : first + count]
        own = chosen[first : first + count]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == own[accepted]:
            accepted += 1
        verified.append(own[: accepted + 1])
        first += count
    return verified


def truncates(config: DecodingConfig) -> bool:
    """Whether some tokens can never be drawn."""
    return bool(config.min_p or config.top_k) or config.top_p < 1


def candidates(logits: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor]:
    """The logits (..., C), in at least fp32, of the C most probable tokens, and their ids (..., C).

    They are -inf for those that min-p, top-k, then top-p leave out, which includes all other
    tokens. top-p keeps the smallest set of most probable tokens whose mass reaches it (Holtzman et
    al., 2020), never less than one.
    """
    probs = _softmax(logits, config.temperature)
    count = vocabulary = probs.shape[-1]
    if config.top_k:
        count = min(config.top_k, vocabulary)
    elif probs.device.type == "cpu":
        # A count saves the CPU a full sort. Other devices sort fast, and reading it would wait for
        # them. Tokens under (1 - top_p) / V have less than 1 - top_p together, so the others reach
        # top_p without them.
        least: Tensor | float = (1 - config.top_p) / vocabulary
        if config.min_p:
            least = config.min_p * probs.amax(-1, keepdim=True)
        # 0 if all tokens are equally probable and rounded down
        count = max(1, int((probs >= least).sum(-1).max()))
    top_probs, ids = probs.topk(count)
    if config.min_p:
        top_probs = top_probs.masked_fill(top_probs < config.min_p * top_probs[..., :1], 0)
    if config.top_p < 1:
        if config.top_k or config.min_p:
            top_probs = top_probs / top_probs.sum(-1, keepdim=True)
        mass_before = top_probs.cumsum(-1) - top_probs
        # A smaller top-p would round to 0 and keep no token.
        top_probs = top_probs.masked_fill(
            mass_before >= max(config.top_p, torch.finfo(probs.dtype).tiny), 0
        )
    return logits.to(probs.dtype).gather(-1, ids).masked_fill(top_probs == 0, -torch.inf), ids


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum is subtracted first, because division by a small temperature could overflow.
    return (
        (logits - logits.amax(-1, keepdim=True)) / least_temperature(temperature, logits.dtype)
    ).softmax(-1)
