"""The engine: runs the steps that the scheduler plans, for rows of one strategy.

A step drafts (nothing in plain decoding), runs the target over the drafts and chunks of prompts in
one pass, verifies the drafts, and commits the tokens. Rows get the same tokens together as alone.
"""

import time
from collections.abc import Sequence
from threading import RLock
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..config.decoding import STRATEGIES, DecodingConfig
from ..model.backend import Backend
from ..model.cache import Places, on_device
from .drafters import Draft, Drafter, DrafterSetup, DraftInput, drafter_for
from .drafters.lookup import EarlierAnswers
from .graphs import GraphRecorder, instant, seconds_between
from .output import PLAIN, Timings, logprobs_of
from .plan import ScheduledRow, StepPlan
from .prefixes import NO_PREFIXES, Prefixes
from .row import Row, RowStep
from .sampling import ChoiceRun, accepted_choices, needs_logits, noise_of, verify
from .target import FixedTarget, TargetOutput, target_of

_LOCKS: WeakKeyDictionary[Backend, RLock] = WeakKeyDictionary()
_SCORED = 64  # positions of a prompt whose logits are in memory at once


def lock_of(model: Backend) -> RLock:
    """The lock of a model. Its passes share buffers and pages, so one thread at a time runs them.

    It is held during a step and never between two, so that answers of several threads take turns,
    and one that is abandoned stops no other.
    """
    return _LOCKS.setdefault(model, RLock())


def draft_length(config: DecodingConfig) -> int:
    """The most drafts of a row in a step."""
    if not STRATEGIES[config.strategy].drafts:
        return 0
    return config.num_draft_tokens


class EngineOptions(TypedDict, total=False):
    """Options of an Engine, as its callers pass them on; see there."""

    prefixes: Prefixes
    earlier: EarlierAnswers | None
    reuse_exit_states: bool
    drafter: Drafter | None


