"""A row: one prompt that is being decoded."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..config.decoding import UNLIMITED, DecodingConfig
from ..errors import LayerSkipError
from .output import (
    Answer,
    DecodeStats,
    Detokenize,
    OutputText,
    StopReason,
    StopScanner,
    TokenLogprobs,
    logprobs_of,
    step_counts,
)
from .processing import LogitsProcessor


class RowStep(NamedTuple):
    """The result of one step for one row."""

    row: "Row"
    ids: list[int]  # the new tokens, accepted drafts first
    finish_reason: StopReason | None  # set with the output's last tokens
    counts: DecodeStats  # of the step
    # The step failed, and ended the row. No StopReason: the caller decides what becomes of it
    failure: BaseException | None = None


_arrivals = itertools.count()


class Row:
    """One prompt that is being decoded: its tokens, where they end, and how they are chosen."""

    def __init__(
        self,
        prompt: Sequence[int],
        config: DecodingConfig,
        *,
        eos_ids: frozenset[int] = frozenset(),
        seed: int | None = None,
        context_length: int = UNLIMITED,
        detokenize: Detokenize | None = None,
    ) -> None:
        """`seed`: of sampling, instead of the config's. `context_length`: most tokens with the
        output. `detokenize`: ids to text, for `text` and stop strings.
        """
        self.config = config
        self.seed = config.seed if seed is None else seed
        self.eos_ids = eos_ids
        self.arrival = next(_arrivals)  # the row that arrived last is preempted first
        self.num_prompt_tokens = len(prompt)
        # How many of them had KV entries in a kept prefix; None until the row joins a batch
        self.num_cached_tokens: int | None = None
        # The caller adds the output, at its own pace; so the scanner of stop strings, which must see
        # each token at once, has a text of its own
        self.text = OutputText(detokenize or (lambda ids: ""), eos_ids, config.stop)
        self._context_length = context_length
        self._detokenize = detokenize
        self._reset(prompt)

    def _reset(self, prompt: Sequence[int]) -> None:
        config = self.config
        self.ids = list(prompt)  # and the output
        # How many of its tokens have KV entries; the newest has none yet
        self.num_computed_tokens = 0
        # Length of a prefix shared with kept texts. A chunk of the prefill ends there, and is kept:
        # a cache of windows or recurrent states cannot be cut there later
        self.branch_point = 0
        context_left = self._context_length - len(prompt)
        self.scanner = StopScanner(
            self.eos_ids, config.stop, config.max_new_tokens, context_left, self._detokenize
        )
        self.processor: LogitsProcessor | None = None
        if config.changes_logits:
            self.processor = LogitsProcessor(config, self.ids, len(prompt), self.eos_ids)
        # Counts by step; most are one shared object (`step_counts`), a sum per step would cost more
        self.steps = [DecodeStats(sequences=1, prompt_tokens=len(prompt))]
        self.error: LayerSkipError | None = None  # why the output does not match its grammar
        self.logprobs: list[TokenLogprobs] = []  # of the output, if they were asked for
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's tokens after the first

    def restart(self) -> None:
        """Drops the output, which is decoded once more. `text` keeps what was shown."""
        self._reset(self.ids[: self.num_prompt_tokens])

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many tokens are still to be prefilled: of the prompt, or of a row that was
        preempted. The newest token of an output is none of them: it runs with the drafts.
        """
        end = len(self.ids) - 1 if self.has_output else len(self.ids)
        return end - self.num_computed_tokens

    @property
    def has_output(self) -> bool:
        return len(self.ids) > self.num_prompt_tokens

    @property
    def uses_prefixes(self) -> bool:
        """Whether it may start from a kept prefix, and is kept as one; not if it needs logits of
        its whole prompt.
        """
        return not self.config.prompt_logprobs

    @property
    def output(self) -> list[int]:
        """The new tokens so far."""
        return self.ids[self.num_prompt_tokens :]

    def answer(self, text: str, stats: DecodeStats) -> Answer:
        """The whole answer, once the output has ended."""
        assert self.scanner.reason is not None
        return Answer(
            text,
            self.scanner.reason,
            stats,
            self.output,
            self.logprobs,
            self.prompt_logprobs,
            self.error,
        )

    def commit(
        self,
        verified: list[int],
        drafts: int,
        source: str | None,
        layers: int,
        logits: Tensor | None,
    ) -> RowStep:
        """Adds verified tokens to the output, up to the first that ends it: accepted ones of the
        `drafts` of a `source`, then one of the target's own, chosen after so many `layers`.

        `logits` (T, V): the target's for these tokens, if it returned any.
        """
        count, reason = self.scanner.cut(verified)
        self.ids += verified[:count]
        if reason == "eos" and self.processor is not None:
            mismatch = self.processor.mismatch
            if mismatch is not None:
                self.error = LayerSkipError(mismatch)
                reason = self.scanner.reason = "error"
        step = step_counts(drafts, len(verified) - 1, count, source, layers)
        self.steps.append(step)
        if self.config.logprobs is not None and logits is not None:
            self.logprobs += logprobs_of(logits[:count], verified[:count], self.config.logprobs)
        return RowStep(self, verified[:count], reason, step)
