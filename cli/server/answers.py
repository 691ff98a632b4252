"""Documents of answers, whole and as server-sent events: completions, chat, responses,
embeddings.

A document has `whole`, which takes the last update of every answer, and (but for embeddings)
`chunk`, `end` and `failure`, the events of a stream. `texts` are those of tokens with log
probabilities, by id.
"""

import json
import secrets
import time
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from layerskip_core.decoding import DecodeStats
from layerskip_core.serving import Embedding, Request, Update

from .bodies import ApiError
from .tools import Call, Calls, deltas

Texts = Mapping[int, str]
_REASONS = {"context": "length", "eos": "stop"}  # OpenAI's names of finish reasons


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


class CompletionChoice:
    """An answer as a choice of `/v1/completions`."""

    def __init__(self, number: int, job: Request, echo: str | None) -> None:
        """`echo`: the prompt's text, if the answer begins with it."""
        self._number = number
        self._job = job
        self._echo = echo
        self._length = 0  # of the text of the tokens so far

    def whole(self, update: Update, texts: Texts) -> dict[str, Any]:
        logprobs = None
        if self._job.config.logprobs is not None:
            logprobs = self._logprobs(update, texts)
        choice = {
            "index": self._number,
            "text": (self._echo or "") + update.text,
            "logprobs": logprobs,
            "finish_reason": _REASONS.get(update.finish_reason or "", update.finish_reason),
        }
        self._echo = None  # once, with the first piece
        return choice

    def deltas(self, update: Update, texts: Texts) -> list[dict[str, Any]]:
        return [self.whole(update, texts)]

    def _logprobs(self, update: Update, texts: Texts) -> dict[str, list[Any]]:
        tokens = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if self._echo is not None:  # nothing predicts a prompt's first token
            tokens.append(texts[self._job.ids[0]])
            logprobs.append(None)
            tops.append(None)
        for one in (*update.prompt_logprobs, *update.logprobs):
            tokens.append(texts[one.id])
            logprobs.append(one.logprob)
            # Of tokens with equal text the most probable is listed, but the chosen token always.
            ascending = (*one.top[::-1], (one.id, one.logprob))
            tops.append({texts[token]: logprob for token, logprob in ascending})
        *offsets, self._length = accumulate(map(len, tokens), initial=self._length)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatChoice:
    """An answer as a choice of `/v1/chat/completions`."""

    def __init__(self, number: int, job: Request, calls: Calls) -> None:
        self._number = number
        self._has_logprobs = job.config.logprobs is not None
        self._calls = calls
        self._has_begun = False

    def whole(self, answer: Update, texts: Texts) -> dict[str, Any]:
        text, calls = self._calls.add(answer.text, True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = calls
        return self._choice({"message": message}, answer, texts)

    def deltas(self, update: Update, texts: Texts) -> list[dict[str, Any]]:
        first_call = self._calls.count
        text, calls = self._calls.add(update.text, update.is_last)
        delta: dict[str, Any] = {}
        if not self._has_begun:
            delta["role"] = "assistant"
        if text or not self._has_begun:
            delta["content"] = text
        self._has_begun = True
        parts = [delta, *({"tool_calls": [call]} for call in deltas(calls, first_call))]
        # Only the last one has the finish reason and the log probabilities.
        choices = [self._choice({"delta": part}, Update(""), {}) for part in parts[:-1]]
        return [*choices, self._choice({"delta": parts[-1]}, update, texts)]

    def _choice(self, content: dict[str, Any], update: Update, texts: Texts) -> dict[str, Any]:
        reason = _REASONS.get(update.finish_reason or "", update.finish_reason)
        if reason == "stop" and self._calls.count:
            reason = "tool_calls"
        logprobs = None
        if self._has_logprobs:
            logprobs = {"content": _token_logprobs(update, texts), "refusal": None}
        return {"index": self._number, **content, "logprobs": logprobs, "finish_reason": reason}


class Document:
    """A document of choices, or its chunks."""

    def __init__(
        self,
        model: str,
        choices: Sequence[CompletionChoice] | Sequence[ChatChoice],
        include_usage: bool,
    ) -> None:
        self._choices = choices
        self._include_usage = include_usage
        is_chat = isinstance(choices[0], ChatChoice)
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._object = "chat.completion" if is_chat else "text_completion"
        self._chunk_object = "chat.completion.chunk" if is_chat else "text_completion"

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Texts
    ) -> dict[str, Any]:
        choices = [
            self._choices[number].whole(answers[number], texts) for number in sorted(answers)
        ]
        return {**self._common, "object": self._object, "choices": choices, "usage": usage}

    def chunk(self, number: int, update: Update, texts: Texts) -> bytes:
        choices = self._choices[number].deltas(update, texts)
        return b"".join(self._event([choice]) for choice in choices)

    def end(self, usage: dict[str, Any]) -> bytes:
        last = b"data: [DONE]\n\n"
        return self._event([], usage=usage) + last if self._include_usage else last

    def failure(self, error: ApiError) -> bytes:
        return event(error.document)

    def _event(self, choices: list[dict[str, Any]], **usage: Any) -> bytes:
        return event({**self._common, "object": self._chunk_object, "choices": choices, **usage})


