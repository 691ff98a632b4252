"""The decoding engine: one loop for every strategy, for one prompt and for many.

A step drafts (nothing in plain decoding), runs the target over the drafts in one pass, and commits
the verified tokens. Prompts decoded together get the same tokens as alone.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from math import inf
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..config.decoding import DRAFTERS, DecodingConfig
from ..errors import require
from ..model.backend import Backend, check_prompt
from ..model.cache import Places, on_device
from ..model.noise import Noise
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
    logprobs_of,
)
from .sampling import Sampler, accepted_choices
from .target import NO_PREFIXES, FixedTarget, Prefixes, TargetOutput, target_of

_NOTHING = "plain"  # source of steps without room for drafts
_LOCKS: WeakKeyDictionary[Backend, RLock] = WeakKeyDictionary()
_SCORED = 64  # positions of a prompt whose logits are in memory at once


def lock_of(model: Backend) -> RLock:
    """The lock of a model. Its passes share buffers and pages, so one thread at a time runs them.

    It is held during a step and never between two, so that answers of several threads take turns,
    and one that is abandoned stops no other.
    """
    return _LOCKS.setdefault(model, RLock())


def decode(
    model: Backend,
    prompt_ids: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    **options: Any,
) -> "DecodingLoop":
    """Decode a prompt by the config's strategy: `[step.ids for [step] in decode(...)]` are the ids
    of each step.

    Every strategy that drafts gives the tokens of autoregressive decoding, sampled ones of equal
    seeds too. `detokenize`: ids to text, for stop strings only. `options`: DecodingLoop's. Raises
    ConfigError for a prompt that does not fit, and for draft weights that were not loaded.
    """
    return DecodingLoop(model, [prompt_ids], config, eos_ids, detokenize, **options)


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

    In fp32 and above a row's output equals that of `decode` for its prompt and seed alone,
    near-ties excepted. Without `detokenize` answers have ids only. `seeds`: by row, for sampling;
    None: the config's for all. Raises ConfigError as `decode`, and for several prompts with exact
    weights or an `exit_confidence`, where rows leave at different exits.
    """
    single = len(prompts) == 1
    require(single or not model.exact, "batch_size", "1 with `exact`", len(prompts))
    require(
        single or not config.exit_confidence, "batch_size", "1 with `exit_confidence`", len(prompts)
    )
    loop = DecodingLoop(model, prompts, config, eos_ids, detokenize, seeds=seeds, earlier=earlier)
    for steps in loop:
        for step in steps:
            if step.finish_reason is not None:
                row = step.row
                counts = sum(step.row.steps, DecodeStats())
                of_row = row.output, loop.rows.index(row), row.logprobs, row.prompt_logprobs
                yield Answer(
                    row.text.add(row.output, finished=True), step.finish_reason, counts, *of_row
                )