class Engine:
    """The target, the drafter and the KV cache of rows that share a strategy.

    Everything else may differ between the rows: limits, sampling, changes of logits.
    """

    def __init__(
        self,
        model: Backend,
        config: DecodingConfig,
        prefixes: Prefixes = NO_PREFIXES,
        earlier: EarlierAnswers | None = None,
        *,
        reuse_exit_states: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        """`prefixes`: kept KV entries from which rows start; those of all rows are added.

        `earlier`: answers that lookups search too, in batch-invariant decoding; those of all rows
        are added. `reuse_exit_states`: False makes the target recompute the layers below the exit,
        to measure what reuse saves. `drafter`: instead of the config's. Raises ConfigError for
        draft weights that were not loaded.
        """
        self.target = target_of(model, config)
        self.num_draft_tokens = draft_length(config)
        if drafter is None and STRATEGIES[config.strategy].drafts:
            # Only on batch-invariant kernels: else remembered answers would change rounding
            searched = earlier if model.batch_invariant else None
            setup = DrafterSetup(model, config, reuse_exit_states, searched, prefixes)
            drafter = drafter_for(setup)
        self.drafter = drafter
        self.rows = list[Row]()  # unfinished, in the order of the cache
        self.cache = model.new_cache(0)
        self.timings = Timings()
        # If passes can be recorded: from the first decoding pass on. Its cache is `cache`
        self.recorder: GraphRecorder | None = None
        self._model = model
        self._prefixes = prefixes
        self._earlier = earlier
        self._lock = lock_of(model)

    # --- rows come and go ---

    def add(self, row: Row) -> None:
        """Adds a new row, or one that was preempted; it gets the same tokens as alone."""
        prefixes = self._prefixes_of(row)
        end = len(row.ids) + row.scanner.num_tokens_left
        with self._lock, torch.inference_mode():  # as in all writes to caches
            cache, row.num_computed_tokens = prefixes.start_cache(
                self._model, self.target, row.ids, end
            )
            row.branch_point = prefixes.branch_point(
                self._model, self.target, row.ids, row.num_computed_tokens
            )
            if row.num_cached_tokens is None:  # else it was preempted
                row.num_cached_tokens = row.num_computed_tokens
            cache.steps_back = self.num_draft_tokens
            if not self.rows:
                self.cache = cache
                self.rows = [row]
                return
            try:
                self.cache.join(cache)
            except BaseException:  # the other rows may be half changed
                self.close()
                raise
            self.rows = [*self.rows, row]

    def remove(self, row: Row) -> None:
        """Removes a row before its end and frees its KV entries at once. Its text so far is added
        to the prefixes.
        """
        index = self.rows.index(row)
        with self._lock:
            self._keep_text(index)
        self._keep_rows([other for other in range(len(self.rows)) if other != index])

    def preempt(self, row: Row) -> None:
        """Removes a row and frees its KV entries at once. Added again, its text is prefilled; where
        a prefill would write other entries than decoding did, it is decoded once more.
        """
        self._keep_rows([index for index, other in enumerate(self.rows) if other is not row])
        if not self.target.decodes_like_prefill:
            row.restart()
        elif not row.has_output:
            row.prompt_logprobs = []

    def keep_texts(self) -> None:
        """Adds the texts of all rows so far to the prefixes."""
        with self._lock:
            for index in range(len(self.rows)):
                self._keep_text(index)

    def close(self) -> None:
        """Removes all rows and frees their KV entries at once."""
        self.rows = []
        self.recorder = None  # its recordings hold the cache's addresses
        self.cache = self._model.new_cache(0)

    # --- a step ---

    def free_pages(self, plan: StepPlan) -> float:
        """Pages that a step would leave free; negative if it needs more."""
        ends = []
        for each in plan.rows:
            end = each.row.num_computed_tokens + each.num_tokens
            ends.append(min(end, self.cache.max_positions))
        return self.cache.free_pages(ends)

    def run(self, plan: StepPlan) -> list[RowStep]:
        """Runs a step. As in a generator, an exception, such as Ctrl-C, ends all rows."""
        try:
            with self._lock, torch.inference_mode():
                return self._run(plan)
        except BaseException:  # rows may be half changed
            self.close()
            raise

    def _run(self, plan: StepPlan) -> list[RowStep]:
        started = time.perf_counter()
        draft, draft_instants = self._draft(plan)
        plan = plan.with_drafts(draft.counts)
        output, tokens = self._forward(plan, draft)
        verified = self._verify_drafts(plan, tokens, output)
        draft_seconds = 0.0
        if draft_instants is not None:
            draft_seconds = seconds_between(*draft_instants)
        if not plan.num_prefill_tokens:
            self.timings.verify_seconds += time.perf_counter() - started - draft_seconds
        self.timings.draft_seconds += draft_seconds
        steps = self._commit(plan, draft.source, output, verified)
        self.timings.total_seconds += time.perf_counter() - started
        return steps

    def _draft(self, plan: StepPlan) -> tuple[Draft, tuple[Any, Any] | None]:
        """A draft for the rows that decode, and the instants at which the drafter began and ended.
        No drafts where only the target's own token has room.
        """
        decoding = [plan.rows[index] for index in plan.decoding_indices]
        rows = [each.row for each in decoding]
        limits = [each.num_draft_tokens for each in decoding]
        newest = on_device([row.ids[-1] for row in rows], self._model)
        if self.target.can_record and rows:
            ends = [len(each.row.ids) + each.num_draft_tokens for each in decoding]
            recorder = self.recorder or self._start_recording()
            recorder.reach(max(ends))
        if self.drafter is None or max(limits, default=0) <= 0:
            return Draft(newest, (0,) * len(rows), source=None), None
        given = DraftInput(
            rows,
            newest,
            self.cache,
            indices=plan.decoding_indices,
            num_computed_tokens=self._num_computed_tokens,
            seconds=self.timings.total_seconds,
            max_prefill_tokens=plan.max_prefill_tokens,
            recorder=self.recorder,
            block_writer=self.target.block_writer,
        )
        begun = instant(self._model.device)
        draft = self.drafter.draft(given, limits)
        if not any(draft.counts):
            return draft, None
        return draft, (begun, instant(self._model.device))

    def _start_recording(self) -> GraphRecorder:
        """The recorder's cache takes over the rows: recorded passes hold its addresses."""
        self.recorder = GraphRecorder.of(self._model, self.cache, self.timings)
        self.cache = self.recorder.cache
        return self.recorder

    def _forward(self, plan: StepPlan, draft: Draft) -> tuple[TargetOutput, Tensor]:
        """Runs the target over all tokens of the plan. Returns its output, and the tokens after
        which a token is chosen.
        """
        places = Places(
            self.cache,
            self._num_computed_tokens,
            [each.num_tokens for each in plan.rows],
            no_rollback=not plan.decoding_indices,
        )
        if not plan.num_prefill_tokens:
            return self._forward_drafts(plan, draft, places), draft.tokens
        drafts = iter(draft.by_row() if plan.decoding_indices else ())
        parts = []
        for each in plan.rows:
            start = each.row.num_computed_tokens
            if each.is_prefill:
                parts.append(on_device(each.row.ids[start : start + each.num_tokens], self._model))
            else:
                parts.append(next(drafts))
        tokens = torch.cat(parts)
        reporting = [_reports_prompt(each.row) for each in plan.rows]
        output = self.target.run_mixed(tokens, places, plan.scored_tokens, any(reporting))
        if output.states is not None:
            for index, reports in enumerate(reporting):
                if reports:
                    states = output.states[plan.bounds[index] : plan.bounds[index + 1]]
                    self._add_prompt_logprobs(plan.rows[index].row, states)
        return output, tokens[on_device(plan.scored_tokens, tokens)]

    def _forward_drafts(self, plan: StepPlan, draft: Draft, places: Places) -> TargetOutput:
        """A pass without chunks of prompts. The model chooses the tokens itself, if nothing else
        needs their logits.
        """
        rows = [each.row for each in plan.sampling_rows]
        returns_logits = needs_logits(rows)
        # A recorded pass has no noise
        if self.recorder is not None and any(row.config.temperature > 0 for row in rows):
            returns_logits = True
        noise = None
        if not returns_logits:
            noise = noise_of(_choice_runs(plan))
        return self.target.run_drafts(
            draft.tokens, draft.exit_states, places, self.recorder, noise, returns_logits
        )

    def _verify_drafts(
        self, plan: StepPlan, tokens: Tensor, output: TargetOutput
    ) -> list[list[int]]:
        """By row that samples: the accepted drafts, and a token of the target's own."""
        runs = _choice_runs(plan)
        if output.choices is not None:
            return accepted_choices(tokens, [run.tokens for run in runs], output.choices)
        if output.logits is not None:
            return verify(tokens, runs, output.logits)
        return []

    def _add_prompt_logprobs(self, row: Row, states: Tensor) -> None:
        """Adds log probabilities of the prompt tokens that follow these states (T, D), `_SCORED`
        positions at a time.
        """
        assert isinstance(self.target, FixedTarget) and row.config.logprobs is not None
        first = row.num_computed_tokens + 1
        following = row.ids[first : first + len(states)]
        for start in range(0, len(following), _SCORED):
            ids = following[start : start + _SCORED]
            logits = self.target.head(states[start : start + len(ids)])
            row.prompt_logprobs += logprobs_of(logits, ids, row.config.logprobs)

    def _commit(
        self, plan: StepPlan, source: str | None, output: TargetOutput, verified: list[list[int]]
    ) -> list[RowStep]:
        """Commits verified tokens and drops finished rows. Later tokens overwrite the KV entries of
        rejected drafts.
        """
        steps = list[RowStep]()
        scored = 0
        of_sampling = iter(verified)
        committed = list[int]()  # by row: tokens of the pass whose KV entries stay
        for each in plan.rows:
            row = each.row
            ids = next(of_sampling) if each.samples else []
            if ids:
                count = 1 + each.num_draft_tokens
                logits = None
                if output.logits is not None:
                    logits = output.logits[scored : scored + count]
                scored += count
                steps.append(self._commit_row(each, source, ids, output.layers, logits))
            if each.is_prefill:
                committed.append(each.num_tokens)
                row.num_computed_tokens += each.num_tokens
            else:
                # Of a row that a stop string ends, not all verified tokens stay
                before = row.num_computed_tokens
                row.num_computed_tokens = len(row.ids) - 1
                committed.append(row.num_computed_tokens - before)
        if self.target.block_writer is not None:
            self.target.block_writer.commit(
                self.cache, plan.bounds, committed, self._num_computed_tokens
            )
        self._drop_finished(plan)
        return steps

    def _commit_row(
        self,
        each: ScheduledRow,
        source: str | None,
        ids: list[int],
        layers: int,
        logits: Tensor | None,
    ) -> RowStep:
        """`source`: of the drafts; None if no drafter was asked."""
        if self.drafter is None or each.is_prefill:
            source = None
        elif source is None:
            source = PLAIN
        else:
            self.drafter.observe(each.row, each.num_draft_tokens, ids)
        return each.row.commit(ids, each.num_draft_tokens, source, layers, logits)

    def _drop_finished(self, plan: StepPlan) -> None:
        """Drops finished rows. Adds to the prefixes what others may continue from: whole prompts,
        their beginnings that other prompts share, and finished texts.
        """
        unfinished = list[int]()
        for index, each in enumerate(plan.rows):
            row = each.row
            if each.is_prefill and each.samples:
                self._keep(index, row.ids[: row.num_prompt_tokens])
            if each.num_tokens and row.num_computed_tokens == row.branch_point:
                self._keep(index, row.ids[: row.branch_point])
            if row.scanner.reason is None:
                unfinished.append(index)
                continue
            self._keep_text(index)
            if self._earlier is not None:
                self._earlier.add(row.ids, row.num_prompt_tokens)
        if len(unfinished) < len(plan.rows):
            self._keep_rows(unfinished)

    @property
    def _num_computed_tokens(self) -> list[int]:
        """By row of the cache."""
        return [row.num_computed_tokens for row in self.rows]

    # --- kept prefixes ---

    def _keep_text(self, index: int) -> None:
        """Adds a row's text so far to the prefixes, unless it waits for a prefill."""
        row = self.rows[index]
        if row.has_output and not row.num_uncomputed_tokens and self.target.decodes_like_prefill:
            self._keep(index, row.ids[:-1])

    def _keep(self, index: int, ids: Sequence[int]) -> None:
        """Adds the KV entries of a row's first tokens to the prefixes."""
        if self.target.block_writer is not None and self._prefixes.keeps_any:
            self.target.block_writer.write(self.cache, self._num_computed_tokens)
        prefixes = self._prefixes_of(self.rows[index])
        prefixes.keep(self._model, self.target, ids, self.cache, index)

    def _prefixes_of(self, row: Row) -> Prefixes:
        """The prefixes that a row may start from and is kept in."""
        return self._prefixes if row.uses_prefixes else NO_PREFIXES

    def _keep_rows(self, indices: list[int]) -> None:
        """Keeps only the rows of the batch at these indices."""
        self.rows = [self.rows[index] for index in indices]
        if indices:
            self.cache.keep_rows(indices)
            return
        if self.recorder is not None:
            self.recorder.give_back(self._model)
        self.close()


def _reports_prompt(row: Row) -> bool:
    """Whether log probabilities of prompt tokens are wanted, and the prompt still runs."""
    return row.config.prompt_logprobs and not row.has_output


def _choice_runs(plan: StepPlan) -> list[ChoiceRun]:
    """The choices of a step: a token after each draft and one after the newest."""
    return [ChoiceRun(each.row, 1 + each.num_draft_tokens) for each in plan.sampling_rows]