def usage_of(jobs: Sequence[Request | Embedding], n: int) -> dict[str, Any]:
    """Token counts, for `n` answers per prompt. OpenAI calls drafts predictions."""
    stats = sum((job.stats for job in jobs), DecodeStats())
    prompt_tokens = sum(len(job.ids) for job in jobs[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in jobs[::n])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
            "reasoning_tokens": 0,
        },
    }


def _token_logprobs(update: Update, texts: Texts) -> list[dict[str, Any]]:
    """Log probabilities as in chat and responses."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = texts[token]
        is_whole = "\ufffd" not in text  # else the token is a part of a character
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if is_whole else None,
        }

    entries = []
    for one in update.logprobs:
        top = [entry(token, logprob) for token, logprob in one.top]
        entries.append({**entry(one.id, one.logprob), "top_logprobs": top})
    return entries


class EmbeddingDocument:
    """OpenAI's document of embeddings."""

    def __init__(self, model: str, as_base64: bool) -> None:
        self._model = model
        self._as_base64 = as_base64

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Texts
    ) -> dict[str, Any]:
        data = []
        for number, update in sorted(answers.items()):
            vector: Any = update.vector
            if self._as_base64:
                vector = b64encode(array("f", vector).tobytes()).decode()
            data.append({"object": "embedding", "index": number, "embedding": vector})
        counts = {key: usage["prompt_tokens"] for key in ("prompt_tokens", "total_tokens")}
        return {"object": "list", "model": self._model, "data": data, "usage": counts}


