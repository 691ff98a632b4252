"""Continuous batching: many prompts at once, of callers that come and go.

As in Orca (Yu et al., OSDI 2022) requests join the batch that is being decoded and leave it between steps, not between answers.
Those with the same settings share a loop; loops with different settings take their steps in turn. In the passes that verify
drafts run pieces of prompts too, few tokens in a step (Agrawal et al., Sarathi-Serve, OSDI 2024), so that new requests do not
hold up those that are being answered. Where memory for keys and values runs out, texts that are kept for later prompts go
first; then the youngest request waits, and its text runs again when there is room.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import DecodeStats, DecodingLoop, Prefixes, StopReason, check_prompt
from ..decoding.drafters.lookup import EarlierAnswers
from ..decoding.output import Row, RowStep, TokenLogprobs
from ..decoding.target import NO_PREFIXES
from ..errors import LayerSkipError
from ..model import Backend, KVCache

Held = TypeVar("Held", bound="Request | Embedding")

_PREFILLED = 256  # tokens of prompts in a step, which fill the kernels; as many of an embedding


class QueueFull(LayerSkipError):
    """As many requests as may wait are waiting."""


class Stopped(LayerSkipError):
    """The engine is stopped, and answers nothing any more."""


class Update(NamedTuple):
    """The next piece of an answer. `finish_reason`, `error` or `vector` is set with the last one."""

    text: str  # what can be shown now and could not before
    finish_reason: StopReason | None = None
    error: BaseException | None = None
    logprobs: Sequence[TokenLogprobs] = ()  # of new tokens, if they were asked for
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of the prompt's tokens after the first, with the first update
    vector: Sequence[float] = ()  # of an Embedding

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None or bool(self.vector)


@dataclass(eq=False)
class Request:
    """A prompt, how to decode it, and the receiver of its updates."""

    ids: list[int]
    config: DecodingConfig
    deliver: Callable[[Update], None]  # is called in the thread that decodes, and must not raise
    isolated: bool = False  # joins no other, so that a sampled answer depends on its seed alone
    streams: bool = True  # the text comes as it is verified, else all of it with the last update
    reused: int = 0  # the prompt's first tokens that needed no pass
    _number: int = 0  # the older, the less
    _row: Row | None = None  # once it is being decoded
    _told: int = 0  # tokens of the answer that were delivered

    @property
    def stats(self) -> DecodeStats:
        """So far."""
        return DecodeStats() if self._row is None else sum(self._row.steps, DecodeStats())

    def update(self, step: RowStep) -> Update:
        """Adds a step to the answer."""
        finished, row, told = step.finish_reason is not None, step.row, self._told
        if not (self.streams or finished):
            return Update("")
        self._told = len(row.ids) - row.prompt_tokens
        text = row.text.add(row.ids[row.prompt_tokens + told :], finished)
        return Update(text, step.finish_reason, None, row.logprobs[told:], () if told else row.prompt_logprobs)


@dataclass(eq=False)
class Embedding:
    """A text whose vector (D,) is the mean of its tokens' states after `layers` layers and the final norm, of length 1.

    `deliver` is as in Request, for one update: an error is a ContextError for a text that does not fit. `stats`: tokens so far.
    """

    ids: list[int]
    layers: int
    deliver: Callable[[Update], None]
    stats: DecodeStats = field(default_factory=DecodeStats)
    reused: int = 0
    _cache: KVCache | None = None  # once it is being read
    _sum: Tensor | float = 0.0  # (D,) of the states so far

    def read(self, backend: Backend) -> Update:
        """A pass over the next `_PREFILLED` tokens. The last one has the vector."""
        check_prompt(self.ids, backend, "the input")
        start, stop = self.stats.prompt_tokens, min(self.stats.prompt_tokens + _PREFILLED, len(self.ids))
        cache = self._cache = self._cache or backend.new_cache(1, len(self.ids))
        with torch.inference_mode():
            hidden = backend.embed(torch.tensor(self.ids[start:stop], device=backend.device))
            hidden = backend.run_layers(hidden, 0, self.layers, cache.span(start, stop, settled=True))
            self._sum = self._sum + backend.normed(hidden).float().sum(0)
            self.stats = DecodeStats(prompt_tokens=stop)
            if stop < len(self.ids):
                return Update("")
            self._cache = None
            return Update("", vector=F.normalize(self._sum, dim=0).tolist())

    def give_back(self) -> bool:
        """Its memory, if it has any: the text is read again from its beginning."""
        held, self._cache, self._sum, self.stats = self._cache is not None, None, 0.0, DecodeStats()
        return held


@dataclass(eq=False)
class _Run:
    """A loop, and its requests by row."""

    loop: DecodingLoop
    rows: dict[Row, Request]

    def advance(self) -> list[Request]:
        """A step. The requests that it ends leave `rows` and are returned: all of them if it fails."""
        try:
            steps = next(self.loop)
            updates = [(step.row, self.rows[step.row].update(step)) for step in steps if step.row in self.rows]
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            return self.fail(error)
        done = []
        for row, update in updates:
            request = self.rows[row]
            if update.is_last:
                done.append(self.rows.pop(row))
            request.deliver(update)
        return done

    def fail(self, error: BaseException) -> list[Request]:
        failed, self.rows = self.rows, {}
        return _failed(failed.values(), error)


class Scheduler:
    """Decodes at most `batch_size` requests at once; the others wait in the order in which they came. For one thread.

    Embeddings need no place among them: each step has one pass of the first one that waits.
    """

    def __init__(
        self, decoder: Decoder, batch_size: int, earlier: EarlierAnswers | None = None, prefixes: Prefixes = NO_PREFIXES
    ) -> None:
        """`earlier`: answers that lookups of every request search too; each answer is added to them.

        `prefixes`: KV entries of texts that prompts may begin with; those of each request are added.
        """
        self._decoder, self._batch_size, self._earlier, self._prefixes = decoder, batch_size, earlier, prefixes
        self._waiting: deque[Request] = deque()  # first those that were set aside, the oldest first
        self._embeddings: deque[Embedding] = deque()
        self._groups: dict[Hashable, _Run] = {}  # by the settings that they share
        self._numbers = count()

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return sum(len(run.rows) for run in self._groups.values())

    @property
    def held(self) -> int:
        """How many requests wait or are being decoded, embeddings included."""
        return len(self._waiting) + len(self._embeddings) + self.running

    def add(self, request: Request | Embedding) -> None:
        if isinstance(request, Request):
            request._number = next(self._numbers)
        self._queue(request).append(request)

    def cancel(self, request: Request | Embedding) -> bool:
        """Gives up a request; it gets no further update. Returns False if it is not here any more."""
        if request in (queue := self._queue(request)):
            queue.remove(request)
            return True
        row = None if isinstance(request, Embedding) else request._row
        found = row is not None and any(run.rows.pop(row, None) for run in self._groups.values())
        if row is not None:
            row.is_dropped = True
        self._forget_empty()
        return found

    def step(self) -> list[Request | Embedding]:
        """Takes in requests that wait, and adds a step to every answer. Returns the requests that are finished.

        An exception of a pass ends the requests that were in it, which are told, and no others.
        """
        blocked = bool(self._embeddings) and not self._has_room(self._embeddings[0])
        done = self._embed() if self._embeddings and not blocked else []
        while self._waiting and not blocked and self._takes_more and self._has_room(self._waiting[0]):
            done += self._take_in()
        room: float = _PREFILLED
        for run in list(self._groups.values()):
            run.loop.piece = room
            if self._make_room(run):
                done += run.advance()
                room = run.loop.left
        self._forget_empty()
        return done

    def fail_all(self, error: BaseException) -> list[Request | Embedding]:
        """Ends all requests with an error, and returns them."""
        decoding = (request for run in self._groups.values() for request in run.rows.values())
        requests: list[Request | Embedding] = [*self._waiting, *self._embeddings, *decoding]
        for held in (self._waiting, self._embeddings, self._groups):
            held.clear()
        return _failed(requests, error)

    @property
    def _takes_more(self) -> bool:
        """Whether fewer requests run than may, and the next step has room for another's prompt."""
        pending = sum(row.lacks for run in self._groups.values() for row in run.loop.active)
        return pending < _PREFILLED and self.running < self._batch_size

    def _queue(self, request: Request | Embedding) -> deque[Any]:
        return self._embeddings if isinstance(request, Embedding) else self._waiting

    def _embed(self) -> list[Request | Embedding]:
        """A pass of the first embedding. Returns it if that was the last."""
        first = self._embeddings[0]
        try:
            update = first.read(self._decoder.backend)
        except BaseException as error:
            update = Update("", error=error)
        if not update.is_last:
            return []
        first.deliver(update)
        return [self._embeddings.popleft()]

    def _has_room(self, request: Request | Embedding) -> bool:
        """Whether there is memory for a request beside the others, or no other. Kept texts go for it."""
        cache, row = self._decoder.backend.new_cache(), None if isinstance(request, Embedding) else request._row
        stops = [1 + len(request.ids if row is None else row.ids)]
        while cache.spare(stops) < self.running and self._prefixes.drop():
            pass
        return not self.running or cache.spare(stops) >= self.running

    def _make_room(self, run: _Run) -> bool:
        """Memory for a run's next step: of kept texts, of an embedding that is being read, then of the youngest requests.

        Returns whether it has rows then.
        """
        while run.rows:
            if run.loop.spare() >= 0:
                return True
            if self._prefixes.drop() or (self._embeddings and self._embeddings[0].give_back()):
                continue
            others = [(row, other) for other in self._groups.values() if other.loop.can_wait for row in other.rows]
            if len(others) < 2:  # then this one cannot go on
                return True
            row, youngest = max(others, key=lambda other: other[1].rows[other[0]]._number)
            youngest.loop.set_aside(row)
            self._waiting.appendleft(youngest.rows.pop(row))
        return False

    def _take_in(self) -> list[Request]:
        """The next request joins the loop with its settings. Returns the requests that an error ends."""
        request = self._waiting.popleft()
        decoder, config, run = self._decoder, request.config, None
        is_single = request.isolated or bool(config.exit_confidence) or decoder.backend.exact
        # Equal for requests that can share a loop. One that needs no logits is not in a loop of others that do.
        key: Hashable = request if is_single else (config.shared, config.changes_logits, config.logprobs is None)
        try:
            if (run := self._groups.get(key)) is None:
                options: dict[str, Any] = {"earlier": self._earlier, "prefixes": self._prefixes}
                ends = decoder.ends_of(config)
                run = _Run(DecodingLoop(decoder.backend, [], config, ends, decoder.detokenize, **options), {})
            if (row := request._row) is None:
                row = run.loop.row(request.ids, config, decoder.ends_of(config), config.seed)
            run.loop.add(row)
        except BaseException as error:
            if run is None or run.loop.active:  # which is as before
                return _failed([request], error)
            self._groups.pop(key, None)
            return [*run.fail(error), *_failed([request], error)]
        if request._row is None:
            request.reused = row.filled
        request._row, self._groups[key], run.rows[row] = row, run, request
        return []

    def _forget_empty(self) -> None:
        for key in [key for key, run in self._groups.items() if not run.rows]:
            del self._groups[key]


def _failed(requests: Iterable[Held], error: BaseException) -> list[Held]:
    """Tells requests that an error has ended them, and returns them."""
    failed = list(requests)
    for request in failed:
        request.deliver(Update("", error=error))
    return failed
