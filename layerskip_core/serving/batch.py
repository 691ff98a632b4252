"""Answers to any number of prompts, of which a bounded number is decoded together."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import Answer, DecodeStats
from ..decoding.drafters.lookup import EarlierAnswers
from ..errors import LayerSkipError
from .dispatcher import Dispatcher
from .requests import Request, Update

PromptOrError = tuple[list[int], DecodingConfig] | LayerSkipError
"""A prompt's token ids and how to decode it, or why it cannot be decoded."""


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
    unanswered = deque[tuple[Request | None, list[Update]]]()
    heard = dict[Request, list[Update]]()
    has_more = True
    seconds = 0.0
    index = 0
    while has_more or unanswered:
        while has_more and dispatcher.held < batch_size and (not unanswered or is_ready()):
            prompt = next(prompts, None)
            if prompt is None:
                has_more = False
                break
            updates = list[Update]()
            request = None
            if isinstance(prompt, LayerSkipError):
                updates.append(Update("", error=prompt))
            else:
                ids, config = prompt
                request = Request(ids, config, updates.append, streams=False)
                heard[request] = updates
                dispatcher.add(request)
            unanswered.append((request, updates))
        started = time.perf_counter()
        ended = dispatcher.step()
        seconds += time.perf_counter() - started
        for each in ended:
            assert isinstance(each, Request)
            fault = heard.pop(each)[-1].error
            if fault is not None and not isinstance(fault, LayerSkipError):
                raise fault  # not of this prompt, such as Ctrl-C
        while unanswered and unanswered[0][1] and unanswered[0][1][-1].is_last:
            request, updates = unanswered.popleft()
            end = updates[-1]
            if isinstance(end.error, LayerSkipError) and end.finish_reason is None:
                yield end.error
            else:
                assert request is not None
                yield _answer(request, end, seconds, index)
                seconds = 0.0
            index += 1


def _answer(request: Request, end: Update, seconds: float, index: int) -> Answer:
    """The whole answer. `end`: its last update, which has all of the text."""
    row = request.row
    assert row is not None and end.finish_reason is not None
    stats = request.stats + DecodeStats(total_seconds=seconds)
    return Answer(
        end.text,
        end.finish_reason,
        stats,
        row.output,
        index,
        row.logprobs,
        row.prompt_logprobs,
        row.error,
    )
