"""OpenAI's responses: a conversation, asked for and answered in other documents. Nothing of it is kept for a later request."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from layerskip_core.config.options import checked
from layerskip_core.serving import Request, Update

from .answers import chat_logprobs, event
from .bodies import refuse_unsupported
from .errors import ApiError, invalid
from .tools import Call, Calls

# Parameters of conversations that have another name here.
NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
_STATE: dict[str, Any] = {"store": False, "background": False, "previous_response_id": None, "conversation": None}
_UNSUPPORTED: dict[str, Any] = {"n": 1, "truncation": "disabled", "prompt": None, "max_tool_calls": None}
_LOGPROBS = "message.output_text.logprobs"


class _Body(TypedDict, total=False):
    """Keys that conversations have in another form."""

    instructions: str
    text: Annotated[dict[str, Any], Meta(description="an object with a format")]
    tools: Annotated[list[dict[str, Any]], Meta(description="a list of functions")]
    include: list[str]


def as_conversation(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a conversation that asks for the same. Raises ApiError and ConfigError."""
    refuse_unsupported(body, _STATE, ", which keeps no responses: the input must be the whole conversation")
    refuse_unsupported(body, _UNSUPPORTED)
    given = checked(_Body, {key: body[key] for key in _Body.__annotations__ if key in body})
    text, choice, made = given.get("text", {}), body.get("tool_choice"), dict(body)
    if text.get("verbosity") not in (None, "medium"):
        raise invalid(f"text.verbosity must be medium, got {text['verbosity']!r:.50}", "text.verbosity")
    if form := text.get("format"):
        made["response_format"] = {"type": form.get("type"), "json_schema": form} if isinstance(form, dict) else form
    system = [{"role": "system", "content": given["instructions"]}] if "instructions" in given else []
    made["messages"] = system + _messages(body.get("input"))
    tools = [{key: value for key, value in tool.items() if value is not None} for tool in given.get("tools", [])]
    made["tools"] = [{"type": tool.pop("type", None), "function": tool} for tool in tools]
    if isinstance(choice, dict) and "name" in choice:
        made["tool_choice"] = {"type": choice.get("type"), "function": choice}
    if "max_output_tokens" in body:
        made["max_completion_tokens"] = body["max_output_tokens"]
    if _LOGPROBS in given.get("include", []) or body.get("top_logprobs"):
        made["logprobs"] = True
    return made


