"""Answers to requests, one by one or in batches, in order, to standard output."""

import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from layerskip_core.config.decoding import DecodingConfig, DecodingOptions
from layerskip_core.config.options import hints_of
from layerskip_core.errors import LayerSkipError

from .console import narrate
from .requests import Request

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats, StopReason
    from layerskip_core.decoding.dialogue import TextStream
    from layerskip_core.serving import Scheduler, Update

_OPTIONS = re.compile(f"`({'|'.join(hints_of(DecodingOptions))})`")
Resolve = Callable[[Request], DecodingConfig]  # raises LayerSkipError for a request that cannot be decoded


def answer_all(
    loaded: "Decoder", resolve: Resolve, requests: Iterator[Request], lines: bool, jsonl: bool
) -> tuple[bool, "DecodeStats"]:
    """Answers every request in order; returns whether one failed, and the counts of all."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.dialogue import TextStream

    failed, total = False, DecodeStats()
    for request in requests:
        try:
            config = resolve(request)
            answer = TextStream(loaded, request.prompt, config)
            for piece in answer:
                if not jsonl:
                    _write(piece)
        except LayerSkipError as error:
            if not (lines or jsonl):
                raise
            failed = True
            _report(error, request, jsonl)
        else:
            total = total + answer.stats
            if jsonl:
                _write_object(answer, request, config.policy)
        _write("\n")
    return failed, total


def answer_in_batches(
    loaded: "Decoder",
    resolve: Resolve,
    requests: Iterator[Request],
    is_ready: Callable[[], bool],
    batch_size: int,
    jsonl: bool,
) -> tuple[bool, "DecodeStats"]:
    """The same, with up to `batch_size` requests decoded at once: where one is finished, the next takes its place.

    Those with equal settings share passes. `is_ready`: whether the next request can be read without a wait, which would hold up
    those that are being decoded, and never end if whoever writes requests waits for answers.
    """
    from layerskip_core.decoding import DecodeStats

    failed, total = False, DecodeStats()
    for finished, seconds in _decoded(loaded, resolve, requests, is_ready, batch_size):
        total += DecodeStats(total_seconds=seconds)
        for pending in finished:
            if pending.error is not None:
                failed = True
                _report(pending.error, pending.request, jsonl)
            else:
                total += pending.stats
                if jsonl:
                    _write_object(pending, pending.request, pending.policy)
                else:
                    _write(pending.text)
            _write("\n")
    return failed, total


def _decoded(
    loaded: "Decoder", resolve: Resolve, requests: Iterator[Request], is_ready: Callable[[], bool], batch_size: int
) -> Iterator[tuple[list["_Pending"], float]]:
    """By step of the decoding: the requests that are finished and follow those before, and the step's seconds."""
    from layerskip_core.serving import Scheduler

    scheduler, has_more = Scheduler(loaded, batch_size), True
    unanswered: deque[_Pending] = deque()
    while has_more or unanswered:
        while has_more and scheduler.held < batch_size and (not unanswered or is_ready()):
            if (request := next(requests, None)) is None:
                has_more = False
            else:
                unanswered.append(_Pending(loaded, resolve, request, scheduler))
        started, finished = time.perf_counter(), []
        scheduler.step()
        for pending in unanswered:
            pending.raise_if_broken()
        while unanswered and unanswered[0].is_finished:
            finished.append(unanswered.popleft())
        yield finished, time.perf_counter() - started


class _Pending:
    """A request of a batch, and what has become of it."""

    def __init__(self, loaded: "Decoder", resolve: Resolve, request: Request, scheduler: "Scheduler") -> None:
        """Hands it to the scheduler, unless it cannot be decoded."""
        from layerskip_core.serving import Request as Job

        self.request = request
        self.text = ""
        self.finish_reason: StopReason | None = None
        self.error: LayerSkipError | None = None
        self.policy: str | None = None
        self._broken: BaseException | None = None
        self._job: Job | None = None
        try:
            config = resolve(request)
            self.policy = config.policy
            self._job = Job(loaded.encode_prompt(request.prompt), config, self._take, streams=False)
        except LayerSkipError as error:
            self.error = error
        else:
            scheduler.add(self._job)

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    @property
    def stats(self) -> "DecodeStats":
        assert self._job is not None
        return self._job.stats

    def raise_if_broken(self) -> None:
        """Raises what ended the request and is not its own fault, such as Ctrl-C."""
        if self._broken is not None:
            raise self._broken

    def _take(self, update: "Update") -> None:
        self.text, self.finish_reason = self.text + update.text, update.finish_reason
        if isinstance(update.error, LayerSkipError):
            self.error = update.error
        else:
            self._broken = update.error


def _report(error: LayerSkipError, request: Request, jsonl: bool) -> None:
    """Prints an error in place of an answer."""
    message = f"line {request.number}: {error}"
    if jsonl:
        named = _OPTIONS.sub(r"\1", message)  # keys of the row, where other messages show flags
        _write(json.dumps({**request.named, "error": named}, ensure_ascii=False))
    else:
        narrate(f"error: {message}")


def _write_object(answer: "TextStream | _Pending", request: Request, policy: str | None) -> None:
    stats = answer.stats
    document = {
        **request.named,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "policy": policy,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "rounds": stats.rounds,
        "acceptance_rate": round(stats.acceptance_rate, 4),
        "steps_by_drafter": stats.steps_by_drafter,
        "mean_layers": round(stats.mean_layers, 2),
    }
    _write(json.dumps(document, ensure_ascii=False))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
