"""What a step does, as data: made by the scheduler before the step, read by the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import inf

from .row import Row


@dataclass(frozen=True)
class ScheduledRow:
    """The part of one row in a step."""

    row: Row
    is_prefill: bool  # tokens of its text run; else its newest token and drafts
    num_tokens: int  # in the target's pass; 0 for a prefill that waits for the next step
    num_draft_tokens: int  # of these; at most, until the draft is made
    samples: bool  # gets new tokens


@dataclass(frozen=True)
class StepPlan:
    """A step of an engine: one entry for each of its rows, in the order of the cache."""

    rows: tuple[ScheduledRow, ...]
    max_prefill_tokens: float = inf  # that a draft model may run in this step, too

    @cached_property
    def decoding_indices(self) -> list[int]:
        """The indices of rows that may get drafts."""
        return [index for index, each in enumerate(self.rows) if not each.is_prefill]

    @cached_property
    def sampling_rows(self) -> list[ScheduledRow]:
        return [each for each in self.rows if each.samples]

    @property
    def num_tokens(self) -> int:
        return sum(each.num_tokens for each in self.rows)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(each.num_tokens for each in self.rows if each.is_prefill)

    @cached_property
    def bounds(self) -> list[int]:
        """The index of each row's first token in the pass, and the number of all."""
        return [0, *accumulate(each.num_tokens for each in self.rows)]

    @cached_property
    def scored_tokens(self) -> list[int]:
        """The indices in the pass of the tokens after which a token is chosen: of each row that
        samples the last, and drafts are the last of their row.
        """
        found = list[int]()
        for each, end in zip(self.rows, self.bounds[1:], strict=True):
            if each.samples:
                found += range(end - each.num_draft_tokens - 1, end)
        return found

    def with_drafts(self, counts: Sequence[int]) -> "StepPlan":
        """The plan with the drafts that were made, `counts` by decoding row."""
        rows = list(self.rows)
        for index, drafts in zip(self.decoding_indices, counts, strict=True):
            rows[index] = replace(rows[index], num_tokens=1 + drafts, num_draft_tokens=drafts)
        return replace(self, rows=tuple(rows))


def plan_step(rows: Sequence[Row], num_draft_tokens: int, max_prefill_tokens: float) -> StepPlan:
    """Plans a step: decoding rows get at most `num_draft_tokens` drafts each; rows without the KV
    entries of their text share the prefill tokens, in the order in which they joined.
    """
    num_prefill_left = max_prefill_tokens
    scheduled = []
    for row in rows:
        if row.num_uncomputed_tokens == 0:
            # The last token of an output has no room for a draft
            drafts = min(num_draft_tokens, row.scanner.num_tokens_left - 1)
            scheduled.append(ScheduledRow(row, False, 1 + drafts, drafts, samples=True))
            continue
        chunk = min(row.num_uncomputed_tokens, num_prefill_left)
        if row.num_computed_tokens < row.branch_point and max_prefill_tokens < inf:
            # See Row.branch_point. An unlimited prefill is of given prompts, which come together
            chunk = min(chunk, row.branch_point - row.num_computed_tokens)
        num_prefill_left -= chunk
        # A row that was preempted has its next token already
        samples = chunk == row.num_uncomputed_tokens and not row.has_output
        scheduled.append(ScheduledRow(row, True, int(chunk), 0, samples))
    return StepPlan(tuple(scheduled), max_prefill_tokens)
