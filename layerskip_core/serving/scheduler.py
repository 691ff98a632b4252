"""Continuous batching: requests join the batch that is being decoded, and leave it when they are finished or given up.

As in Orca (Yu et al., OSDI 2022) the batch changes between steps, not between answers. A request is prefilled alone and then
joins the loop that decodes by the same settings; loops with different settings take their steps in turn.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding.loop import DecodingLoop, RowStep
from ..decoding.stats import DecodeStats
from ..decoding.stopping import StopReason
from ..decoding.strategies import loop_of
from ..decoding.text import ShownText


class Update(NamedTuple):
    """What a step made of a request. `finish_reason` or `error` is set with the last one."""

    text: str  # what can be shown now and could not before
    finish_reason: StopReason | None = None
    error: BaseException | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """A prompt, how to decode it, and who is told of its answer, in the thread that decodes; `deliver` must not raise.

    `alone`: it joins no other request, so that a sampled answer depends on its seed alone. `stats`: counts so far.
    """

    ids: list[int]
    config: DecodingConfig
    deliver: Callable[[Update], None]
    alone: bool = False
    stats: DecodeStats = field(default_factory=DecodeStats)


class _Group:
    """The requests that one loop decodes, by their rows."""

    def __init__(self, loop: DecodingLoop) -> None:
        self.loop = loop
        self.answers: dict[int, _Answer] = {}


class _Answer:
    """A request that is being decoded."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self.request = request
        request.stats = DecodeStats(sequences=1, prompt_tokens=len(request.ids))
        self._shown = ShownText(decoder, request.config)

    def add(self, step: RowStep) -> Update:
        request, finished = self.request, step.finish_reason is not None
        request.stats += step.counts
        return Update(self._shown.add([token.id for token in step.tokens], finished), step.finish_reason)


class Scheduler:
    """Decodes at most `batch_size` requests at once; the others wait in the order in which they came. For one thread."""

    def __init__(self, decoder: Decoder, batch_size: int) -> None:
        self._decoder = decoder
        self._batch_size = batch_size
        self._waiting: deque[Request] = deque()
        self._groups: dict[Hashable, _Group] = {}

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return sum(len(group.answers) for group in self._groups.values())

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._groups

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def cancel(self, request: Request) -> bool:
        """Gives up a request; it gets no further update. Returns False if it is not here any more."""
        if request in self._waiting:
            self._waiting.remove(request)
            return True
        for key, group in self._groups.items():
            for row, answer in group.answers.items():
                if answer.request is request:
                    group.loop.drop(row)
                    self._remove(key, group, row)
                    return True
        return False

    def step(self) -> list[Request]:
        """Takes in requests that wait, and adds a step to every answer. Returns the requests that are finished.

        An exception of a pass ends the requests that were in it, which are told, and no others.
        """
        done: list[Request] = []
        while self._waiting and self.running < self._batch_size:
            done += self._begin(self._waiting.popleft())
        for key, group in list(self._groups.items()):
            done += self._advance(key, group)
        return done

    def fail_all(self, error: BaseException) -> list[Request]:
        """Ends all requests with an error, and returns them."""
        left = [*self._waiting, *(answer.request for group in self._groups.values() for answer in group.answers.values())]
        self._waiting.clear()
        self._groups.clear()
        return [_failed(request, error) for request in left]

    def _begin(self, request: Request) -> list[Request]:
        """Prefills a request, then lets it join the loop with its settings."""
        decoder, answer = self._decoder, _Answer(self._decoder, request)
        try:
            loop = loop_of(decoder.backend, [request.ids], request.config, decoder.eos_ids, decoder.detokenize)
            (step,) = next(loop)
            update = answer.add(step)
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            return [_failed(request, error)]
        if not update.is_last:
            key = self._key(request)
            group = self._groups.get(key)
            if group is None:
                self._groups[key] = group = _Group(loop)
                row = step.row
            else:
                (row,) = group.loop.join(loop)
            group.answers[row] = answer
        request.deliver(update)
        return [request] if update.is_last else []

    def _advance(self, key: Hashable, group: _Group) -> list[Request]:
        try:
            updates = [(step.row, group.answers[step.row].add(step)) for step in next(group.loop) if step.row in group.answers]
        except BaseException as error:
            del self._groups[key]
            return [_failed(answer.request, error) for answer in group.answers.values()]
        done = []
        for row, update in updates:
            request = group.answers[row].request
            if update.is_last:
                self._remove(key, group, row)
                done.append(request)
            request.deliver(update)
        return done

    def _remove(self, key: Hashable, group: _Group, row: int) -> None:
        del group.answers[row]
        if not group.answers:
            del self._groups[key]

    def _key(self, request: Request) -> Hashable:
        """Equal for requests that can share a loop. Limits, stop strings and seeds are a row's own."""
        config = request.config
        if request.alone or config.exit_confidence or self._decoder.backend.exact:
            return request
        sampling = replace(config.sampling, seed=0)
        return replace(config, max_new_tokens=1, stop=(), sampling=sampling)


def _failed(request: Request, error: BaseException) -> Request:
    request.deliver(Update("", error=error))
    return request
