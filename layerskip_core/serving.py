"""Continuous batching: many prompts at once, of callers that come and go.

As in Orca (Yu et al., OSDI 2022) requests join the batch that is being decoded and leave it between steps, not between answers.
A request is prefilled, alone or with others of short prompts, and then joins the loop that decodes by the same settings; loops
with different settings take their steps in turn. Between two steps few prompts are prefilled, so that new requests do not hold
up those that are being answered.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from .checkpoint.loaded import Decoder
from .config.decoding import DecodingConfig
from .decoding import DecodeStats, DecodingLoop, StopReason, check_prompt, loop_of
from .decoding.engine import RowStep
from .decoding.output import OutputText
from .errors import LayerSkipError

_PREFILLED = 256  # tokens, padding included, of prompts between two steps, and of those in one pass: so many fill the kernels


class QueueFull(LayerSkipError):
    """As many requests as may wait are waiting."""


class Stopped(LayerSkipError):
    """The engine is stopped, and answers nothing any more."""


class Update(NamedTuple):
    """The next piece of an answer. `finish_reason` or `error` is set with the last one."""

    text: str  # what can be shown now and could not before
    finish_reason: StopReason | None = None
    error: BaseException | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """A prompt, how to decode it, and the receiver of its updates.

    `deliver` is called in the thread that decodes, and must not raise. `isolated`: the request joins no other, so that a
    sampled answer depends on its seed alone. `streams`: the text comes as it is verified, else all of it with the last update.
    `stats`: counts so far.
    """

    ids: list[int]
    config: DecodingConfig
    deliver: Callable[[Update], None]
    isolated: bool = False
    streams: bool = True
    stats: DecodeStats = field(default_factory=DecodeStats)


class _Answer:
    """A request that is being decoded."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        check_prompt(request.ids, decoder.backend.spec.context)
        self.request = request
        request.stats = DecodeStats(sequences=1, prompt_tokens=len(request.ids))
        self._text = OutputText(decoder.detokenize, decoder.ends(request.config.stop), request.config.stop)
        self._ids: list[int] = []  # that no text was made of yet

    def add(self, step: RowStep) -> Update:
        finished = step.finish_reason is not None
        self.request.stats += step.counts
        self._ids += [token.id for token in step.tokens]
        if not (self.request.streams or finished):
            return Update("")
        ids, self._ids = self._ids, []
        return Update(self._text.add(ids, finished), step.finish_reason)


_Group = tuple[DecodingLoop, dict[int, _Answer]]  # a loop, and what it decodes by its rows


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
        return sum(len(answers) for _, answers in self._groups.values())

    @property
    def held(self) -> int:
        """How many requests wait or are being decoded."""
        return len(self._waiting) + self.running

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def cancel(self, request: Request) -> bool:
        """Gives up a request; it gets no further update. Returns False if it is not here any more."""
        if request in self._waiting:
            self._waiting.remove(request)
            return True
        for key, (loop, answers) in self._groups.items():
            for row, answer in answers.items():
                if answer.request is request:
                    loop.drop(row)
                    self._remove(key, row)
                    return True
        return False

    def step(self) -> list[Request]:
        """Takes in requests that wait, and adds a step to every answer. Returns the requests that are finished.

        An exception of a pass ends the requests that were in it, which are told, and no others.
        """
        done: list[Request] = []
        room = _PREFILLED
        while self._waiting and self.running < self._batch_size and (requests := self._next(room)):
            room -= len(requests) * max(len(request.ids) for request in requests)
            done += self._begin(requests)
        for key in list(self._groups):
            done += self._advance(key)
        return done

    def fail_all(self, error: BaseException) -> list[Request]:
        """Ends all requests with an error, and returns them."""
        waiting, groups = list(self._waiting), list(self._groups)
        self._waiting.clear()
        return _failed(waiting, error) + [request for key in groups for request in self._end(key, error)]

    def _next(self, room: int) -> list[Request]:
        """Takes the first request that waits, and those after it that are prefilled with it: `room` tokens, padding included.

        An empty list if this step has no room for it any more. A longer prompt than any step has room for is prefilled alone.
        """
        first = self._waiting[0]
        requests: list[Request] = []
        longest = 0
        while self._waiting and self.running + len(requests) < self._batch_size:
            following = self._waiting[0]
            longest = max(longest, len(following.ids))
            if longest * (len(requests) + 1) > room and (requests or room < _PREFILLED):
                break
            if requests and (self._is_single(first) or self._is_single(following) or _settings(first) != _settings(following)):
                break
            requests.append(self._waiting.popleft())
        return requests

    def _begin(self, requests: list[Request]) -> list[Request]:
        """Prefills requests that differ in their seeds at most, and lets them join the loop with their settings."""
        decoder = self._decoder
        answers: list[_Answer] = []
        done: list[Request] = []
        for request in requests:
            try:
                answers.append(_Answer(decoder, request))
            except LayerSkipError as error:
                done += _failed([request], error)
        if not answers:
            return done
        fitting, first = [answer.request for answer in answers], answers[0].request
        try:
            prompts, seeds = [request.ids for request in fitting], [request.config.seed for request in fitting]
            ends = decoder.ends(first.config.stop)
            loop = loop_of(decoder.backend, prompts, first.config, ends, decoder.detokenize, seeds=seeds)
            updates = [answer.add(step) for answer, step in zip(answers, next(loop), strict=True)]
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            return done + _failed(fitting, error)
        for request, update in zip(fitting, updates, strict=True):
            request.deliver(update)
        done += [request for request, update in zip(fitting, updates, strict=True) if update.is_last]
        staying = {row: answers[row] for row, update in enumerate(updates) if not update.is_last}
        if not staying:
            return done
        # Equal for requests that can share a loop: limits, stop strings and seeds are a row's own.
        key = first if self._is_single(first) else replace(_settings(first), max_new_tokens=1, stop=())
        if key not in self._groups:
            self._groups[key] = loop, staying
            return done
        group, others = self._groups[key]
        try:
            others |= zip(group.join(loop), staying.values(), strict=True)
        except BaseException as error:  # the group's own loop may have been changed in part
            return done + self._end(key, error) + _failed([answer.request for answer in staying.values()], error)
        return done

    def _advance(self, key: Hashable) -> list[Request]:
        loop, answers = self._groups[key]
        try:
            updates = [(step.row, answers[step.row].add(step)) for step in next(loop) if step.row in answers]
        except BaseException as error:
            return self._end(key, error)
        done = []
        for row, update in updates:
            request = answers[row].request
            if update.is_last:
                self._remove(key, row)
                done.append(request)
            request.deliver(update)
        return done

    def _end(self, key: Hashable, error: BaseException) -> list[Request]:
        """Ends the requests of a loop that failed."""
        return _failed([answer.request for answer in self._groups.pop(key)[1].values()], error)

    def _remove(self, key: Hashable, row: int) -> None:
        _, answers = self._groups[key]
        del answers[row]
        if not answers:
            del self._groups[key]

    def _is_single(self, request: Request) -> bool:
        """Whether no other can share its loop."""
        return request.isolated or bool(request.config.exit_confidence) or self._decoder.backend.exact


