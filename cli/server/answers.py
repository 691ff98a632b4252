"""Documents of answers: completions, conversations and responses, whole and streamed, and
embeddings.
"""

import json
import secrets
import time
from array import array
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from layerskip_core.decoding import DecodeStats
from layerskip_core.decoding.output import TokenLogprobs
from layerskip_core.serving import Embedding, Request, Update

from .bodies import ApiError
from .tools import Call, Calls, deltas

_DONE = b"data: [DONE]\n\n"


class Document:
    """Builds the document or the chunks of one response."""

    def __init__(
        self,
        is_chat: bool,
        model: str,
        jobs: Sequence[Request],
        echoes: Sequence[str],
        calls: Callable[[], Calls],
        include_usage: bool,
    ) -> None:
        """`echoes`: the prompt's text by answer, if answers begin with it. `calls`: makes a finder
        of tool calls.
        """
        self._calls = [calls() for _ in jobs]
        self._is_chat = is_chat
        self._begun = set[int]()
        self._jobs = jobs
        self._echoes = echoes
        self._include_usage = include_usage
        self._ends = [0] * len(jobs)  # by answer, the length of its tokens' text so far
        prefix, self._object = (
            ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        )
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Mapping[int, str]
    ) -> dict[str, Any]:
        """`answers`: complete, by number. `texts`: by id, of tokens with log probabilities."""
        choices = []
        for number, answer in sorted(answers.items()):
            text, calls = self._calls[number].add(answer.text, True)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            content = (
                {"message": message}
                if self._is_chat
                else {"text": self._echo(number) + answer.text}
            )
            choices.append(self._choice(number, content, answer, texts))
        return {**self._common, "object": self._object, "choices": choices, "usage": usage}

    def chunk(self, number: int, update: Update, texts: Mapping[int, str]) -> bytes:
        """Server-sent events with the next piece of an answer."""
        if not self._is_chat:
            contents: list[dict[str, Any]] = [
                {"text": ("" if number in self._begun else self._echo(number)) + update.text}
            ]
        else:
            role = {} if number in self._begun else {"role": "assistant"}
            first = self._calls[number].count
            text, calls = self._calls[number].add(update.text, update.is_last)
            contents = [{"delta": {**role, "content": text} if text or role else {}}]
            contents += [{"delta": {"tool_calls": [delta]}} for delta in deltas(calls, first)]
        # Only the last event has the finish reason and the log probabilities.
        partial = [self._choice(number, content, Update(""), {}) for content in contents[:-1]]
        choice = self._choice(number, contents[-1], update, texts)
        self._begun.add(number)
        return b"".join(self._event([each]) for each in [*partial, choice])

    def end(self, usage: dict[str, Any]) -> bytes:
        """The last events of a stream."""
        return (self._event([], usage=usage) if self._include_usage else b"") + _DONE

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a failed stream."""
        return event(error.document)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else self._object
        return event({**self._common, "object": name, "choices": choices, **more})

    def _echo(self, number: int) -> str:
        return self._echoes[number] if self._echoes else ""

    def _choice(
        self, number: int, content: dict[str, Any], update: Update, texts: Mapping[int, str]
    ) -> dict[str, Any]:
        reason = {"context": "length", "eos": "stop"}.get(
            update.finish_reason or "", update.finish_reason
        )
        if reason == "stop" and self._calls[number].count:
            reason = "tool_calls"
        logprobs = None
        if self._jobs[number].config.logprobs is not None:
            logprobs = (
                chat_logprobs(update, texts)
                if self._is_chat
                else self._of_completion(number, update, texts)
            )
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": reason}

    def _of_completion(
        self, number: int, update: Update, texts: Mapping[int, str]
    ) -> dict[str, list[Any]]:
        """Log probabilities in the completions format; a prompt's first token has none."""
        entries: list[TokenLogprobs | None] = [*update.prompt_logprobs, *update.logprobs]
        tokens = [texts[one.id] for one in (*update.prompt_logprobs, *update.logprobs)]
        job = self._jobs[number]
        if self._echoes and number not in self._begun:
            entries = [None, *entries]
            tokens = [texts[job.ids[0]], *tokens]
        ends = list(accumulate(map(len, tokens), initial=self._ends[number]))
        self._ends[number] = ends[-1]
        # Of tokens with equal text the most probable is listed, but the chosen token always.
        tops = [
            one
            and {
                texts[token]: logprob for token, logprob in (*one.top[::-1], (one.id, one.logprob))
            }
            for one in entries
        ]
        logprobs = [one and one.logprob for one in entries]
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": ends[:-1],
        }


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def usage_of(jobs: Sequence[Request | Embedding], n: int) -> dict[str, Any]:
    """Token counts, for `n` answers per prompt. OpenAI calls drafts predictions."""
    stats = sum((job.stats for job in jobs), DecodeStats())
    prompt_tokens = sum(len(job.ids) for job in jobs[::n])
    drafts = {
        "accepted_prediction_tokens": stats.accepted,
        "rejected_prediction_tokens": stats.drafted - stats.accepted,
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(job.reused for job in jobs[::n]),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {**drafts, "reasoning_tokens": 0, "audio_tokens": 0},
    }


