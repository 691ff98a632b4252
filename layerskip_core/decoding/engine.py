"""The decoding engine: one loop for every strategy, for one prompt and for many.

A step is a draft (empty in plain decoding), one pass of the target over it, and the tokens that the pass verified. Prompts that
go through the loop together get the tokens that each gets alone.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..config.decoding import DRAFTERS, DecodingConfig
from ..errors import require
from ..model.backend import Backend, check_prompt
from ..model.cache import KVCache
from .drafters import Context, Draft, Drafter, DrafterSetup, drafter_for
from .drafters.lookup import EarlierAnswers
from .graphs import Recorder, instant, seconds_between
from .output import (
    Answer,
    DecodeStats,
    Detokenize,
    OutputText,
    Row,
    RowStep,
    StopReason,
    StopScanner,
)
from .processing import LogitsProcessor
from .sampling import Sampler, accepted_choices
from .target import FixedTarget, Prefixes, TargetOutput, target_of

_NOTHING = "plain"  # drafts where only one token has room


def decode(
    model: Backend,
    prompt_ids: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    *,
    reuse_exit_states: bool = True,
    prefixes: Prefixes | None = None,
    earlier: EarlierAnswers | None = None,
) -> "DecodingLoop":
    """Decode a prompt by the config's strategy: `[step.ids for [step] in decode(...)]` are the ids of each step.

    Greedy self-speculative decoding gives the tokens of autoregressive decoding; sampled, it gives their distribution.

    Args:
        detokenize: ids to text; needed for stop strings only.
        reuse_exit_states: False makes the target recompute the layers below the exit, to measure what reuse saves.
        prefixes: texts that the prompt may begin with; what is decoded is added to them.
        earlier: answers that lookups search too, if rows are greedy and drafts change no bit; this one is added to them.

    Raises:
        ConfigError: the prompt does not fit, or its drafts need weights that were not loaded.
    """
    options: dict[str, Any] = {"reuse_exit_states": reuse_exit_states, "prefixes": prefixes, "earlier": earlier}
    return DecodingLoop(model, [prompt_ids], config, eos_ids, detokenize, isolated=True, **options)


def decode_batch(
    model: Backend,
    prompts: Sequence[list[int]],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    seeds: Sequence[int] | None = None,
    earlier: EarlierAnswers | None = None,
) -> Iterator[Answer]:
    """Decode prompts together by the config's strategy; yield each answer when it is complete.

    In fp32 and above a row's greedy output is the one that `decode` gives for its prompt alone, near-ties excepted. Rows stand
    at different positions, because a key's place in the cache is its token's position.

    Args:
        detokenize: ids to text; without it answers have ids only.
        seeds: of each sampled row; None: the config's for all.
        earlier: as for `decode`.

    Raises:
        ConfigError: as `decode`, and for several prompts with exact weights or with an `exit_confidence`, with which the rows
            would leave at different exits.
    """
    single = len(prompts) == 1
    require(single or not model.exact, "batch_size", "1 with `exact`", len(prompts))
    require(single or not config.exit_confidence, "batch_size", "1 with `exit_confidence`", len(prompts))
    loop = DecodingLoop(model, prompts, config, eos_ids, detokenize, seeds=seeds, earlier=earlier)
    for steps in loop:
        for step in steps:
            if step.finish_reason is not None:
                row = loop.rows[step.row]
                text = "" if detokenize is None else OutputText(detokenize, eos_ids, config.stop).add(row.output, finished=True)
                counts = sum(row.steps, DecodeStats())
                yield Answer(text, step.finish_reason, counts, row.output, step.row, row.logprobs, row.prompt_logprobs)


class DecodingLoop:
    """Iterates over steps: the new tokens of the rows that are not finished yet.

    A loop can be abandoned between any two steps. As in a generator, an exception in a step, such as Ctrl-C, ends it. `rows`:
    those that it was made with.
    """

    def __init__(
        self,
        model: Backend,
        prompts: Sequence[list[int]],
        config: DecodingConfig,
        eos_ids: frozenset[int] = frozenset(),
        detokenize: Detokenize | None = None,
        *,
        seeds: Sequence[int] | None = None,
        reuse_exit_states: bool = True,
        prefixes: Prefixes | None = None,
        earlier: EarlierAnswers | None = None,
        isolated: bool = False,
        drafter: Drafter | None = None,
        piece: float = inf,
    ) -> None:
        """Arguments and errors as for `decode` and `decode_batch`. A single row begins as one of the `prefixes`; all rows leave
        their own.

        `isolated`: it has one row, and no others will join: its passes are recorded where the model allows it. `drafter`:
        instead of the config's. `piece`: a step runs so many tokens of a single prompt at most; those before its end give none.
        """
        if config.prompt_logprobs:  # every token of the prompt needs its pass
            prefixes = None
        self._target = target_of(model, config)
        self._model, self._prefixes, self._earlier = model, prefixes, earlier
        self._num_draft_tokens = config.num_draft_tokens
        self._active = []
        for number, prompt in enumerate(prompts):
            check_prompt(prompt, model)
            limits = config.max_new_tokens, model.room - len(prompt)
            self._active.append(Row(number, prompt, StopScanner(eos_ids, config.stop, *limits, detokenize), config))
        processors: list[LogitsProcessor] = []
        if config.changes_logits:
            processors = [LogitsProcessor(config, row.ids, row.prompt_tokens, eos_ids) for row in self._active]
        self._sampler = Sampler(config, model.device, len(prompts), seeds, processors)
        end = max(len(row.ids) + row.scanner.room for row in self._active)
        recorder, rerun = None, self._target.rerun
        self._piece = inf if config.prompt_logprobs else piece
        self.reused_tokens = 0  # of the prompt, which need no pass
        self._cache: KVCache
        if prefixes is not None and len(prompts) == 1:
            self._cache, self.reused_tokens = prefixes.begin(model, self._target, prompts[0], end)
        elif isolated and model.recordable and not rerun and isinstance(self._target, FixedTarget):
            self._target.recorder = recorder = Recorder.of(model, len(prompts[0]), end)
            self._cache = recorder.cache
        else:
            self._cache = model.new_cache(len(prompts), end)
        # Elsewhere an output would depend on the answers before it: drafts decide what chance, or how passes round.
        searched = earlier if self._sampler.is_greedy and model.batch_invariant else None
        self._setup = DrafterSetup(model, self._sampler, config, eos_ids, reuse_exit_states, recorder, searched)
        if drafter is None and config.strategy in DRAFTERS:
            drafter = drafter_for(self._setup)
        self._drafter = drafter
        self._filled = self.reused_tokens  # how many of the prompt's first tokens have KV entries
        self._refills = False  # whether a text that was set aside runs again
        self._cache.steps_back = 0 if drafter is None else config.num_draft_tokens
        self._positions = torch.arange(end)[None]
        self._newest: Tensor | None = None  # (B, 1), each row's newest token; None before the prefill
        self.rows = tuple(self._active)
        self._numbered = len(self._active)  # rows that have had a number
        self._seconds = defaultdict[str, Any](int) if recorder is None else recorder.counts  # of DecodeStats

    def __iter__(self) -> Iterator[list[RowStep]]:
        return self

    def __next__(self) -> list[RowStep]:
        if not self._active:
            raise StopIteration
        # Entered here and not in a generator, whose caller would run in inference mode between two steps.
        try:
            with torch.inference_mode():
                return self._step()
        except BaseException:  # the rows may be changed in part
            self._active = []
            raise

    @property
    def is_filled(self) -> bool:
        """Whether all of the prompts have run, and what was set aside has its KV entries again."""
        return not self._active or (self._newest is not None and not self._refills)

    @property
    def can_wait(self) -> bool:
        """Whether rows may be set aside: their texts, when they run again, have the KV entries that they have now."""
        return self._target.decodes_like_prefill

    def lacking(self) -> tuple[int, float]:
        """(how many pages the next step needs, how many there may be)."""
        rows, more = self._active, 1 + (0 if self._drafter is None else self._num_draft_tokens)
        if self.is_filled:
            stops = [min(len(row.ids) + more, self._cache.max_positions) for row in rows]
        else:
            stops = [int(min(len(row.ids), self._filled + self._piece)) for row in rows]
        return self._cache.lacking(stops), self._cache.free_pages

    def set_aside(self, number: int) -> "DecodingLoop":
        """Takes out the row with this number, without its KV entries: a loop of its own, which runs the text again and can then
        join others.
        """
        index = next(index for index, row in enumerate(self._active) if row.number == number)
        aside, row = copy(self), self._active[index]
        aside._active, aside.rows, aside._sampler = [row], (row,), self._sampler.only(index)
        aside._cache = self._model.new_cache(1, len(row.ids) + row.scanner.room)
        aside._cache.steps_back = self._cache.steps_back
        aside._setup = replace(self._setup, sampler=aside._sampler)
        aside._drafter = None if self._drafter is None else drafter_for(aside._setup)
        aside._target, aside._filled, aside._seconds = target_of(self._model, row.config), 0, defaultdict(int)
        if self._newest is not None:
            aside._newest, aside._refills = self._newest[index : index + 1], len(row.ids) > 1
        self._stay([other for other in range(len(self._active)) if other != index])
        return aside

    def join(self, other: "DecodingLoop") -> list[int]:
        """Takes over the rows that another loop still has, and returns their new numbers. That loop is over.

        Both are past their prefill, have rows left, and decode with one model by the same settings. Limits, stop strings and
        seeds are each row's own: a row goes on with the tokens that it gets alone.
        """
        assert self._newest is not None and other._newest is not None and other._active
        numbers = list(range(self._numbered, self._numbered + len(other._active)))
        self._numbered += len(numbers)
        for row, number in zip(other._active, numbers, strict=True):
            row.number = number
        self._active = self._active + other._active
        self._newest = torch.cat((self._newest, other._newest))
        self._sampler.join(other._sampler)
        with torch.inference_mode():  # which the cache was written in
            self._cache.join(other._cache)
        if self._target.exit_cache is not None and other._target.exit_cache is not None:
            self._target.exit_cache.join(other._target.exit_cache)
        self._positions = max(self._positions, other._positions, key=lambda positions: positions.shape[1])
        other._active = []
        return numbers

    def leave(self) -> None:
        """Adds the texts of all rows so far to the prefixes."""
        for index in range(len(self._active) if self._newest is not None else 0):
            self._keep(index)

    def drop(self, row: int) -> None:
        """The row with this number is gone after the next step."""
        for kept in self._active:
            if kept.number == row:
                kept.is_dropped = True

    @property
    def stats(self) -> DecodeStats:
        """Counts and seconds of all steps so far. Time between two steps is the caller's and not counted."""
        return sum((step for row in self.rows for step in row.steps), DecodeStats(**self._seconds))

    @property
    def finish_reason(self) -> StopReason | None:
        """Why the first prompt's output ended, once it has."""
        return self.rows[0].scanner.reason

    def _step(self) -> list[RowStep]:
        """A draft, the target's pass over it, the tokens that it verifies, and those committed to the rows."""
        started, newest, drafting = time.perf_counter(), self._newest, None
        if (newest is None or self._refills) and self._is_piece():
            return []
        if newest is None:
            draft, output = self._prefill()
        else:
            draft, drafting = self._draft(newest)
            output = self._target.verify(draft, self._next_positions(draft.tokens.shape[1]), self._cache)
        if output.choices is not None:
            verified, following = accepted_choices(draft.tokens[:, 1:], draft.counts, output.choices)
        else:
            assert output.logits is not None
            verified, following = self._sampler.verify(draft.tokens[:, 1:], draft.counts, draft.probs, output.logits)
        verified_at = time.perf_counter()
        # The indices, in this pass, whose logits gave each row's newest token.
        last = [len(ids) - 1 for ids in verified]
        if newest is None:
            last = [len(row.ids) - 1 - self._filled for row in self._active]
        steps = self._committed(draft, output, verified, drafted=newest is not None)
        self._go_on(following, last)
        draft_seconds = 0.0 if drafting is None else seconds_between(*drafting)
        self._seconds["draft_seconds"] += draft_seconds
        self._seconds["prefill_seconds" if newest is None else "verify_seconds"] += verified_at - started - draft_seconds
        self._seconds["total_seconds"] += time.perf_counter() - started
        return steps

    def _draft(self, newest: Tensor) -> tuple[Draft, tuple[Any, Any] | None]:
        """A draft, and when the drafter began and ended it. Where only the target's own token has room, nothing drafts."""
        rows, limits = self._active, [0]
        if self._drafter is not None:
            limits = [min(self._num_draft_tokens, row.scanner.room - 1) for row in rows]
        if self._target.recorder is not None:
            self._target.recorder.reach(len(rows[0].ids) + max(limits))
        if self._drafter is None or max(limits) == 0:
            return Draft(newest, (0,) * len(rows), source=_NOTHING), None
        first = instant(self._model.device)
        draft = self._drafter.draft(self._context(newest, limits), limits)
        return draft, None if draft.tokens.shape[1] == 1 else (first, instant(self._model.device))

    def _committed(self, draft: Draft, output: TargetOutput, verified: list[list[int]], drafted: bool) -> list[RowStep]:
        """The steps of all rows. `drafted`: whether the pass was not a prefill."""
        steps, drafter = [], self._drafter if drafted else None
        for index, (row, count, ids) in enumerate(zip(self._active, draft.counts, verified, strict=True)):
            if drafter is not None and draft.source != _NOTHING:
                drafter.observe(row.number, count, ids)
            source = None if drafter is None else "lookup" if index in draft.lookups else draft.source
            logits = None if output.logits is None else output.logits[index]
            step = row.commit(count, ids, source, output.layers, draft.survival, logits)
            if not drafted and row.config.prompt_logprobs:
                assert isinstance(self._target, FixedTarget)
                row.prompt_logprobs = self._target.prompt_logprobs(row, output, index)
                step = step._replace(prompt_logprobs=row.prompt_logprobs)
            steps.append(step)
            if self._earlier is not None and step.finish_reason is not None:
                self._earlier.add(row.ids, row.prompt_tokens)
            if self._prefixes is not None and not drafted:
                self._prefixes.keep(self._model, self._target, row.ids[: row.prompt_tokens], self._cache, index)
        return steps

    def _is_piece(self) -> bool:
        """Whether the prompt is too long for this step, or its text runs again: then a piece of it does."""
        start, [row, *others] = self._filled, self._active
        if others or (len(row.ids) - start <= self._piece and not self._refills):
            return False
        started, self._filled = time.perf_counter(), int(min(start + self._piece, len(row.ids) - self._refills))
        self._cache.ends = [self._filled]
        tokens = torch.tensor([row.ids[start : self._filled]], device=self._model.device)
        self._target.fill(tokens, self._positions[:, start : self._filled], self._cache)
        if row.is_dropped:
            self._active = []
        self._refills = self._refills and self._filled < len(row.ids) - 1
        for name in ("prefill_seconds", "total_seconds"):
            self._seconds[name] += time.perf_counter() - started
        return True

    def _prefill(self) -> tuple[Draft, TargetOutput]:
        """An empty draft, and the target's pass over the tokens of the prompts that have no KV entries.

        Prompts are padded at their ends. No token attends to the padding, and the next tokens overwrite it.
        """
        device, start = self._model.device, self._filled
        missing = [row.ids[start:] for row in self._active]
        lengths = [len(ids) for ids in missing]
        longest = max(lengths)
        padded = [ids + [ids[-1]] * (longest - len(ids)) for ids in missing]
        tokens, last = torch.tensor(padded, device=device), torch.tensor(lengths, device=device) - 1
        positions = self._positions[:, start : start + longest].expand(len(lengths), -1)
        self._cache.ends = [start + length for length in lengths]
        output = self._target.prefill(tokens, last, positions, self._cache)
        self._cache.ends = None
        return Draft(tokens[:, :1], (0,) * len(lengths)), output

    def _keep(self, index: int) -> None:
        if self._prefixes is not None and self._target.decodes_like_prefill:
            self._prefixes.keep(self._model, self._target, self._active[index].ids[:-1], self._cache, index)

    def _context(self, newest: Tensor, limits: list[int]) -> Context:
        rows = self._active
        features = {} if self._target.exit_cache is None else self._target.exit_cache.features
        positions = self._next_positions(max(limits) + 1)
        numbers, ids = [row.number for row in rows], [row.ids for row in rows]
        seconds = self._seconds["total_seconds"]
        return Context(numbers, ids, newest, positions, self._cache, features, self._sampler.processors, seconds)

    def _next_positions(self, count: int) -> Tensor:
        """(B, count) on the host: positions of each row's newest token and of the tokens after it."""
        if len(self._active) == 1:
            start = len(self._active[0].ids) - 1
            return self._positions[:, start : start + count]
        starts = torch.tensor([len(row.ids) - 1 for row in self._active])
        # Only padding can reach the context's last position, where no token is read that is followed by another.
        return (starts[:, None] + self._positions[:, :count]).clamp_max(self._cache.max_positions - 1)

    def _go_on(self, newest: Tensor, last: list[int]) -> None:
        """With the rows that are not finished. Later tokens overwrite the rejected drafts in the cache."""
        staying = [index for index, row in enumerate(self._active) if row.scanner.reason is None and not row.is_dropped]
        for index in set(range(len(self._active))).difference(staying):
            self._keep(index)
        if self._target.exit_cache is not None and staying:
            self._target.exit_cache.go_on(last)
        self._newest = newest
        if len(staying) < len(self._active):
            self._stay(staying)

    def _stay(self, rows: list[int]) -> None:
        """With these rows of the batch, by their indices."""
        self._active = [self._active[index] for index in rows]
        if not rows:
            if self._target.recorder is not None:
                self._target.recorder.give_back(self._model)
            return
        self._sampler.keep_rows(rows)
        self._cache.keep_rows(rows)
        if self._newest is not None:
            self._newest = self._newest[rows]
            if self._target.exit_cache is not None:
                self._target.exit_cache.keep_rows(rows)
