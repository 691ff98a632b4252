"""Answers on their way to the client: updates of the engine's thread, and OpenAI's documents, whole and in chunks."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

from layerskip_core.decoding import DecodeStats
from layerskip_core.serving import Update

from ..failure import tell
from .bodies import api_error

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client went away."""


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
        """Until `count` answers are finished. Raises Gone if the client goes away, ApiError if one of them fails."""
        while count:
            item = await self._queue.get()
            if item is None:
                raise Gone
            number, update = item
            if update.error is not None:
                refused = api_error(update.error)
                if refused.status == 500:
                    tell(update.error, debug=True)
                raise refused
            count -= update.is_last
            yield number, update


class Document:
    """Makes the document or the chunks of one response."""

    def __init__(self, is_chat: bool, model: str) -> None:
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._is_chat = is_chat
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()

    def whole(self, texts: Iterable[str], reasons: Iterable[str | None], usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for number, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(_choice(number, message if self._is_chat else {"text": text}, reason))
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": usage}

    def chunk(self, number: int, text: str, reason: str | None) -> bytes:
        """A server-sent event with the next piece of the answer with this number."""
        content: dict[str, Any] = {"text": text}
        if self._is_chat:
            role = {} if number in self._begun else {"role": "assistant"}
            content = {"delta": {**role, "content": text} if text or role else {}}
        self._begun.add(number)
        return self._event([_choice(number, content, reason)])

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        return self._event([], usage=usage)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return event({**self._common, "object": name, "choices": choices, **more})


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def usage_of(prompt_tokens: int, stats: DecodeStats) -> dict[str, Any]:
    """`prompt_tokens`: of the request's prompts. `stats`: of all its answers. Drafts are what OpenAI calls predictions."""
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


def _choice(number: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    finish_reason = None if reason is None else _REASONS[reason]
    return {"index": number, **content, "logprobs": None, "finish_reason": finish_reason}
