"""The scheduler: which rows run in the next step, and how much of each. For one thread.

    scheduler.add(row)          it waits for a place in the batch and for memory
    scheduler.step()            admits rows; then, for each engine:
        plan = plan_step(...)       how much of each row runs      (plan.py, immutable)
        free memory for the plan    drops prefixes, preempts the youngest row, plans again
        engine.run(plan)            drafts, runs the target, verifies, commits   (engine.py)

Rows join and leave between steps (Orca: Yu et al., OSDI 2022). Prefill is chunked (Sarathi-Serve:
Agrawal et al., OSDI 2024): passes that verify drafts also run chunks of prompts, few tokens per
step, so new rows do not stall running ones. A row that was preempted is prefilled again when there
is room. Rows of one strategy share an engine, whatever their sampling; engines take their steps in
turn, and share the prefill tokens of a step. A row that cannot be batched has an engine of its own.
"""

from collections import deque
from collections.abc import Callable, Hashable
from math import inf
from traceback import clear_frames
from typing import Unpack

from ..model.backend import Backend
from .engine import Engine, EngineOptions
from .output import DecodeStats
from .plan import StepPlan, plan_step
from .prefixes import NO_PREFIXES
from .row import Row, RowStep


class Scheduler:
    """Decodes at most `max_rows` rows at once; others wait in order of arrival."""

    def __init__(
        self,
        model: Backend,
        *,
        max_rows: float = inf,
        max_prefill_tokens: float = inf,
        free_elsewhere: Callable[[], bool] = lambda: False,
        **engine_options: Unpack[EngineOptions],
    ) -> None:
        """`max_prefill_tokens`: prompt tokens of all rows per step. `free_elsewhere`: frees memory
        of the caller's, and returns False if it had none.
        """
        self.waiting: deque[Row] = deque()  # preempted ones first, the oldest first
        self._max_prefill_tokens = max_prefill_tokens
        self._model = model
        self._max_rows = max_rows
        self._prefixes = engine_options.get("prefixes", NO_PREFIXES)
        self._free_elsewhere = free_elsewhere
        self._engine_options = engine_options
        self._engines: dict[Hashable, Engine] = {}  # by what their rows share

    @property
    def running(self) -> list[Row]:
        return [row for engine in self._engines.values() for row in engine.rows]

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self._engines)

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def remove(self, row: Row) -> bool:
        """Removes a row before its end, and frees its memory at once. Returns False if it has
        ended already.
        """
        if row in self.waiting:
            self.waiting.remove(row)
            return True
        engine = self._engine_of(row)
        if engine is None:
            return False
        engine.remove(row)
        self._forget_idle_engines()
        return True

    def clear(self) -> None:
        """Removes all rows and frees their memory."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self.waiting.clear()

    def step(self, admits: bool = True) -> list[RowStep]:
        """A step of all rows. An exception ends the rows of its engine, which get it as their
        step's `failure`, and no others.
        """
        steps = self.admit() if admits else []
        num_prefill_left = self._max_prefill_tokens
        for engine in list(self._engines.values()):
            plan = self._plan(engine, num_prefill_left)
            if plan.num_tokens:
                num_prefill_left -= plan.num_prefill_tokens
                steps += self._run(engine, plan)
        self._forget_idle_engines()
        return steps

    def admit(self) -> list[RowStep]:
        """Waiting rows join the batch. Returns the steps of those that an exception ends."""
        steps = []
        while self.waiting and self._can_admit(self.waiting[0]):
            steps += self._start(self.waiting.popleft())
        return steps

    def has_free_pages(self, tokens: int) -> bool:
        """Whether there is memory for a text of so many tokens, and a page more for each running
        row, after dropping kept prefixes if need be; True if no row is running.
        """
        reserve = len(self.running)
        cache = self._model.new_cache()
        has_room = self._prefixes.make_room(
            self._model, lambda: cache.free_pages([tokens + 1]) >= reserve
        )
        return has_room or not reserve

    def preempt(self, row: Row) -> None:
        """Takes the memory of a running row, which goes on when there is room."""
        engine = self._engine_of(row)
        assert engine is not None
        engine.preempt(row)
        self.waiting.appendleft(row)

    def engine_for(self, row: Row) -> Engine:
        """The engine in which a row runs, or will run."""
        key = self._key_of(row)
        if key not in self._engines:
            self._engines[key] = Engine(self._model, row.config, **self._engine_options)
        return self._engines[key]

    def _can_admit(self, row: Row) -> bool:
        """Whether the batch has a place for a row, the next step has prefill tokens left, and
        memory suffices.

        While a row of the same strategy and the same beginning is prefilled, the row waits to share
        its KV entries.
        """
        running = self.running
        prefilled = [other for other in running if other.num_uncomputed_tokens]
        num_planned = sum(other.num_uncomputed_tokens for other in prefilled)
        if len(running) >= self._max_rows or num_planned >= self._max_prefill_tokens:
            return False
        if row.uses_prefixes:
            strategy = row.config.engine_settings
            others = [
                other.ids
                for other in prefilled
                if other.uses_prefixes and other.config.engine_settings == strategy
            ]
            if self._prefixes.would_share(self._model, row.ids, others):
                return False
        return self.has_free_pages(len(row.ids))

    def _start(self, row: Row) -> list[RowStep]:
        others = list[Row]()
        engine = None
        try:
            engine = self.engine_for(row)
            others = engine.rows
            engine.add(row)
            return []
        except BaseException as error:
            # Those whose cache could not be joined have left the engine
            lost = others if engine is not None and not engine.rows else []
            self._forget_idle_engines()
            return _failed([*lost, row], error)

    def _plan(self, engine: Engine, max_prefill_tokens: float) -> StepPlan:
        """The next step of an engine, and the memory for it: of kept prefixes, then of the
        caller's, then of the youngest rows, of any engine.
        """
        while True:
            plan = plan_step(engine.rows, engine.num_draft_tokens, max_prefill_tokens)
            if not plan.rows or engine.free_pages(plan) >= 0:
                return plan
            if self._prefixes.drop(self._model) or self._free_elsewhere():
                continue
            running = self.running
            if len(running) == 1:  # none is left to preempt: the step raises the error
                return plan
            self.preempt(max(running, key=lambda row: row.arrival))

    def _run(self, engine: Engine, plan: StepPlan) -> list[RowStep]:
        try:
            return engine.run(plan)
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            return _failed([each.row for each in plan.rows], error)

    def _engine_of(self, row: Row) -> Engine | None:
        for engine in self._engines.values():
            if row in engine.rows:
                return engine
        return None

    def _key_of(self, row: Row) -> Hashable:
        """Equal for rows that share an engine. Some cannot be batched."""
        is_single = row.config.exit_confidence > 0 or self._model.exact
        return row if is_single else row.config.engine_settings

    def _forget_idle_engines(self) -> None:
        """Drops engines that no row needs, also none that waits: drafters learn."""
        idle = [key for key, engine in self._engines.items() if not engine.rows]
        if idle:
            needed = {self._key_of(row) for row in self.waiting}
            for key in idle:
                if key not in needed:
                    del self._engines[key]


def without_failure(steps: list[RowStep]) -> list[RowStep]:
    """The steps. Raises the failure of the first that has one."""
    for step in steps:
        if step.failure is not None:
            raise step.failure
    return steps


def _failed(rows: list[Row], error: BaseException) -> list[RowStep]:
    # Its variables hold KV entries, for as long as somebody holds the error
    clear_frames(error.__traceback__)
    return [RowStep(row, [], None, DecodeStats(), error) for row in rows]