class ResponseDocument:
    """The document or the events of one response.

    A streamed answer opens an item for text (a message with one part) and closes it before a call
    or at the end; each call is an item that is opened and closed at once.
    """

    def __init__(self, model: str, job: Request, calls: Calls, body: Mapping[str, Any]) -> None:
        """`body`: the request's, parts of which a response repeats."""
        self._calls = calls
        self._config = job.config
        self._output: list[dict[str, Any]] = []
        self._is_cut = False  # by a limit
        self._unsent: list[bytes] = []
        self._num_events = 0
        self._unsent_logprobs: list[Any] = []  # of tokens whose text is still held back
        self._common = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata", {}),
            "tools": body.get("tools", []),
            "tool_choice": body.get("tool_choice", "auto"),
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "text": body.get("text", {"format": {"type": "text"}}),
            "max_output_tokens": body.get("max_output_tokens"),
            "temperature": job.config.temperature,
            "top_p": job.config.top_p,
            "truncation": "disabled",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Texts
    ) -> dict[str, Any]:
        self.chunk(0, answers[0], texts)
        return self._final(usage)

    def chunk(self, number: int, update: Update, texts: Texts) -> bytes:
        if not self._num_events:
            self._add_event("response.created", response=self._document())
            self._add_event("response.in_progress", response=self._document())
        text, calls = self._calls.add(update.text, update.is_last)
        if self._config.logprobs is not None:
            self._unsent_logprobs += _token_logprobs(update, texts)
        is_empty_answer = update.is_last and not (calls or self._output)
        if text or is_empty_answer:
            self._add_text(text)
        for call in calls:
            self._add_call(call)
        if update.is_last:
            self._is_cut = update.finish_reason in ("length", "context")
            self._close_message("incomplete" if self._is_cut else "completed")
        return self._take_events()

    def end(self, usage: dict[str, Any]) -> bytes:
        final = self._final(usage)
        self._add_event(f"response.{final['status']}", response=final)
        return self._take_events()

    def failure(self, error: ApiError) -> bytes:
        failed = {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        self._add_event("response.failed", response=self._document() | failed)
        return self._take_events()

    def _add_text(self, text: str) -> None:
        """Adds to the open message, or opens one."""
        if not self._has_open_message():
            message = {"type": "message", "role": "assistant", "content": []}
            self._open_item({"id": f"msg_{secrets.token_hex(12)}", **message})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._add_item_event("response.content_part.added", content_index=0, part=part)
            self._output[-1]["content"].append(part)
        part = self._output[-1]["content"][0]
        logprobs = self._unsent_logprobs
        self._unsent_logprobs = []
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            self._add_item_event(
                "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
            )

    def _close_message(self, status: str) -> None:
        """Closes the open message, if there is one."""
        if self._has_open_message():
            part = self._output[-1]["content"][0]
            part["logprobs"] += self._unsent_logprobs
            self._add_item_event(
                "response.output_text.done",
                content_index=0,
                text=part["text"],
                logprobs=part["logprobs"],
            )
            self._add_item_event("response.content_part.done", content_index=0, part=part)
            self._close_item(status)

    def _add_call(self, call: Call) -> None:
        self._close_message("completed")
        arguments = call["function"]["arguments"]
        item = {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(12)}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": "",
        }
        self._open_item(item)
        self._add_item_event("response.function_call_arguments.delta", delta=arguments)
        self._add_item_event("response.function_call_arguments.done", arguments=arguments)
        self._output[-1]["arguments"] = arguments
        self._close_item("completed")

    def _has_open_message(self) -> bool:
        return bool(self._output) and self._output[-1]["status"] == "in_progress"

    def _open_item(self, item: dict[str, Any]) -> None:
        self._output.append({**item, "status": "in_progress"})
        index = len(self._output) - 1
        self._add_event("response.output_item.added", output_index=index, item=self._output[-1])

    def _close_item(self, status: str) -> None:
        self._output[-1]["status"] = status
        index = len(self._output) - 1
        self._add_event("response.output_item.done", output_index=index, item=self._output[-1])

    def _add_item_event(self, kind: str, **fields: Any) -> None:
        """An event of the last output item."""
        index = len(self._output) - 1
        self._add_event(kind, item_id=self._output[-1]["id"], output_index=index, **fields)

    def _add_event(self, kind: str, **fields: Any) -> None:
        # Written at once: the documents in `fields` still change.
        document = event({"type": kind, "sequence_number": self._num_events, **fields})
        self._unsent.append(f"event: {kind}\n".encode() + document)
        self._num_events += 1

    def _take_events(self) -> bytes:
        events = b"".join(self._unsent)
        self._unsent.clear()
        return events

    def _document(self) -> dict[str, Any]:
        """The response so far."""
        return {
            **self._common,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": self._output,
            "usage": None,
        }

    def _final(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response. `usage`: in the chat format."""
        document = self._document()
        document["status"] = "incomplete" if self._is_cut else "completed"
        if self._is_cut:
            document["incomplete_details"] = {"reason": "max_output_tokens"}
        document["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens_details": usage["completion_tokens_details"],
        }
        return document
