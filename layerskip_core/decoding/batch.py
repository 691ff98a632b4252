"""Many prompts at once: each row goes its own way through the rounds, and gives the tokens that it gives alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.checks import require
from ..config.decoding import DecodingConfig
from ..model.backend import Backend
from ..model.cache import KVCache
from .drafters.base import Draft
from .loop import DecodeStats, check_prompt, step_counts, target_and_drafter, target_logits
from .sampling import Sampler, Verdict, sampler_for
from .stopping import Detokenize, Stopping, StopReason, StopScanner


class Finished(NamedTuple):
    """One prompt's whole output. Its stats are counts alone: the seconds of a batch belong to no row of it."""

    row: int  # the prompt's place in the batch
    ids: list[int]
    finish_reason: StopReason
    stats: DecodeStats


@dataclass
class _Row:
    """One prompt on its way; `cached` counts its committed positions in the cache."""

    number: int
    cached: int
    scanner: StopScanner
    sampler: Sampler
    stats: DecodeStats
    ids: list[int] = field(default_factory=list)


class _RowByRow:
    """The samplers of all rows as one, for drafting: every row draws by its own generator, as it does alone."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def probs(self, logits: Tensor) -> Tensor | None:
        return self.rows[0].sampler.probs(logits)

    def choose(self, logits: Tensor, probs: Tensor | None, rows: Sequence[int]) -> Tensor:
        if probs is None:
            return self.rows[0].sampler.choose(logits, None, rows)
        drawn = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
        for row in rows:
            drawn[row] = self.rows[row].sampler.choose(logits[row], probs[row], rows)
        return drawn

    def verify(self, draft_ids: Tensor, draft_probs: Tensor | None, logits: Tensor) -> Verdict:
        raise NotImplementedError("each row verifies by its own sampler")


def decode_batch(
    model: Backend,
    prompts: Sequence[list[int]],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
) -> Iterator[Finished]:
    """Decodes prompts together by any strategy; yields each output when it is complete, and goes on with the others.

    In fp32 and above a row's greedy output is the one that `decode` gives for its prompt alone, near-ties excepted; sampled
    rows each have the config's seed. Rows may stand at different positions, for a key's place in the cache is its token's
    position. Prompts are padded at their ends: what padding writes there is seen by no token and overwritten by the next.

    Raises ConfigError, at the first output, for a prompt or an exit that does not fit and for a model with exact weights.
    """
    require(not model.exact, "batch_size", "1 with `exact`", len(prompts))
    stopping = Stopping(eos_ids, config.stop, config.max_new_tokens)
    rows = []
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, model.max_positions)
        scanner = StopScanner(stopping, model.max_positions - len(prompt), detokenize)
        sampler = sampler_for(config.sampling, model.device)
        rows.append(_Row(number, len(prompt), scanner, sampler, DecodeStats(sequences=1, prompt_tokens=len(prompt))))
    samplers = _RowByRow(rows)
    target_layers, drafter = target_and_drafter(model, config, samplers, eos_ids)
    cache = model.new_cache(len(rows))
    with torch.inference_mode():
        logits = _prefill(model, prompts, cache, target_layers)
    draft = Draft(torch.empty(len(rows), 0, dtype=torch.long, device=model.device))
    while True:
        with torch.inference_mode():
            newest = torch.cat([_advance(row, draft, place, logits[place]) for place, row in enumerate(rows)])
        for row in rows:
            if row.scanner.reason is not None:
                yield Finished(row.number, row.ids, row.scanner.reason, row.stats)
        staying = [place for place, row in enumerate(rows) if row.scanner.reason is None]
        if not staying:
            return
        with torch.inference_mode():
            if len(staying) < len(rows):
                rows = samplers.rows = [rows[place] for place in staying]
                cache.keep_rows(staying)
                newest = newest[staying]
            cache.lengths = torch.tensor([row.cached for row in rows])
            draft = Draft(newest)
            most = [min(config.num_draft_tokens, row.scanner.room - 1) for row in rows]
            # Only padding would stand after the context's last place, which no token of a row that goes on is read from.
            positions = (cache.lengths[:, None] + torch.arange(max(most) + 1)).clamp_max(cache.max_positions - 1)
            if drafter is not None and max(most) > 0:
                draft = drafter.draft(newest, positions[:, : max(most)], cache, most)
            logits = target_logits(model, draft, positions[:, : draft.tokens.shape[1]], cache, target_layers)


def _prefill(model: Backend, prompts: Sequence[list[int]], cache: KVCache, target_layers: int) -> Tensor:
    """Logits (B, 1, V) behind each prompt's last token."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([prompt + [prompt[-1]] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    positions = torch.arange(longest).expand(len(prompts), -1)
    hidden = model.run_layers(model.embed(tokens), 0, target_layers, positions, cache)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    return model.unembed(hidden[torch.arange(len(prompts), device=model.device), last][:, None])


def _advance(row: _Row, draft: Draft, place: int, logits: Tensor) -> Tensor:
    """Judges what a row has drafted by its logits (K+1, V); returns its newest token, (1, 1)."""
    prefill = draft.tokens.shape[1] == 0
    drafts = draft.by_row[place] if draft.by_row else 0
    probs = None if draft.probs is None or drafts == 0 else draft.probs[place, :drafts]
    verdict = row.sampler.verify(draft.tokens[place, 1 : 1 + drafts], probs, logits[: drafts + 1])
    count, _ = row.scanner.cut(verdict.ids)
    row.ids += verdict.ids[:count]
    row.stats += step_counts(drafts, verdict.accepted, count)
    row.cached += 0 if prefill else 1 + verdict.accepted
    return verdict.newest