def chat_logprobs(update: Update, texts: Mapping[int, str]) -> dict[str, Any]:
    """Log probabilities in the chat format."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = texts[token]
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }

    content = [
        {**entry(one.id, one.logprob), "top_logprobs": [entry(*top) for top in one.top]}
        for one in update.logprobs
    ]
    return {"content": content, "refusal": None}


class Vectors:
    """Builds OpenAI's document of embeddings."""

    def __init__(self, model: str, as_base64: bool) -> None:
        self._model = model
        self._as_base64 = as_base64

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Mapping[int, str]
    ) -> dict[str, Any]:
        """As `Document.whole`, for updates with vectors."""

        def written(vector: Sequence[float]) -> Any:
            return b64encode(array("f", vector).tobytes()).decode() if self._as_base64 else vector

        vectors = [(number, written(update.vector)) for number, update in sorted(answers.items())]
        data = [
            {"object": "embedding", "index": number, "embedding": vector}
            for number, vector in vectors
        ]
        counts = {key: usage["prompt_tokens"] for key in ("prompt_tokens", "total_tokens")}
        return {"object": "list", "model": self._model, "data": data, "usage": counts}


class ResponseDocument:
    """Builds the document or the events of one response."""

    def __init__(
        self, model: str, job: Request, calls: Callable[[], Calls], body: Mapping[str, Any]
    ) -> None:
        """`calls`: makes a finder of tool calls. `body`: the request's, parts of which a response
        repeats.
        """
        self._calls = calls()
        self._config = job.config
        self._output = list[dict[str, Any]]()
        self._reason = ""
        # Unsent events, and the number of all events
        self._events = list[bytes]()
        self._count = 0
        self._logprobs = list[Any]()  # of tokens whose text is unsent
        asked: dict[str, Any] = {
            "instructions": None,
            "metadata": {},
            "tools": [],
            "tool_choice": "auto",
        }
        asked |= {
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}},
            "max_output_tokens": None,
        }
        self._common = {
            **{
                "id": f"resp_{secrets.token_hex(12)}",
                "object": "response",
                "created_at": int(time.time()),
                "model": model,
            },
            **{key: body.get(key, usual) for key, usual in asked.items()},
            **{
                "temperature": job.config.temperature,
                "top_p": job.config.top_p or 1,
                "truncation": "disabled",
            },
            **{"store": False, "background": False, "previous_response_id": None},
        }

    def whole(
        self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Mapping[int, str]
    ) -> dict[str, Any]:
        """As `Document.whole`."""
        self.chunk(0, answers[0], texts)
        return self._document(usage)

    def chunk(self, number: int, update: Update, texts: Mapping[int, str]) -> bytes:
        """Server-sent events of the next piece of the answer."""
        if not self._count:
            self._tell("response.created", response=self._document())
            self._tell("response.in_progress", response=self._document())
        text, calls = self._calls.add(update.text, update.is_last)
        if self._config.logprobs is not None:
            self._logprobs += chat_logprobs(update, texts)["content"]
        if text or (update.is_last and not (calls or self._output)):
            self._say(text)
        for call in calls:
            self._call(call)
        if update.is_last:
            self._reason = update.finish_reason or ""
            self._end_message("incomplete" if self._is_cut else "completed")
        return self._unsent()

    def end(self, usage: dict[str, Any]) -> bytes:
        """The last event of a stream."""
        self._tell(
            "response.incomplete" if self._is_cut else "response.completed",
            response=self._document(usage),
        )
        return self._unsent()

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a failed stream."""
        failed = {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        self._tell("response.failed", response=self._document() | failed)
        return self._unsent()

    @property
    def _is_cut(self) -> bool:
        return self._reason in ("length", "context")

    @property
    def _place(self) -> dict[str, Any]:
        """The fields that identify the last output item."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _say(self, text: str) -> None:
        """Adds to the open message, or opens one."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            self._add(
                {
                    "type": "message",
                    "id": f"msg_{secrets.token_hex(12)}",
                    "role": "assistant",
                    "content": [],
                }
            )
            part: dict[str, Any] = {
                "type": "output_text",
                "text": "",
                "annotations": [],
                "logprobs": [],
            }
            self._tell("response.content_part.added", **self._place, content_index=0, part=part)
            self._output[-1]["content"].append(part)
        [part] = self._output[-1]["content"]
        part["text"] += text
        part["logprobs"] += (logprobs := self._logprobs)
        self._logprobs = []
        if text:
            self._tell(
                "response.output_text.delta",
                **self._place,
                content_index=0,
                delta=text,
                logprobs=logprobs,
            )

    def _call(self, call: Call) -> None:
        self._end_message("completed")
        function = call["function"]
        item = {"id": f"fc_{secrets.token_hex(12)}", "call_id": call["id"]}
        self._add({"type": "function_call", **item, "name": function["name"], "arguments": ""})
        for kind, key in (("delta", "delta"), ("done", "arguments")):
            self._tell(
                f"response.function_call_arguments.{kind}",
                **self._place,
                **{key: function["arguments"]},
            )
        self._output[-1]["arguments"] = function["arguments"]
        self._end("completed")

    def _end_message(self, status: str) -> None:
        """Ends the open message, if there is one."""
        if self._output and self._output[-1]["status"] == "in_progress":
            [part] = self._output[-1]["content"]
            part["logprobs"] += self._logprobs
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            self._tell("response.output_text.done", **self._place, content_index=0, **text)
            self._tell("response.content_part.done", **self._place, content_index=0, part=part)
            self._end(status)

    def _add(self, item: dict[str, Any]) -> None:
        self._output.append({**item, "status": "in_progress"})
        self._tell(
            "response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1]
        )

    def _end(self, status: str) -> None:
        self._output[-1]["status"] = status
        self._tell(
            "response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1]
        )

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append(
            f"event: {kind}\n".encode()
            + event({"type": kind, "sequence_number": self._count, **fields})
        )
        self._count += 1

    def _unsent(self) -> bytes:
        events = self._events
        self._events = []
        return b"".join(events)

    def _document(self, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response so far; final if `usage` (in the chat format) is given."""
        made = {
            **self._common,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": self._output,
        }
        if usage is None:
            return {**made, "usage": None}
        if self._is_cut:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        counts = {
            f"{of}_tokens": usage[f"{name}_tokens"]
            for of, name in (("input", "prompt"), ("output", "completion"))
        }
        details = {
            "input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]}
        }
        details["output_tokens_details"] = usage["completion_tokens_details"]
        made["status"] = "incomplete" if self._is_cut else "completed"
        return {**made, "usage": {**counts, **details, "total_tokens": usage["total_tokens"]}}
