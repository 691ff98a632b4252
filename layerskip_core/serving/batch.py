"""Answers to any number of prompts, of which a bounded number is decoded together."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import Answer, DecodeStats
from ..decoding.drafters.lookup import EarlierAnswers
from ..errors import LayerSkipError
from .dispatcher import Dispatcher
from .requests import Request, Update

PromptOrError = tuple[list[int], DecodingConfig] | LayerSkipError
"""A prompt's token ids and how to decode it, or why it cannot be decoded."""


@dataclass(eq=False)
class _Pending:
    """A prompt whose answer was not yielded yet."""

    request: Request | None = None
    end: Update | None = None  # its last update, which has all of the text

    def hear(self, update: Update) -> None:
        if update.is_last:
            self.end = update


def answers_to(
    decoder: Decoder,
    prompts: Iterator[PromptOrError],
    batch_size: int,
    earlier: EarlierAnswers | None = None,
    is_ready: Callable[[], bool] = lambda: True,
) -> Iterator[Answer | LayerSkipError]:
    """Yields the answer to each prompt, in order, or the error that it ends with. Other exceptions
    are raised.

    At most `batch_size` prompts are decoded at once; further ones are read as these end. `earlier`:
    as in Dispatcher. `is_ready`: whether the next prompt can be read without waiting. The seconds of
    an answer are those of the steps since the answer before, so that those of all answers add up.
    """
    dispatcher = Dispatcher(decoder, batch_size, earlier)
    pending = deque[_Pending]()
    has_more = True
    seconds = 0.0
    while has_more or pending:
        while has_more and dispatcher.held < batch_size and (not pending or is_ready()):
            prompt = next(prompts, None)
            if prompt is None:
                has_more = False
            else:
                pending.append(_add(dispatcher, prompt))
        started = time.perf_counter()
        ended = dispatcher.step()
        seconds += time.perf_counter() - started
        if ended:
            _raise_others(pending)
        while pending and (end := pending[0].end) is not None:
            request = pending.popleft().request
            if request is None or request.row is None or end.finish_reason is None:
                assert isinstance(end.error, LayerSkipError)
                yield end.error
            else:
                stats = request.stats + DecodeStats(total_seconds=seconds)
                yield request.row.answer(end.text, stats)
                seconds = 0.0


def _add(dispatcher: Dispatcher, prompt: PromptOrError) -> _Pending:
    if isinstance(prompt, LayerSkipError):
        return _Pending(end=Update("", error=prompt))
    ids, config = prompt
    pending = _Pending()
    pending.request = Request(ids, config, pending.hear, streams=False)
    dispatcher.add(pending.request)
    return pending


def _raise_others(pending: Iterable[_Pending]) -> None:
    """Raises an exception that is not of a prompt, such as Ctrl-C."""
    for each in pending:
        error = None if each.end is None else each.end.error
        if error is not None and not isinstance(error, LayerSkipError):
            raise error