def _settings(request: Request) -> DecodingConfig:
    """All but the seed."""
    return replace(request.config, seed=0)


def _failed(requests: list[Request], error: BaseException) -> list[Request]:
    """Tells requests that an error has ended them, and returns them."""
    for request in requests:
        request.deliver(Update("", error=error))
    return requests


class Engine:
    """Decodes requests in a thread of its own. `submit`, `cancel` and `stop` are for any thread.

    Attributes:
        held: how many requests wait or are being decoded.
        running: how many of them are being decoded.
        is_stopped: whether it was stopped, or failed: it takes no requests any more.
    """

    def __init__(self, decoder: Decoder, batch_size: int, queue_size: int) -> None:
        """`batch_size`: most requests decoded together. `queue_size`: most requests that wait."""
        self.held = self.running = 0
        self.is_stopped = False
        self._scheduler = Scheduler(decoder, batch_size)
        self._most = batch_size + queue_size
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="layerskip-engine", daemon=True)
        self._thread.start()

    def hold(self, requests: int) -> None:
        """Holds places for requests that will be submitted, before any work is done for them.

        Raises QueueFull if not all of them have one, and Stopped after `stop`.
        """
        with self._lock:
            self._require_running()
            if self.held + requests > self._most:
                raise QueueFull(f"{self.held} requests wait or are being answered, and this server holds {self._most}")
            self.held += requests

    def release(self, requests: int) -> None:
        """Gives up places of requests that will not be submitted."""
        with self._lock:
            self.held -= requests

    def submit(self, *requests: Request) -> None:
        """Takes requests whose places are held. Raises Stopped after `stop`, and takes none then."""
        with self._lock:
            self._require_running()
            for request in requests:
                self._commands.put(partial(self._scheduler.add, request))

    def cancel(self, request: Request) -> None:
        """Gives up a request after the step that is being computed; without effect on one that is finished."""
        self._commands.put(lambda: self.release(int(self._scheduler.cancel(request))))

    def stop(self) -> None:
        """Ends all requests with the error Stopped, and waits for the thread."""
        with self._lock:
            self.is_stopped = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        scheduler, reason = self._scheduler, Stopped("the server is shutting down")
        try:
            while not self.is_stopped:
                self._obey(wait=not scheduler.held)
                self.release(len(scheduler.step()))
                self.running = scheduler.running
        except BaseException:  # a fault of the scheduler: nobody waits for an answer that will not come
            reason = Stopped("the server has failed and must be started again")
            with self._lock:
                self.is_stopped = True
            raise  # the traceback goes to stderr
        finally:
            self._obey(wait=False)
            self.release(len(scheduler.fail_all(reason)))
            self.running = 0

    def _obey(self, wait: bool) -> None:
        """Runs the commands that have come; waits for the first if there is nothing to decode."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            pass

    def _require_running(self) -> None:
        if self.is_stopped:
            raise Stopped("the server answers nothing any more")
