"""Answers on their way to the client: updates of the engine's thread, and OpenAI's documents, whole and in chunks."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect

from layerskip_core.decoding import DecodeStats
from layerskip_core.serving import Request, Update

from ..console import tell_error
from .bodies import api_error

DONE = b"data: [DONE]\n\n"


class Updates:
    """Updates of the engine's thread, as the event loop reads them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()

    def deliver(self, number: int, update: Update) -> None:
        """In the engine's thread; `number` is the answer's."""
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, update))

    def disconnect(self) -> None:
        """The client went away."""
        self._queue.put_nowait(None)

    async def all(self, count: int) -> AsyncIterator[tuple[int, Update]]:
        """Until `count` answers are finished. Raises ClientDisconnect, and ApiError if one of them fails."""
        while count:
            item = await self._queue.get()
            if item is None:
                raise ClientDisconnect
            number, update = item
            if update.error is not None:
                refused = api_error(update.error)
                if refused.status == 500:
                    tell_error(update.error, debug=True)
                raise refused
            count -= update.is_last
            yield number, update


class Document:
    """Makes the document or the chunks of one response."""

    def __init__(self, is_chat: bool, model: str) -> None:
        self._is_chat, self._begun = is_chat, set[int]()
        prefix, self._object = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Mapping[int, Update], usage: dict[str, Any]) -> dict[str, Any]:
        """`answers`: by number, each with all of its text."""
        choices = []
        for number, answer in sorted(answers.items()):
            message = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append(_choice(number, message if self._is_chat else {"text": answer.text}, answer))
        return {**self._common, "object": self._object, "choices": choices, "usage": usage}

    def chunk(self, number: int, update: Update) -> bytes:
        """A server-sent event with the next piece of the answer with this number."""
        content: dict[str, Any] = {"text": update.text}
        if self._is_chat:
            role = {} if number in self._begun else {"role": "assistant"}
            content = {"delta": {**role, "content": update.text} if update.text or role else {}}
        self._begun.add(number)
        return self.event([_choice(number, content, update)])

    def event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else self._object
        return event({**self._common, "object": name, "choices": choices, **more})


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def usage_of(jobs: Sequence[Request], n: int) -> dict[str, Any]:
    """The tokens of `n` answers to each prompt. Drafts are what OpenAI calls predictions."""
    stats, prompt_tokens = sum((job.stats for job in jobs), DecodeStats()), sum(len(job.ids) for job in jobs[::n])
    details = {
        "accepted_prediction_tokens": stats.accepted,
        "rejected_prediction_tokens": stats.drafted - stats.accepted,
        "reasoning_tokens": 0,
        "audio_tokens": 0,
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": prompt_tokens + stats.new_tokens,
        "completion_tokens_details": details,
    }


def _choice(number: int, content: dict[str, Any], update: Update) -> dict[str, Any]:
    reason = {"context": "length", "eos": "stop"}.get(update.finish_reason or "", update.finish_reason)
    return {"index": number, **content, "logprobs": None, "finish_reason": reason}