class DecodingLoop:
    """Iterates over steps: the new tokens of the rows that are not finished yet.

    A loop can be abandoned between any two steps. As in a generator, an exception in a step, such
    as Ctrl-C, ends it. Loops of one model can be in different threads.
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
        drafter: Drafter | None = None,
    ) -> None:
        """Arguments and errors as for `decode` and `decode_batch`.

        `reuse_exit_states`: False makes the target recompute the layers below the exit, to measure
        what reuse saves. `prefixes`: kept KV entries from which rows start; those of all rows are
        added. `earlier`: answers that lookups search too, in batch-invariant decoding; those of all
        rows are added. `drafter`: instead of the config's.
        """
        self._target = target_of(model, config)
        self._sampler = Sampler(config)
        self._prefixes = NO_PREFIXES if prefixes is None else prefixes
        self._model = model
        self._earlier = earlier
        self._detokenize = detokenize
        self._lock = lock_of(model)
        self.piece = inf  # most prompt tokens per step, the oldest rows first
        self.left = inf  # the part of `piece` that the last step did not need
        # Only on batch-invariant kernels: else remembered answers would change rounding.
        searched = earlier if model.batch_invariant else None
        if drafter is None and config.strategy in DRAFTERS:
            drafter = drafter_for(
                DrafterSetup(model, config, eos_ids, reuse_exit_states, searched, self._prefixes)
            )
        self._drafter = drafter
        self._num_draft_tokens = 0 if drafter is None else config.num_draft_tokens
        # From the first decoding pass on, if passes can be recorded
        self._recorder: Recorder | None = None
        self._seconds = defaultdict[str, Any](int)  # by field of DecodeStats
        # Unfinished rows, added ones included
        self.active = list[Row]()
        self._cache = model.new_cache(0)
        self.rows = tuple(
            map(self.row, prompts, repeat(config), repeat(eos_ids), seeds or repeat(config.seed))
        )
        for row in self.rows:
            self.add(row)
        # Of the first prompt, from a kept prefix
        self.reused_tokens = self.rows[0].filled if self.rows else 0

    def __iter__(self) -> Iterator[list[RowStep]]:
        return self

    def __next__(self) -> list[RowStep]:
        if not self.active:
            raise StopIteration
        # Entered here and not in a generator, whose caller would run in inference mode between two
        # steps.
        try:
            with self._lock, torch.inference_mode():
                return self._step()
        except BaseException:  # rows may be half changed
            self._recorder = None
            self.end()
            raise

    def spare(self) -> float:
        """Pages that the next step would leave free; negative if it needs more."""
        self._divide()
        more = 1 + self._num_draft_tokens
        most = self._cache.max_positions
        return self._cache.free_pages(
            [min(row.filled + (row.runs or more), most) for row in self.active]
        )

    def row(
        self, prompt: list[int], config: DecodingConfig, eos_ids: frozenset[int], seed: int
    ) -> Row:
        """A row that can be added. Only its limits, stop strings and changes of logits may differ
        from the loop's settings.

        Raises ConfigError for a prompt that does not fit.
        """
        check_prompt(prompt, self._model, num_draft_tokens=self._num_draft_tokens)
        room = self._model.context_length(self._num_draft_tokens) - len(prompt)
        limits = config.max_new_tokens, room
        scanner = StopScanner(eos_ids, config.stop, *limits, self._detokenize)
        text = OutputText(self._detokenize or (lambda ids: ""), eos_ids, config.stop)
        return Row(prompt, scanner, text, config, seed)

    def add(self, row: Row) -> None:
        """Adds a new row, or one that was set aside; it gets the same tokens as alone."""
        known = self._prefixes_of(row)
        end = len(row.ids) + row.scanner.room
        with self._lock, torch.inference_mode():  # as in all writes to caches
            cache, row.filled = known.begin(self._model, self._target, row.ids, end)
            row.stop = known.parting(self._model, self._target, row.ids, row.filled)
            cache.steps_back = self._num_draft_tokens
            if self.active:
                # If this fails, they may be half changed
                others = self.active
                self.active = []
                self._cache.join(cache)
                self.active = [*others, row]
            else:
                self._cache = cache
                self.active = [row]

    def set_aside(self, row: Row) -> None:
        """Removes a row and frees its KV entries at once: added again, its text is prefilled again.

        A row that exits by confidence cannot be added again: a prefill writes other entries than
        decoding.
        """
        row.prompt_logprobs = row.prompt_logprobs if row.output else []
        self._stay([index for index, other in enumerate(self.active) if other is not row])

    def cancel(self, row: Row) -> None:
        """Removes a row before its end and frees its KV entries at once. Its text so far is added
        to the prefixes.
        """
        index = self.active.index(row)
        with self._lock:
            self._keep_so_far(index)
        self._stay([other for other in range(len(self.active)) if other != index])

    def leave(self) -> None:
        """Adds the texts of all rows so far to the prefixes."""
        with self._lock:
            for index in range(len(self.active)):
                self._keep_so_far(index)

    @property
    def stats(self) -> DecodeStats:
        """Counts and seconds of all steps so far. Time between two steps is the caller's and not
        counted.
        """
        return sum((step for row in self.rows for step in row.steps), DecodeStats(**self._seconds))

    @property
    def finish_reason(self) -> StopReason | None:
        """Why the first prompt's output ended, once it has."""
        return self.rows[0].scanner.reason

    def _step(self) -> list[RowStep]:
        """Drafts, runs the target over drafts and pieces of prompts, verifies and commits."""
        started = time.perf_counter()
        self._divide()
        drafting = [index for index, row in enumerate(self.active) if not row.fills]
        draft, instants = self._draft(drafting)
        rows = [row for row in self.active if row.chooses]
        counts = [1 + row.drafts for row in rows]
        noise = self._sampler.noise(rows, [0] * len(rows), counts)
        output, tokens, bounds = self._pass(draft, drafting, noise)
        verified = list[list[int]]()
        if output.choices is not None:
            verified = accepted_choices(tokens, counts, output.choices)
        elif output.logits is not None:
            verified = self._sampler.verify(tokens, counts, output.logits, noise, rows)
        draft_time = seconds_between(*instants) if instants else 0.0
        if not any(row.fills and row.runs for row in self.active):
            self._seconds["verify_seconds"] += time.perf_counter() - started - draft_time
        self._seconds["draft_seconds"] += draft_time
        steps = self._committed(draft, output, dict(zip(rows, verified, strict=True)), bounds)
        self._seconds["total_seconds"] += time.perf_counter() - started
        return steps

    def _divide(self) -> None:
        """Divides the prefill tokens of the next step among the rows that lack KV entries, the
        oldest first.
        """
        self.left = self.piece
        for row in self.active:
            lacks = row.lacks
            before_stop = (
                row.stop - row.filled if row.filled < row.stop and self.piece < inf else inf
            )
            row.runs = int(min(lacks, self.left, before_stop))
            row.drafts = 0
            row.source = None
            row.fills = lacks > 0
            row.chooses = lacks == 0 or (lacks == row.runs and len(row.ids) == row.prompt_tokens)
            self.left -= row.runs

    def _draft(self, drafting: list[int]) -> tuple[Draft, tuple[Any, Any] | None]:
        """A draft for some rows, and the instants at which the drafter began and ended. No drafts
        where only the target's own token has room.
        """
        rows = [self.active[index] for index in drafting]
        device = self._model.device
        newest = on_device([row.ids[-1] for row in rows], self._model)
        draft = Draft(newest, (0,) * len(rows), source=_NOTHING)
        instants = None
        limits = [min(self._num_draft_tokens, row.scanner.room - 1) for row in rows]
        if self._target.records and rows:
            if self._recorder is None:
                self._recorder = Recorder.of(self._model, self._cache)
                self._recorder.counts = self._seconds
                self._cache = self._recorder.cache
            self._recorder.reach(
                max(len(row.ids) + limit for row, limit in zip(rows, limits, strict=True))
            )
        if self._drafter is not None and max(limits, default=0) > 0:
            seconds = self._seconds["total_seconds"]
            blocks = self._target.exit_cache
            context = Context(
                rows,
                newest,
                self._cache,
                drafting,
                self._filled,
                seconds,
                self.piece,
                self._recorder,
                blocks=blocks,
            )
            first = instant(device)
            draft = self._drafter.draft(context, limits)
            instants = (first, instant(device)) if any(draft.counts) else None
        for row, count in zip(rows, draft.counts, strict=True):
            row.runs = 1 + count
            row.drafts = count
            row.source = None if self._drafter is None else draft.source
        return draft, instants

    def _pass(
        self, draft: Draft, drafting: list[int], noise: Noise | None
    ) -> tuple[TargetOutput, Tensor, list[int]]:
        """Runs the target; returns its output, the scored tokens (the last of each row, its drafts)
        and where rows begin.

        `noise`: of the choices after scored tokens.
        """
        rows = self.active
        places = Places(
            self._cache,
            [row.filled for row in rows],
            [row.runs for row in rows],
            no_rollback=not drafting,
        )
        bounds = places.bounds
        if len(drafting) == sum(row.runs > 0 for row in rows):
            output = (
                self._target.verify(draft, places, self._recorder, noise)
                if drafting
                else TargetOutput(None, 0)
            )
            return output, draft.tokens, bounds
        drafts = iter(draft.by_row() if drafting else ())
        fills = ((row, row.ids[row.filled : row.filled + row.runs]) for row in rows)
        parts = [on_device(ids, self._model) if row.fills else next(drafts) for row, ids in fills]
        ends = zip(rows, bounds[1:], strict=True)
        scored = [
            place for row, end in ends if row.chooses for place in range(end - row.drafts - 1, end)
        ]
        whole = any(row.config.prompt_logprobs and not row.output for row in rows)
        tokens = torch.cat(parts)
        output = self._target.fill(tokens, places, scored, whole)
        for index, row in enumerate(rows):
            if row.config.prompt_logprobs and not row.output and output.states is not None:
                self._add_prompt_logprobs(row, output.states[bounds[index] : bounds[index + 1]])
        return output, tokens[on_device(scored, tokens)], bounds

    def _add_prompt_logprobs(self, row: Row, states: Tensor) -> None:
        """Adds log probabilities of the prompt tokens that follow these states (T, D), `_SCORED`
        positions at a time.
        """
        assert isinstance(self._target, FixedTarget) and row.config.logprobs is not None
        following = row.ids[row.filled + 1 : row.filled + 1 + len(states)]
        for start in range(0, len(following), _SCORED):
            ids = following[start : start + _SCORED]
            logits = self._target.head(states[start : start + len(ids)])
            row.prompt_logprobs += logprobs_of(logits, ids, row.config.logprobs)

    def _committed(
        self,
        draft: Draft,
        output: TargetOutput,
        verified: Mapping[Row, list[int]],
        bounds: list[int],
    ) -> list[RowStep]:
        """Commits verified tokens, drops finished rows. Later tokens overwrite the KV entries of
        rejected drafts.
        """
        steps = list[RowStep]()
        scored = 0
        committed = [0] * len(self.active)  # by row: tokens of the pass whose KV entries stay
        prefilled = list[int]()  # rows whose prompt is complete with this pass
        for index, row in enumerate(self.active):
            ids = verified.get(row, [])
            if ids:
                if self._drafter is not None and row.source not in (None, _NOTHING):
                    self._drafter.observe(row, row.drafts, ids)
                logits = (
                    None
                    if output.logits is None
                    else output.logits[scored : scored + row.drafts + 1]
                )
                steps.append(row.commit(ids, output.layers, logits))
                scored += row.drafts + 1
                if row.fills:
                    prefilled.append(index)
            if row.runs:
                committed[index] = row.runs if row.fills else len(ids)
            row.filled = row.filled + row.runs if row.fills else len(row.ids) - 1
        if self._target.exit_cache is not None:
            self._target.exit_cache.commit(self._cache, bounds, committed, self._filled)
        staying = list[int]()
        for index, row in enumerate(self.active):
            if index in prefilled:
                self._keep(index, row.ids[: row.prompt_tokens])
            if row.runs and row.filled == row.stop:
                self._keep(index, row.ids[: row.stop])
            if row.scanner.reason is None:
                staying.append(index)
                continue
            self._keep_so_far(index)
            if self._earlier is not None:
                self._earlier.add(row.ids, row.prompt_tokens)
        if len(staying) < len(self.active):
            self._stay(staying)
        return steps

    @property
    def _filled(self) -> list[int]:
        """By row of the cache: how many tokens have KV entries."""
        return [row.filled for row in self.active]

    def _keep_so_far(self, index: int) -> None:
        """Adds a row's text so far to the prefixes, unless it waits for a prefill."""
        row = self.active[index]
        if row.output and not row.lacks:
            self._keep(index)

    def _keep(self, index: int, prompt: list[int] | None = None) -> None:
        """Adds the KV entries of a row's prompt, or of its text so far, to the prefixes."""
        row = self.active[index]
        if prompt is not None or self._target.decodes_like_prefill:
            if self._target.exit_cache is not None and self._prefixes is not NO_PREFIXES:
                self._target.exit_cache.write(self._cache, self._filled)
            self._prefixes_of(row).keep(
                self._model, self._target, prompt or row.ids[:-1], self._cache, index
            )

    def _prefixes_of(self, row: Row) -> Prefixes:
        """The prefixes that a row may start from and is kept in; none if it needs logits of its
        whole prompt.
        """
        return NO_PREFIXES if row.config.prompt_logprobs else self._prefixes

    def _stay(self, rows: list[int]) -> None:
        """Keeps only the rows of the batch at these indices."""
        self.active = [self.active[index] for index in rows]
        if rows:
            self._cache.keep_rows(rows)
            return
        if self._recorder is not None:
            self._recorder.give_back(self._model)
            self._recorder = None
        self.end()

    def end(self) -> None:
        """Removes all rows and frees their KV entries at once, also if the loop is kept for its
        statistics.
        """
        self.active = []
        self._cache = self._model.new_cache(0)
