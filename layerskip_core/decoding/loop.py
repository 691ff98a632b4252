"""The decoding loop: each step is a draft (empty in plain decoding), a pass of the target, and the tokens that it verified.

B prompts go through the loop together, and each gives the tokens that it gives alone: one prompt is B = 1.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.checks import require
from ..errors import ContextError
from ..model.backend import Backend
from ..model.cache import KVCache
from .depth import Depth, Pass
from .drafters import Context, Draft, Drafter
from .growing_text import Detokenize
from .prefix import PrefixCache
from .sampling import Sampler, Verdict, accepted_choices
from .stats import DecodeStats, step_counts
from .stopping import Stopping, StopReason, StopScanner
from .stopwatch import Stopwatch
from .true_states import TrueStates


class Token(NamedTuple):
    """A verified token of the output; `from_draft` if it was an accepted draft."""

    id: int
    from_draft: bool


class RowStep(NamedTuple):
    """What one step added to the output of one prompt."""

    row: int  # the prompt's place in the batch
    tokens: list[Token]
    finish_reason: StopReason | None  # set with the output's last tokens
    counts: DecodeStats  # of the step


class _Row:
    """One prompt that is being decoded. Its newest token is the only one that the cache lacks."""

    def __init__(self, number: int, prompt: list[int], scanner: StopScanner) -> None:
        self.number = number
        self.ids = list(prompt)  # and the output
        self.scanner = scanner
        self.prompt_tokens = len(prompt)
        self.steps: list[DecodeStats] = [DecodeStats(sequences=1, prompt_tokens=len(prompt))]
        self.is_dropped = False

    @property
    def goes_on(self) -> bool:
        return self.scanner.reason is None and not self.is_dropped


class DecodingLoop:
    """Iterates over steps: what each added to the outputs of the rows that are not finished yet.

    A loop can be abandoned between any two steps. As in a generator, an exception in a step, such as Ctrl-C, ends it.
    """

    def __init__(
        self,
        model: Backend,
        prompts: Sequence[list[int]],
        stopping: Stopping,
        sampler: Sampler,
        depth: Depth,
        drafter: Drafter | None = None,
        num_draft_tokens: int = 0,
        detokenize: Detokenize | None = None,
        true_states: TrueStates | None = None,
        prefix: PrefixCache | None = None,
        cache: KVCache | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """`depth`: which layers the target is. `true_states`: those that `depth` takes for blocks that draft, if any do.

        `prefix`: what the text before left, for a loop of one row. `cache`: to be used instead of a new one. `at_end` is called
        when all rows are finished.

        Raises ConfigError for a prompt that is empty or leaves no room.
        """
        self._model = model
        self._sampler = sampler
        self._depth = depth
        self._drafter = drafter
        self._num_draft_tokens = num_draft_tokens
        self._true_states = true_states
        self._prefix = prefix
        self._rows = []
        for number, prompt in enumerate(prompts):
            check_prompt(prompt, model.max_positions)
            scanner = StopScanner(stopping, model.max_positions - len(prompt), detokenize)
            self._rows.append(_Row(number, prompt, scanner))
        end = max(len(row.ids) + row.scanner.room for row in self._rows)
        self.reused_tokens = 0  # of the prompt, whose keys and values the text before left
        if prefix is None:
            self._cache = model.new_cache(len(prompts), end) if cache is None else cache
        else:
            (prompt,) = prompts
            rerun = 0 if true_states is None else true_states.rerun
            self._cache, self.reused_tokens = prefix.begin(prompt, rerun)
        self._places = torch.arange(end)[None]
        self._at_end = at_end
        self._drafting = Stopwatch(model.device)
        self._newest: Tensor | None = None  # (B, 1), each row's newest token; None before the prefill
        self._all_rows = tuple(self._rows)
        self._numbered = len(self._rows)  # rows that have had a number
        self._prefill_seconds = self._draft_seconds = self._verify_seconds = self._total_seconds = 0.0

    def __iter__(self) -> Iterator[list[RowStep]]:
        return self

    def __next__(self) -> list[RowStep]:
        if not self._rows:
            raise StopIteration
        # Entered here and not in a generator, whose caller would run in inference mode between two steps.
        try:
            with torch.inference_mode():
                return self._step()
        except BaseException:  # the rows may be changed in part
            self._rows = []
            raise

    def join(self, other: "DecodingLoop") -> list[int]:
        """Takes over the rows that another loop still has, and returns their numbers here, which are new. That loop is over.

        Both are past their prefill, have rows left, and decode with one model by the same settings. Limits, stop strings and
        seeds are each row's own: a row goes on with the tokens that it gives alone.
        """
        assert self._newest is not None and other._newest is not None and other._rows
        numbers = list(range(self._numbered, self._numbered + len(other._rows)))
        self._numbered += len(numbers)
        for row, number in zip(other._rows, numbers, strict=True):
            row.number = number
        self._rows = self._rows + other._rows
        self._newest = torch.cat((self._newest, other._newest))
        self._sampler.join(other._sampler)
        with torch.inference_mode():  # which the cache was written in
            self._cache.join(other._cache)
        if self._true_states is not None and other._true_states is not None:
            self._true_states.join(other._true_states)
        self._places = max(self._places, other._places, key=lambda places: places.shape[1])
        other._rows = []
        return numbers

    def drop(self, row: int) -> None:
        """The row with this number is gone after the next step."""
        for kept in self._rows:
            if kept.number == row:
                kept.is_dropped = True

    def counts(self, row: int) -> DecodeStats:
        """The counts of one prompt's steps so far, without seconds. Of the prompts that the loop was made with."""
        return sum(self._all_rows[row].steps, DecodeStats())

    def last_step(self, row: int) -> DecodeStats:
        """The counts of one prompt's last step."""
        return self._all_rows[row].steps[-1]

    @property
    def seconds(self) -> DecodeStats:
        """The seconds of the steps so far, for all rows together. Time between two steps is the caller's and not counted."""
        return DecodeStats(
            prefill_seconds=self._prefill_seconds,
            draft_seconds=self._draft_seconds,
            verify_seconds=self._verify_seconds,
            total_seconds=self._total_seconds,
        )

    def _step(self) -> list[RowStep]:
        started, has_drafts = time.perf_counter(), False
        rows, newest = self._rows, self._newest
        drafter: Drafter | None = None  # where only the target's own token has room, nothing drafts
        if newest is None:
            draft, made = self._prefill()
        else:
            self._drafting.start(started)
            most = [] if self._drafter is None else [min(self._num_draft_tokens, row.scanner.room - 1) for row in rows]
            drafter = self._drafter if max(most, default=0) > 0 else None
            draft = Draft(newest, (0,) * len(rows)) if drafter is None else drafter.draft(self._context(newest, most), most)
            has_drafts = draft.tokens.shape[1] > 1
            if has_drafts:
                self._drafting.stop()
            made = self._depth.verify(draft, self._positions(draft.tokens.shape[1]), self._cache)
        drafts = draft.tokens[:, 1:]
        if made.choices is not None:
            verified, following = accepted_choices(drafts, draft.counts, made.choices)
        else:
            assert made.logits is not None
            verified, following = self._sampler.verify(drafts, draft.counts, draft.probs, made.logits)
        verified_at = time.perf_counter()
        source = draft.source if newest is not None and self._drafter is not None else None
        start = self.reused_tokens
        last = [len(row.ids) - 1 - start for row in rows] if newest is None else [len(ids) - 1 for ids in verified]
        outcomes = zip(rows, draft.counts, verified, strict=True)
        steps = []
        for row, count, ids in outcomes:
            if drafter is not None:
                drafter.observe(Verdict(row.number, count, ids))
            steps.append(self._commit(row, count, ids, source, made.layers))
        self._go_on(following, last)
        if self._prefix is not None:
            row = rows[0]
            self._prefix.keep(row.ids, len(row.ids) - 1 if self._depth.prompt_alike else row.prompt_tokens)
        draft_seconds = self._drafting.seconds if has_drafts else 0.0
        self._draft_seconds += draft_seconds
        if newest is None:
            self._prefill_seconds += verified_at - started
        else:
            self._verify_seconds += verified_at - started - draft_seconds
        self._total_seconds += time.perf_counter() - started
        return steps

    def _prefill(self) -> tuple[Draft, Pass]:
        """An empty draft, and the target's pass over what the cache lacks of the prompts.

        Prompts are padded at their ends. No token sees what padding writes there, and the next tokens overwrite it.
        """
        device, start = self._model.device, self.reused_tokens
        missing = [row.ids[start:] for row in self._rows]
        lengths = [len(ids) for ids in missing]
        longest = max(lengths)
        padded = [ids + [ids[-1]] * (longest - len(ids)) for ids in missing]
        tokens, last = torch.tensor(padded, device=device), torch.tensor(lengths, device=device) - 1
        positions = self._places[:, start : start + longest].expand(len(lengths), -1)
        return Draft(tokens[:, :1], (0,) * len(lengths)), self._depth.prefill(tokens, last, positions, self._cache)

    def _context(self, newest: Tensor, most: list[int]) -> Context:
        rows = self._rows
        features = None if self._true_states is None else self._true_states.features
        positions = self._positions(max(most) + 1)
        return Context([row.number for row in rows], [row.ids for row in rows], newest, positions, self._cache, features)

    def _positions(self, count: int) -> Tensor:
        """(B, count) on the host: where each row's newest token and the tokens after it stand."""
        if len(self._rows) == 1:
            start = len(self._rows[0].ids) - 1
            return self._places[:, start : start + count]
        starts = torch.tensor([len(row.ids) - 1 for row in self._rows])
        # Only padding can stand at the context's last place, where no token is read that is followed by another.
        return (starts[:, None] + self._places[:, :count]).clamp_max(self._cache.max_positions - 1)

    def _commit(self, row: _Row, drafted: int, verified: list[int], source: str | None, layers: int) -> RowStep:
        """Adds a row's verified tokens to its output, up to the first that ends it.

        `source`: Draft's, None of a prefill. `layers`: Pass's.
        """
        count, reason = row.scanner.cut(verified)
        row.ids += verified[:count]
        step = step_counts(drafted, len(verified) - 1, count, source, layers)
        row.steps.append(step)
        tokens = [Token(token, place < step.accepted) for place, token in enumerate(verified[:count])]
        return RowStep(row.number, tokens, reason, step)

    def _go_on(self, newest: Tensor, last: list[int]) -> None:
        """With the rows that are not finished. The next tokens overwrite rejected drafts in the cache.

        `last`: where the token that each row's newest was predicted after stood in the pass.
        """
        staying = [place for place, row in enumerate(self._rows) if row.goes_on]
        if len(staying) < len(self._rows):
            self._rows = [self._rows[place] for place in staying]
            if not staying:
                if self._at_end is not None:
                    self._at_end()
                return
            newest = newest[staying]
            self._sampler.keep_rows(staying)
            self._cache.keep_rows(staying)
        if self._true_states is not None:
            self._true_states.go_on([last[place] for place in staying], staying)
        self._newest = newest


def check_prompt(prompt_ids: list[int], limit: int, what: str = "the prompt") -> None:
    """Raises ConfigError for a prompt that is empty, ContextError for one that leaves no room for a token in a context of
    `limit` tokens. `what`: its name in the error.
    """
    require(bool(prompt_ids), what, "at least 1 token", "none")
    if len(prompt_ids) >= limit:
        raise ContextError(
            f"{what} must be at most {limit - 1} tokens, got {len(prompt_ids)} (the model's context is {limit} tokens)"
        )
