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
    _number: int = field(default_factory=count().__next__)  # the older, the less
    _row: Row | None = None  # once it is being decoded
    _delivered: int = 0  # tokens of the answer that were delivered

    @property
    def stats(self) -> DecodeStats:
        """So far."""
        return DecodeStats() if self._row is None else sum(self._row.steps, DecodeStats())

    def update(self, step: RowStep) -> Update:
        """Adds a step to the answer."""
        finished, row, known = step.finish_reason is not None, step.row, self._delivered
        if not (self.streams or finished):
            return Update("")
        self._delivered = len(row.ids) - row.prompt_tokens
        text = row.text.add(row.ids[row.prompt_tokens + known :], finished)
        return Update(text, step.finish_reason, None, row.logprobs[known:], () if known else row.prompt_logprobs)


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
        self._loops: dict[Hashable, DecodingLoop] = {}  # by the settings that their rows share
        self._decoding: dict[Row, Request] = {}

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return len(self._decoding)

    @property
    def held(self) -> int:
        """How many requests wait or are being decoded, embeddings included."""
        return len(self._waiting) + len(self._embeddings) + self.running

    def add(self, request: Request | Embedding) -> None:
        self._queue(request).append(request)

    def cancel(self, request: Request | Embedding) -> bool:
        """Gives up a request; it gets no further update. Returns False if it is not here any more."""
        if request in (queue := self._queue(request)):
            queue.remove(request)
            return True
        if isinstance(request, Embedding) or (row := request._row) is None:
            return False
        row.is_dropped = True
        found = self._decoding.pop(row, None)
        self._forget_empty()
        return found is not None

    def step(self) -> list[Request | Embedding]:
        """Takes in requests that wait, and adds a step to every answer. Returns the requests that are finished.

        An exception of a pass ends the requests that were in it, which are told, and no others.
        """
        blocked = bool(self._embeddings) and not self._has_room(self._embeddings[0])
        done = self._embed() if self._embeddings and not blocked else []
        while self._waiting and not blocked and self._can_run(self._waiting[0]):
            done += self._take_in()
        room: float = _PREFILLED
        for loop in list(self._loops.values()):
            loop.piece = room
            if self._make_room(loop):
                done += self._advance(loop)
                room = loop.left
        self._forget_empty()
        return done

    def fail_all(self, error: BaseException) -> list[Request | Embedding]:
        """Ends all requests with an error, and returns them."""
        requests: list[Request | Embedding] = [*self._waiting, *self._embeddings, *self._decoding.values()]
        for held in (self._waiting, self._embeddings, self._decoding, self._loops):
            held.clear()
        return _failed(requests, error)

    def _can_run(self, request: Request) -> bool:
        """Whether a request has a place among the others, the next step room for its prompt, and there is memory.

        It waits for the KV entries of a prompt that begins as its own and is being read.
        """
        reading = [row for loop in self._loops.values() for row in loop.active if row.lacks]
        if self.running >= self._batch_size or sum(row.lacks for row in reading) >= _PREFILLED:
            return False
        return not self._prefixes.gain(request.ids, [row.ids for row in reading]) and self._has_room(request)

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

    def _make_room(self, loop: DecodingLoop) -> bool:
        """Memory for a loop's next step: of kept texts, of an embedding that is being read, then of the youngest requests.

        Returns whether it has rows then.
        """
        while loop.active:
            if loop.spare() >= 0:
                return True
            if self._prefixes.drop() or (self._embeddings and self._embeddings[0].give_back()):
                continue
            loops = {row: other for other in self._loops.values() for row in other.active if not row.config.exit_confidence}
            rows = loops.keys() & self._decoding
            if len(rows) < 2:  # then this one cannot go on
                return True
            youngest = max(rows, key=lambda row: self._decoding[row]._number)
            loops[youngest].set_aside(youngest)
            self._waiting.appendleft(self._decoding.pop(youngest))
        return False

    def _advance(self, loop: DecodingLoop) -> list[Request]:
        """A step of a loop. Returns the requests that it ends: all of them if it fails."""
        rows = loop.active
        try:
            steps = next(loop)
            updates = [(step.row, self._decoding[step.row].update(step)) for step in steps if step.row in self._decoding]
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            return _failed(self._taken_out(rows), error)
        done = []
        for row, update in updates:
            request = self._decoding[row]
            if update.is_last:
                done.append(self._decoding.pop(row))
            request.deliver(update)
        return done

    def _taken_out(self, rows: Iterable[Row]) -> list[Request]:
        return [self._decoding.pop(row) for row in rows if row in self._decoding]

    def _take_in(self) -> list[Request]:
        """The next request joins the loop with its settings. Returns the requests that an error ends."""
        request = self._waiting.popleft()
        decoder, config = self._decoder, request.config
        is_single = request.isolated or bool(config.exit_confidence) or decoder.backend.exact
        # Equal for requests that can share a loop. One that needs no logits is not in a loop of others that do.
        key: Hashable = request if is_single else (config.shared, config.changes_logits, config.logprobs is None)
        loop = self._loops.get(key)
        others = [] if loop is None else loop.active
        try:
            ends = decoder.ends_of(config)
            if loop is None:
                options: dict[str, Any] = {"earlier": self._earlier, "prefixes": self._prefixes}
                loop = DecodingLoop(decoder.backend, [], config, ends, decoder.detokenize, **options)
            if (row := request._row) is None:
                row = loop.row(request.ids, config, ends, config.seed)
            loop.add(row)
        except BaseException as error:
            lost = [] if loop is not None and loop.active else others  # the loop is as before, or over
            done = _failed([*self._taken_out(lost), request], error)
            self._forget_empty()
            return done
        if request._row is None:
            request.reused = row.filled
        request._row, self._loops[key], self._decoding[row] = row, loop, request
        return []

    def _forget_empty(self) -> None:
        for key in [key for key, loop in self._loops.items() if self._decoding.keys().isdisjoint(loop.active)]:
            del self._loops[key]


def _failed(requests: Iterable[Held], error: BaseException) -> list[Held]:
    """Tells requests that an error has ended them, and returns them."""
    failed = list(requests)
    for request in failed:
        request.deliver(Update("", error=error))
    return failed
