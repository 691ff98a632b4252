"""What callers send and get: requests, and the updates of their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config.decoding import DecodingConfig
from ..decoding import DecodeStats, StopReason
from ..decoding.output import TokenLogprobs
from ..decoding.row import Row, RowStep
from ..errors import LayerSkipError


class QueueFull(LayerSkipError):
    """The queue has no place for another request."""


class Stopped(LayerSkipError):
    """The thread has stopped; it ends all requests and takes no others."""


class Update(NamedTuple):
    """The next piece of an answer. `finish_reason`, `error` or `vector` is set with the last
    one.
    """

    text: str  # new text to show
    finish_reason: StopReason | None = None
    error: BaseException | None = None
    logprobs: Sequence[TokenLogprobs] = ()  # of new tokens, if requested
    # Of the prompt's tokens after the first, with the first update
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    vector: Sequence[float] = ()  # of an Embedding

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None or bool(self.vector)


@dataclass(eq=False)
class Request:
    """A prompt, how to decode it, and the receiver of its updates."""

    ids: list[int]
    config: DecodingConfig
    deliver: Callable[[Update], None]  # called in the decoding thread; must not raise
    streams: bool = True  # text comes as it is verified; False: all with the last update
    row: Row | None = None  # once the dispatcher has it
    _delivered: int = 0  # tokens of the answer delivered so far

    @property
    def stats(self) -> DecodeStats:
        """Counts so far."""
        return DecodeStats() if self.row is None else sum(self.row.steps, DecodeStats())

    @property
    def reused(self) -> int:
        """Prompt tokens with KV entries from a kept prefix."""
        return 0 if self.row is None else self.row.num_cached_tokens or 0

    def update(self, step: RowStep) -> Update:
        """Adds a step to the answer, and returns its update."""
        if step.failure is not None:
            return Update("", error=step.failure)
        row = step.row
        delivered = self._delivered
        finished = step.finish_reason is not None
        count = len(row.ids) - row.num_prompt_tokens
        # Fewer than delivered: it is decoded once more, after it was preempted
        if count <= delivered or not (self.streams or finished):
            return Update("")
        self._delivered = count
        return Update(
            row.text.add(row.ids[row.num_prompt_tokens + delivered :], finished),
            step.finish_reason,
            row.error,
            row.logprobs[delivered:],
            () if delivered else row.prompt_logprobs,
        )
