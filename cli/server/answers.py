"""Answers as OpenAI's documents, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any, Protocol

from layerskip_core.decoding import DecodeStats

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """How the answers of one endpoint look."""

    name: str  # of the object; of a chunk with the ending
    chunk_name: str
    prefix: str  # of ids

    def choice(self, text: str) -> dict[str, Any]:
        """A whole answer."""

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        """The next piece of one."""


class CompletionForm:
    name = chunk_name = "text_completion"
    prefix = "cmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}


class ChatForm:
    name, chunk_name = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": text} if text or is_first else {}}


class Document:
    """Makes the document or the chunks of one response."""

    def __init__(self, form: Form, model: str) -> None:
        self._form = form
        self._common = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()

    def whole(self, texts: Iterable[str], reasons: Iterable[str | None], usage: dict[str, Any]) -> dict[str, Any]:
        pairs = enumerate(zip(texts, reasons, strict=True))
        choices = [_choice(number, self._form.choice(text), reason) for number, (text, reason) in pairs]
        return {**self._common, "object": self._form.name, "choices": choices, "usage": usage}

    def chunk(self, number: int, text: str, reason: str | None) -> bytes:
        """A server-sent event with the next piece of the answer with this number."""
        delta = self._form.delta(text, number not in self._begun)
        self._begun.add(number)
        return event({**self._common, "object": self._form.chunk_name, "choices": [_choice(number, delta, reason)]})

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        return event({**self._common, "object": self._form.chunk_name, "choices": [], "usage": usage})


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
