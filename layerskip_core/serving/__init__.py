"""Many prompts at once, of callers that come and go: requests become rows of the scheduler, and the
rows' steps become updates for the callers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import DecodeStats, Prefixes, Scheduler, StopReason, check_prompt, new_row
from ..decoding.drafters.lookup import EarlierAnswers
from ..decoding.engine import lock_of
from ..decoding.output import TokenLogprobs
from ..decoding.row import Row, RowStep
from ..errors import LayerSkipError
from ..model import Backend, KVCache

# Prompt tokens per step, enough to fill the kernels; also an embedding's tokens per pass
_PREFILL_TOKENS = 256


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
        count = len(row.ids) - row.prompt_tokens
        # Fewer than delivered: it is decoded once more, after it was preempted
        if count <= delivered or not (self.streams or finished):
            return Update("")
        self._delivered = count
        return Update(
            row.text.add(row.ids[row.prompt_tokens + delivered :], finished),
            step.finish_reason,
            row.error,
            row.logprobs[delivered:],
            () if delivered else row.prompt_logprobs,
        )


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
        """Runs a pass over the next `_PREFILL_TOKENS` tokens. The update of the last pass has the
        vector.
        """
        check_prompt(self.ids, backend, "the input")
        start = self.stats.prompt_tokens
        stop = min(self.stats.prompt_tokens + _PREFILL_TOKENS, len(self.ids))
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


class Dispatcher:
    """Decodes at most `batch_size` requests at once; others wait in order of arrival. For one
    thread.

    Embeddings do not count towards `batch_size`: each step runs one pass of the oldest.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        earlier: EarlierAnswers | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`earlier`: answers for the lookups of all requests; each new answer is added.

        `prefixes`: kept KV entries of texts that prompts may begin with; each request's are added.
        """
        self._decoder = decoder
        self._scheduler = Scheduler(
            decoder.backend,
            max_rows=batch_size,
            max_prefill_tokens=_PREFILL_TOKENS,
            prefixes=prefixes,
            earlier=earlier,
            free_elsewhere=self._free_embedding,
        )
        self._requests: dict[Row, Request] = {}  # of the scheduler's rows
        self._embeddings: deque[Embedding] = deque()
        # Requests that ended before a step: their prompts do not fit
        self._refused: list[Request | Embedding] = []

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return len(self._scheduler.running)

    @property
    def held(self) -> int:
        """How many requests wait, are being decoded or ended since the last step, embeddings
        included.
        """
        return len(self._requests) + len(self._embeddings) + len(self._refused)

    def add(self, request: Request | Embedding) -> None:
        if isinstance(request, Embedding):
            self._embeddings.append(request)
            return
        decoder = self._decoder
        config = request.config
        ends = decoder.ends_of(config)
        try:
            row = new_row(decoder.backend, request.ids, config, ends, decoder.detokenize)
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            self._refused += _failed([request], error)
            return
        request.row = row
        self._requests[row] = request
        self._scheduler.add(row)

    def cancel(self, request: Request | Embedding) -> bool:
        """Cancels a request: it gets no further update. Returns False if it has ended already."""
        if isinstance(request, Embedding):
            if request not in self._embeddings:
                return False
            self._embeddings.remove(request)
            request.give_back()
            return True
        if request.row is None or request.row not in self._requests:
            return False
        del self._requests[request.row]
        return self._scheduler.remove(request.row)

    def step(self) -> list[Request | Embedding]:
        """A pass of the oldest embedding, and a step of all rows. Returns the finished requests.

        An exception in a pass ends the requests of this pass, which get it as an update, and no
        others.
        """
        ended = self._refused
        self._refused = []
        # Until an embedding has memory for its text, no request may take it
        is_blocked = False
        if self._embeddings:
            is_blocked = not self._scheduler.has_free_pages(len(self._embeddings[0].ids))
            if not is_blocked:
                ended += self._embed()
        for step in self._scheduler.step(admits=not is_blocked):
            ended += self._deliver(step)
        return ended

    def fail_all(self, error: BaseException) -> list[Request | Embedding]:
        """Ends all requests with an error, and returns them."""
        requests: list[Request | Embedding] = [*self._requests.values(), *self._embeddings]
        for embedding in self._embeddings:
            embedding.give_back()
        self._scheduler.clear()
        self._requests.clear()
        self._embeddings.clear()
        ended = [*self._refused, *_failed(requests, error)]
        self._refused = []
        return ended

    def _deliver(self, step: RowStep) -> list[Request | Embedding]:
        """Delivers the step of a row to its request. Returns the request if that was its last."""
        request = self._requests[step.row]
        try:
            update = request.update(step)
        except BaseException as error:  # a panic of the tokenizers library
            self._scheduler.remove(step.row)
            update = Update("", error=error)
        if not update.is_last:
            request.deliver(update)
            return []
        del self._requests[step.row]
        request.deliver(update)
        return [request]

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

    def _free_embedding(self) -> bool:
        """Frees the memory of an unfinished embedding. Returns False if there is none."""
        return bool(self._embeddings) and self._embeddings[0].give_back()


def _failed(
    requests: Iterable[Request | Embedding], error: BaseException
) -> list[Request | Embedding]:
    """Delivers an error to requests, as their last update, and returns them."""
    failed = list(requests)
    # Their variables hold KV entries, for as long as a client holds the error
    clear_frames(error.__traceback__)
    for request in failed:
        request.deliver(Update("", error=error))
    return failed