def _messages(given: Any) -> list[dict[str, Any]]:
    """Items of an input as messages, whose values are checked as those of a conversation.

    The assistant's message before a call has it; without one it has a message of its own.
    """
    messages: list[dict[str, Any]] = []
    for item in given if isinstance(given, list) else [{"role": "user", "content": given}]:
        match {"type": "message", **item} if isinstance(item, dict) else item:
            case {"type": "message", "role": "system" | "developer" | "user" | "assistant" as role, "content": content}:
                messages.append({"role": role, "content": _content(content)})
            case {"type": "function_call_output", "call_id": call, "output": output}:
                messages.append({"role": "tool", "tool_call_id": call, "content": _content(output)})
            case {"type": "function_call", "call_id": call, "name": name, "arguments": arguments}:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                function = {"name": name, "arguments": arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": call, "function": function})
            case _:
                needed = "a text, or a list of messages with texts, function_call and function_call_output items"
                raise invalid(f"input must be {needed}, got {item!r:.200}", "input")
    return messages


def _content(content: Any) -> Any:
    """Texts of an input and of an output as those of a conversation."""
    parts = content if isinstance(content, list) else []
    if all(isinstance(part, dict) and part.get("type") in ("input_text", "output_text") for part in parts):
        return [{**part, "type": "text"} for part in parts] or content
    raise invalid("input must have contents that are texts, or lists of input_text and output_text parts", "input")


class ResponseDocument:
    """Makes the document or the events of one response."""

    def __init__(self, model: str, job: Request, calls: Callable[[], Calls] | None, body: Mapping[str, Any]) -> None:
        """`calls`: finds calls of tools. `body`: the request's, of which a response says again what was asked for."""
        self._calls = None if calls is None else calls()
        self._config, self._output, self._reason = job.config, list[dict[str, Any]](), ""
        self._events, self._told = list[bytes](), 0  # events that are not sent yet, and the number of all
        self._logprobs = list[Any]()  # of tokens whose text was not said yet
        asked: dict[str, Any] = {"instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto"}
        asked |= {"parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "max_output_tokens": None}
        self._common = {
            **{"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()), "model": model},
            **{key: body.get(key, usual) for key, usual in asked.items()},
            **{"temperature": job.config.temperature, "top_p": job.config.top_p or 1, "truncation": "disabled"},
            **{"store": False, "background": False, "previous_response_id": None},
        }

    def whole(self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Mapping[int, str]) -> dict[str, Any]:
        """As `Document.whole`."""
        self.chunk(0, answers[0], texts)
        return self._document(usage)

    def chunk(self, number: int, update: Update, texts: Mapping[int, str]) -> bytes:
        """Server-sent events of the next piece of the answer."""
        if not self._told:
            self._tell("response.created", response=self._document())
            self._tell("response.in_progress", response=self._document())
        said, calls = (update.text, list[Call]()) if self._calls is None else self._calls.add(update.text, update.is_last)
        if self._config.logprobs is not None:
            self._logprobs += chat_logprobs(update, texts)["content"]
        if said or (update.is_last and not (calls or self._output)):
            self._say(said)
        for call in calls:
            self._call(call)
        if update.is_last:
            self._reason = update.finish_reason or ""
            self._end_message("incomplete" if self._is_cut else "completed")
        return self._unsent()

    def end(self, usage: dict[str, Any]) -> bytes:
        """The last event of a stream."""
        self._tell("response.incomplete" if self._is_cut else "response.completed", response=self._document(usage))
        return self._unsent()

    def failure(self, error: ApiError) -> bytes:
        """Instead of the last event."""
        failed = {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        self._tell("response.failed", response=self._document() | failed)
        return self._unsent()

    @property
    def _is_cut(self) -> bool:
        return self._reason in ("length", "context")

    @property
    def _place(self) -> dict[str, Any]:
        """Of what is said of the last item."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _say(self, said: str) -> None:
        """Adds to the message that is open; opens one if there is none."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            self._add({"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant", "content": []})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._tell("response.content_part.added", **self._place, content_index=0, part=part)
            self._output[-1]["content"].append(part)
        [part] = self._output[-1]["content"]
        part["text"] += said
        part["logprobs"] += (logprobs := self._logprobs)
        self._logprobs = []
        if said:
            self._tell("response.output_text.delta", **self._place, content_index=0, delta=said, logprobs=logprobs)

    def _call(self, call: Call) -> None:
        self._end_message("completed")
        function, item = call["function"], {"id": f"fc_{secrets.token_hex(12)}", "call_id": call["id"]}
        self._add({"type": "function_call", **item, "name": function["name"], "arguments": ""})
        for kind, key in (("delta", "delta"), ("done", "arguments")):
            self._tell(f"response.function_call_arguments.{kind}", **self._place, **{key: function["arguments"]})
        self._output[-1]["arguments"] = function["arguments"]
        self._end("completed")

    def _end_message(self, status: str) -> None:
        """If there is one."""
        if self._output and self._output[-1]["status"] == "in_progress":
            [part] = self._output[-1]["content"]
            part["logprobs"] += self._logprobs
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            self._tell("response.output_text.done", **self._place, content_index=0, **text)
            self._tell("response.content_part.done", **self._place, content_index=0, part=part)
            self._end(status)

    def _add(self, item: dict[str, Any]) -> None:
        self._output.append({**item, "status": "in_progress"})
        self._tell("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])

    def _end(self, status: str) -> None:
        self._output[-1]["status"] = status
        self._tell("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append(f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": self._told, **fields}))
        self._told += 1

    def _unsent(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def _document(self, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response so far, and whole with the usage of its conversation."""
        made = {**self._common, "status": "in_progress", "error": None, "incomplete_details": None, "output": self._output}
        if usage is None:
            return {**made, "usage": None}
        if self._is_cut:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        counts = {f"{of}_tokens": usage[f"{name}_tokens"] for of, name in (("input", "prompt"), ("output", "completion"))}
        details = {"input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]}}
        details["output_tokens_details"] = usage["completion_tokens_details"]
        return {
            **made,
            "status": "incomplete" if self._is_cut else "completed",
            "usage": {**counts, **details, "total_tokens": usage["total_tokens"]},
        }
