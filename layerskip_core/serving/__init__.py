"""Continuous batching: many prompts at once, of callers that come and go.

Requests join and leave the running batch between steps (Orca: Yu et al., OSDI 2022). Those with the
same settings share a decoding loop; loops take their steps in turn. Prefill is chunked
(Sarathi-Serve: Agrawal et al., OSDI 2024): passes that verify drafts also run pieces of prompts,
few tokens per step, so new requests do not stall running ones. When KV memory runs out, prefixes
kept for later prompts are dropped first; then the youngest request is preempted, and recomputed
when there is room.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import DecodeStats, DecodingLoop, Prefixes, StopReason, check_prompt
from ..decoding.drafters.lookup import EarlierAnswers
from ..decoding.engine import lock_of
from ..decoding.output import Row, RowStep, TokenLogprobs
from ..decoding.target import NO_PREFIXES
from ..errors import LayerSkipError
from ..model import Backend, KVCache

Held = TypeVar("Held", bound="Request | Embedding")

# Prompt tokens per step, enough to fill the kernels; also an embedding's tokens per pass
_PREFILLED = 256


class QueueFull(LayerSkipError):
    """The queue has no place for another request."""


class Stopped(LayerSkipError):
    """The engine has stopped; it ends all requests and takes no others."""


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
    reused: int = 0  # prompt tokens with KV entries from a kept prefix
    _number: int = field(default_factory=count().__next__)  # in order of arrival
    _row: Row | None = None  # once it is being decoded
    _delivered: int = 0  # tokens of the answer delivered so far

    @property
    def stats(self) -> DecodeStats:
        """Counts so far."""
        return DecodeStats() if self._row is None else sum(self._row.steps, DecodeStats())

    def update(self, step: RowStep) -> Update:
        """Adds a step to the answer, and returns its update."""
        finished = step.finish_reason is not None
        row = step.row
        known = self._delivered
        if not (self.streams or finished):
            return Update("")
        count = len(row.ids) - row.prompt_tokens
        if count <= known:  # decoded once more, after it was preempted
            return Update("")
        self._delivered = count
        text = row.text.add(row.ids[row.prompt_tokens + known :], finished)
        prompt_logprobs = () if known else row.prompt_logprobs
        return Update(text, step.finish_reason, row.error, row.logprobs[known:], prompt_logprobs)


@dataclass(eq=False)
class Embedding:
    """A text to embed: the mean (D,) of its tokens' states after `layers` layers and the final
    norm, scaled to length 1.

    `deliver`: as in Request, called once; with a ContextError if the text does not fit. `stats`:
    tokens so far.
    """

    ids: list[int]
    layers: int
    deliver: Callable[[Update], None]
    stats: DecodeStats = field(default_factory=DecodeStats)
    reused: int = 0
    _cache: KVCache | None = None  # from its first pass on
    _sum: Tensor | float = 0.0  # (D,) of the states so far

    def read(self, backend: Backend) -> Update:
        """Runs a pass over the next `_PREFILLED` tokens. The update of the last pass has the
        vector.
        """
        check_prompt(self.ids, backend, "the input")
        start = self.stats.prompt_tokens
        stop = min(self.stats.prompt_tokens + _PREFILLED, len(self.ids))
        cache = self._cache = self._cache or backend.new_cache(1, len(self.ids))
        with lock_of(backend), torch.inference_mode():
            hidden = backend.embed(torch.tensor(self.ids[start:stop], device=backend.device))
            hidden = backend.run_layers(
                hidden, 0, self.layers, cache.span(start, stop, no_rollback=True)
            )
            self._sum = self._sum + backend.normed(hidden).float().sum(0)
            self.stats = DecodeStats(prompt_tokens=stop)
            if stop < len(self.ids):
                return Update("")
            self._cache = None
            return Update("", vector=F.normalize(self._sum, dim=0).tolist())

    def give_back(self) -> bool:
        """Frees its KV entries, if it has any, and returns whether it had: the text starts again at
        its first token.
        """
        held = self._cache is not None
        self._cache = None
        self._sum = 0.0
        self.stats = DecodeStats()
        return held


class Scheduler:
    """Decodes at most `batch_size` requests at once; others wait in order of arrival. For one
    thread.

    Embeddings do not count towards `batch_size`: each step runs one pass of the oldest.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        earlier: EarlierAnswers | None = None,
        prefixes: Prefixes = NO_PREFIXES,
    ) -> None:
        """`earlier`: answers for the lookups of all requests; each new answer is added.

        `prefixes`: kept KV entries of texts that prompts may begin with; each request's are added.
        """
        self._decoder = decoder
        self._batch_size = batch_size
        self._earlier = earlier
        self._prefixes = prefixes
        self._waiting: deque[Request] = deque()  # preempted ones first, the oldest first
        self._embeddings: deque[Embedding] = deque()
        self._loops: dict[Hashable, DecodingLoop] = {}  # by the settings their rows share
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
        """Cancels a request: it gets no further update. Returns False if it has ended already."""
        queue = self._queue(request)
        if request in queue:
            queue.remove(request)
            if isinstance(request, Embedding):
                request.give_back()
            return True
        row = None if isinstance(request, Embedding) else request._row
        if row is None or row not in self._decoding:
            return False
        del self._decoding[row]
        self._loop_of(row).cancel(row)
        self._forget_empty()
        return True

    def step(self) -> list[Request | Embedding]:
        """Admits waiting requests and takes a step of every loop. Returns the finished requests.

        An exception in a pass ends the requests of this pass, which get it as an update, and no
        others.
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
        requests: list[Request | Embedding] = [
            *self._waiting,
            *self._embeddings,
            *self._decoding.values(),
        ]
        for embedding in self._embeddings:
            embedding.give_back()
        for held in (self._waiting, self._embeddings, self._decoding, self._loops):
            held.clear()
        return _failed(requests, error)

    def _can_run(self, request: Request) -> bool:
        """Whether the batch has a place for a request, the next step room for prompt tokens, and
        memory suffices.

        While a prompt with the same beginning is prefilled, the request waits to share its KV
        entries.
        """
        reading = [row for loop in self._loops.values() for row in loop.active if row.lacks]
        if self.running >= self._batch_size or sum(row.lacks for row in reading) >= _PREFILLED:
            return False
        return not self._prefixes.gain(
            request.ids, [row.ids for row in reading]
        ) and self._has_room(request)

    def _queue(self, request: Request | Embedding) -> deque[Any]:
        return self._embeddings if isinstance(request, Embedding) else self._waiting

    def _embed(self) -> list[Request | Embedding]:
        """A pass of the first embedding. Returns it if that was the last."""
        first = self._embeddings[0]
        try:
            update = first.read(self._decoder.backend)
        except BaseException as error:
            self._embeddings.popleft()
            first.give_back()
            return _failed([first], error)
        if not update.is_last:
            return []
        first.deliver(update)
        return [self._embeddings.popleft()]

    def _has_room(self, request: Request | Embedding) -> bool:
        """Whether there is memory for one more request, after dropping kept prefixes if need be;
        True if none is running.
        """
        cache = self._decoder.backend.new_cache()
        row = None if isinstance(request, Embedding) else request._row
        stops = [1 + len(request.ids if row is None else row.ids)]
        while cache.free_pages(stops) < self.running and self._prefixes.drop(self._decoder.backend):
            pass
        return not self.running or cache.free_pages(stops) >= self.running

    def _make_room(self, loop: DecodingLoop) -> bool:
        """Frees memory for a loop's next step: kept prefixes, an unfinished embedding's, then the
        youngest requests'.

        Returns whether the loop still has rows.
        """
        while loop.active and loop.spare() < 0:
            if self._prefixes.drop(self._decoder.backend):
                continue
            if self._embeddings and self._embeddings[0].give_back():
                continue
            if self.running == 1:  # nothing left to preempt: the step raises the error
                break
            self._preempt(max(self._decoding.values(), key=lambda request: request._number))
        return bool(loop.active)

    def _preempt(self, request: Request) -> None:
        """Takes the memory of a request that is being decoded; it goes on when there is room."""
        row = request._row
        assert row is not None
        del self._decoding[row]
        self._loop_of(row).set_aside(row)
        self._waiting.appendleft(request)

    def _loop_of(self, row: Row) -> DecodingLoop:
        return next(loop for loop in self._loops.values() if row in loop.active)

    def _advance(self, loop: DecodingLoop) -> list[Request]:
        """A step of a loop. Returns the requests that it ends: all of them if it fails."""
        rows = loop.active
        try:
            steps = next(loop)
            updates = [(step.row, self._decoding[step.row].update(step)) for step in steps]
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            loop.end()
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
        """The next request joins the loop with its settings. Returns the requests that an error
        ends.
        """
        request = self._waiting.popleft()
        decoder = self._decoder
        config = request.config
        is_single = bool(config.exit_confidence) or decoder.backend.exact
        # Equal for requests that can share a loop. Those that need logits do not join those that
        # need none.
        key: Hashable = (
            request
            if is_single
            else (config.shared, config.changes_logits, config.logprobs is None)
        )
        loop = self._loops.get(key)
        others = [] if loop is None else loop.active
        try:
            ends = decoder.ends_of(config)
            if loop is None:
                options: dict[str, Any] = {"earlier": self._earlier, "prefixes": self._prefixes}
                loop = DecodingLoop(
                    decoder.backend, [], config, ends, decoder.detokenize, **options
                )
            row = request._row
            if row is None or config.exit_confidence:
                row = loop.row(request.ids, config, ends, config.seed)
                # An exit by confidence writes other KV entries than a prefill: the answer is
                # decoded once more.
                if request._row is not None:
                    row.text = request._row.text
            loop.add(row)
        except BaseException as error:
            # A loop that lost its rows is over
            lost = [] if loop is not None and loop.active else others
            done = _failed([*self._taken_out(lost), request], error)
            self._forget_empty()
            return done
        if request._row is None:
            request.reused = row.filled
        request._row = row
        self._loops[key] = loop
        self._decoding[row] = request
        return []

    def _forget_empty(self) -> None:
        self._loops = {key: loop for key, loop in self._loops.items() if loop.active}


def _failed(requests: Iterable[Held], error: BaseException) -> list[Held]:
    """Delivers an error to requests, as their last update, and returns them."""
    failed = list(requests)
    # Their variables hold KV entries, for as long as a client holds the error
    clear_frames(error.__traceback__)
    for request in failed:
        request.deliver(Update("", error=error))
    return failed
