"""OpenAI's documents: a request's body is read (prompts and options), answers and errors are written, whole and in chunks."""

import asyncio
import json
import re
import secrets
import time
from array import array
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast

import msgspec
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect

from layerskip_core.config.decoding import MAX_NEW_TOKENS, RequestOptions, changed
from layerskip_core.config.options import checked
from layerskip_core.decoding import DecodeStats
from layerskip_core.decoding.output import TokenLogprobs
from layerskip_core.errors import ConfigError, ContextError, DataError, LayerSkipError
from layerskip_core.files import parse_json
from layerskip_core.serving import QueueFull, Request, Stopped, Update

from ..console import tell_error
from .tools import Call, Calls, Tool, Tools, deltas

DONE = b"data: [DONE]\n\n"
_SEEDS = 2**32
_MOST_ANSWERS = 128
_MOST_STOPS, _LONGEST_STOP = 16, 256  # each is searched for at every token, in the thread that decodes for all
# Options that have another name in the API.
_NAMES = {"max_new_tokens": "max_tokens", "schema": "response_format"} | {
    name: f"guided_{name}" for name in ("regex", "grammar", "choice")
}
# Keys that would change the answer and that this server does not know, with the value that changes nothing.
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("best_of", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("include_stop_str_in_output", "use_beam_search"), False),
    **{key: [] for key in ("bad_words", "functions")},
    **{"suffix": "", "modalities": ["text"]},
}

_ONLY_ELSEWHERE: dict[bool, dict[str, Any]] = {  # for conversations, and for completions
    True: {"echo": False},
    False: {"top_logprobs": 0, "tools": []},
}
# The RequestOptions that a body names as they are.
_OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("logit_bias", "min_tokens", "ignore_eos", "stop_token_ids"),
)

Prompt = str | list[int] | tuple[dict[str, Any], ...]
"""A text, token ids, or the messages of a conversation, as chat templates read them."""
_Stop = Annotated[str, Meta(min_length=1, max_length=_LONGEST_STOP)]
_Ids = Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]


class _Part(Struct):
    type: Literal["text"]
    text: str


class _Called(Struct):
    name: str
    arguments: str


class _ToolCall(Struct):
    function: _Called
    id: str = ""


class _Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates read it: arguments of calls are objects."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.content is None and not self.tool_calls:
            raise invalid(f"messages must have a content, but for an assistant's with tool_calls; {self.role}", "messages")
        if self.tool_calls:
            made["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
                for call in self.tool_calls
                for arguments in [parse_json(call.function.arguments or "{}", "messages: arguments of a call", DataError)]
            ]
        return made | {key: value for key in ("tool_call_id", "name") if (value := getattr(self, key)) is not None}


class _Body(TypedDict, total=False):
    """Keys beside the prompt and the RequestOptions; null is the same as nothing."""

    model: str
    seed: int
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Meta(max_length=_MOST_STOPS)],
        Meta(description=f"at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters"),
    ]
    n: int
    stream: bool
    stream_options: Annotated[dict[str, bool | None], Meta(description="an object, such as include_usage: true")]
    echo: bool
    logprobs: Annotated[bool | int, Meta(description="true or false in a conversation, a number in 0..20 for completions")]
    top_logprobs: Annotated[int, Meta(ge=0, le=20)]
    parallel_tool_calls: bool


class Texts(NamedTuple):
    """What is encoded or embedded, but not answered. `as_base64`: how vectors are written."""

    prompts: tuple[Prompt, ...]
    as_base64: bool = False


def texts(body: bytes, key: str, model: str) -> Texts:
    """Of a body that has the texts under this key, or one conversation under `messages` unless the key is `input`."""
    document = _document(body)
    given = document.get("encoding_format", "float")
    if given not in ("float", "base64"):
        raise invalid(f"encoding_format must be float or base64, got {given!r:.50}", "encoding_format")
    if "dimensions" in document:
        raise invalid("dimensions is not supported by this server", "dimensions", "unsupported_parameter")
    _require_model(document.get("model", model), model)
    if key == "prompt" and "messages" in document:
        return Texts(_conversation(document["messages"]))
    prompts = _prompts(document.get(key), key)
    if len(prompts) > (_MOST_ANSWERS if key == "input" else 1):
        raise invalid(f"{key} must be at most {_MOST_ANSWERS if key == 'input' else 1} texts, got {len(prompts)}", key)
    return Texts(prompts, given == "base64")


def vectors(model: str, found: Sequence[list[float]], as_base64: bool, tokens: int) -> dict[str, Any]:
    """OpenAI's document of embeddings."""

    def written(vector: list[float]) -> Any:
        return b64encode(array("f", vector).tobytes()).decode() if as_base64 else vector

    data = [{"object": "embedding", "index": place, "embedding": written(vector)} for place, vector in enumerate(found)]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class Asked(NamedTuple):
    """One request. Each prompt has `n` answers, each with options of its own."""

    prompts: tuple[Prompt, ...]
    options: list[RequestOptions]  # they differ in their seeds
    n: int
    is_seeded: bool  # the request names a seed
    stream: bool
    include_usage: bool
    echo: bool
    tools: Tools | None  # of a conversation


def asked(body: bytes, is_chat: bool, model: str, flags: RequestOptions, token_limit: int) -> Asked:
    """What a body asks the model of this name for; `flags` are for what it does not say.

    Raises ApiError, and ConfigError for an option outside its range.
    """
    document = _document(body)
    unsupported = _UNSUPPORTED | _ONLY_ELSEWHERE[is_chat]
    for key in document.keys() & unsupported.keys():
        value, harmless = document[key], unsupported[key]
        if value != harmless or isinstance(value, bool) != isinstance(harmless, bool):
            raise invalid(f"{key} is not supported by this server", key, "unsupported_parameter")
    prompts = _conversation(document.get("messages")) if is_chat else _prompts(document.get("prompt"))
    given = checked(_Body, {key: document[key] for key in _Body.__annotations__ if key in document})
    if "model" not in given:
        raise invalid(f"model is missing; this server has {model}", "model")
    _require_model(given["model"], model)
    n = given.get("n", 1)
    if not 1 <= n * len(prompts) <= _MOST_ANSWERS:
        raise invalid(f"n times the number of prompts must be in 1..{_MOST_ANSWERS}, got {n * len(prompts)}", "n")
    options = {name: document[name] for name in _OPTIONS if name in document}
    usual = flags.get("max_new_tokens") or min(token_limit, MAX_NEW_TOKENS)
    options["max_new_tokens"] = document.get("max_completion_tokens", document.get("max_tokens", usual))
    options |= _logprobs(given, is_chat) | _guide(document)
    decoding = cast(RequestOptions, checked(RequestOptions, options))
    if (limit := decoding["max_new_tokens"]) > token_limit:
        raise invalid(f"max_tokens must be at most {token_limit}, the limit of this server, got {limit}", "max_tokens")
    seeds: Iterable[int] = (secrets.randbelow(_SEEDS) for _ in range(n * len(prompts)))
    if "seed" in given:
        seeds = ((given["seed"] + number) % _SEEDS for number in range(n * len(prompts)))
    of_answers: list[RequestOptions] = [{**changed(flags, decoding), "seed": seed} for seed in seeds]
    include_usage = bool(given.get("stream_options", {}).get("include_usage"))
    shown = (
        include_usage,
        given.get("echo", False),
        _tools(document, given.get("parallel_tool_calls", True)) if is_chat else None,
    )
    return Asked(prompts, of_answers, n, "seed" in given, given.get("stream", False), *shown)


def _tools(document: Mapping[str, Any], parallel: bool) -> Tools | None:
    """The tools of a request that may be called."""
    try:
        known = msgspec.convert(document.get("tools", []), tuple[Tool, ...])
    except msgspec.ValidationError as error:
        raise invalid(f"tools must be a list of functions with their names and parameters: {error}", "tools") from None
    choice, needed = document.get("tool_choice", "auto"), known
    match choice:
        case "none" | "auto":
            needed = ()
        case {"type": "function", "function": {"name": str(name)}}:
            needed = tuple(tool for tool in known if tool.function.name == name)
        case _ if choice != "required":
            raise invalid("tool_choice must be none, auto, required, or a function's name in an object", "tool_choice")
    if choice not in ("none", "auto") and not needed:
        raise invalid("tool_choice must be used with tools, and name one of them", "tool_choice")
    return Tools(known, document["tools"], needed, parallel and isinstance(choice, str)) if known and choice != "none" else None


def _guide(document: Mapping[str, Any]) -> dict[str, Any]:
    """The option that says what the answer must match. `strict` or not, it does."""
    made = {name: document[f"guided_{name}"] for name in ("regex", "grammar", "choice") if f"guided_{name}" in document}
    if "guided_json" in document:
        given = document["guided_json"]
        made["schema"] = parse_json(given, "guided_json", DataError) if isinstance(given, str) else given
    match document.get("response_format"):
        case None | {"type": "text"}:
            pass
        case _ if "schema" in made:
            raise invalid("response_format and guided_json must not be given both", "response_format")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            made["schema"] = schema
        case {"type": "json_object"}:
            made["schema"] = {"type": "object"}
        case _:
            needed = "response_format must be of the type text, json_object, or json_schema with a json_schema.schema"
            raise invalid(needed, "response_format")
    return made


def _logprobs(given: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The options that ask for log probabilities. A conversation says whether, and how many in `top_logprobs`."""
    wanted = given.get("logprobs")
    if wanted is not None and isinstance(wanted, bool) != is_chat:
        raise invalid(f"logprobs must be {'true or false' if is_chat else 'a number in 0..20'}, got {wanted}", "logprobs")
    if not is_chat:
        return {} if wanted is None else {"logprobs": wanted, "prompt_logprobs": given.get("echo", False)}
    if given.get("top_logprobs") and not wanted:
        raise invalid("top_logprobs must be used with logprobs: true", "top_logprobs")
    return {"logprobs": given.get("top_logprobs", 0)} if wanted else {}


def _document(body: bytes) -> dict[str, Any]:
    """A body without its nulls. Raises ApiError for one that is no object."""
    try:
        document = parse_json(body, "the body", DataError)
    except DataError as error:
        raise invalid(str(error)) from None
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    return {key: value for key, value in document.items() if value is not None}


def _require_model(named: Any, model: str) -> None:
    if named != model:
        message = f"the model {named!r:.200} does not exist; this server has {model}"
        raise invalid(message, "model", "model_not_found", 404)


def _conversation(messages: Any) -> tuple[Prompt, ...]:
    try:
        turns = msgspec.convert(messages, Annotated[list[_Message], Meta(min_length=1)])
    except msgspec.ValidationError as error:
        raise invalid(f"messages must be a list of messages with a role and a text: {error}", "messages") from None
    return (tuple(message.plain for message in turns),)


def _prompts(prompt: Any, key: str = "prompt") -> tuple[Prompt, ...]:
    """One prompt or several, each a text or token ids."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    try:
        return tuple(msgspec.convert(one, str | _Ids) for one in (prompt if several else [prompt]))
    except msgspec.ValidationError:
        raise invalid(f"{key} must be a text, a list of token ids, or a list of several of these", key) from None


class ApiError(Exception):
    """A request that is refused or fails, with the status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.document: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The client's fault."""
    return ApiError(status, message, "invalid_request_error", param, code)


def api_error(error: BaseException) -> ApiError:
    """The response for an exception. An unexpected one says only that the server failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "rate_limit_error", code="queue_full")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "server_error", code="shutting_down")
    if isinstance(error, ConfigError):
        param = None if error.field is None else _NAMES.get(error.field, error.field)
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return invalid(_named(str(error)), param, code)
    if isinstance(error, LayerSkipError):
        return invalid(_named(str(error)))
    return ApiError(500, "the server failed to answer this request; its log says why", "server_error")


def _named(message: str) -> str:
    """A message of the core, with the API's names of the settings in it."""
    return re.sub(r"`(\w+)`", lambda match: _NAMES.get(match[1], match[1]), message)


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

    def __init__(
        self, is_chat: bool, model: str, jobs: Sequence[Request], echoes: Sequence[str], calls: Callable[[], Calls] | None
    ) -> None:
        """`echoes`: by answer, the text of its prompt if the answer begins with it. `calls`: finds calls of tools in one."""
        self._calls = None if calls is None else [calls() for _ in jobs]
        self._is_chat, self._begun, self._jobs, self._echoes = is_chat, set[int](), jobs, echoes
        self._ends = [0] * len(jobs)  # of the text of each answer's tokens, so far
        prefix, self._object = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Mapping[int, Update], usage: dict[str, Any], texts: Mapping[int, str]) -> dict[str, Any]:
        """`answers`: by number, each with all of its text. `texts`: of tokens whose log probabilities are told."""
        choices = []
        for number, answer in sorted(answers.items()):
            said, calls = (answer.text, []) if self._calls is None else self._calls[number].add(answer.text, True)
            message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
            if calls:
                message |= {"content": said or None, "tool_calls": calls}
            content = {"message": message} if self._is_chat else {"text": self._echo(number) + answer.text}
            choices.append(self._choice(number, content, answer, texts))
        return {**self._common, "object": self._object, "choices": choices, "usage": usage}

    def chunk(self, number: int, update: Update, texts: Mapping[int, str]) -> bytes:
        """Server-sent events with the next piece of the answer with this number."""
        if not self._is_chat:
            contents: list[dict[str, Any]] = [{"text": ("" if number in self._begun else self._echo(number)) + update.text}]
        else:
            role = {} if number in self._begun else {"role": "assistant"}
            said, first, calls = update.text, 0, list[Call]()
            if self._calls is not None:
                first = self._calls[number].count
                said, calls = self._calls[number].add(update.text, update.is_last)
            contents = [{"delta": {**role, "content": said} if said or role else {}}]
            contents += [{"delta": {"tool_calls": [delta]}} for delta in deltas(calls, first)]
        # The last one says why the answer ended; log probabilities are those of all.
        partial = [self._choice(number, content, Update(""), {}) for content in contents[:-1]]
        choice = self._choice(number, contents[-1], update, texts)
        self._begun.add(number)
        return b"".join(self.event([each]) for each in [*partial, choice])

    def event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else self._object
        return event({**self._common, "object": name, "choices": choices, **more})

    def _echo(self, number: int) -> str:
        return self._echoes[number] if self._echoes else ""

    def _choice(self, number: int, content: dict[str, Any], update: Update, texts: Mapping[int, str]) -> dict[str, Any]:
        reason = {"context": "length", "eos": "stop"}.get(update.finish_reason or "", update.finish_reason)
        if reason == "stop" and self._calls is not None and self._calls[number].count:
            reason = "tool_calls"
        logprobs = None
        if self._jobs[number].config.logprobs is not None:
            logprobs = _of_chat(update, texts) if self._is_chat else self._of_completion(number, update, texts)
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": reason}

    def _of_completion(self, number: int, update: Update, texts: Mapping[int, str]) -> dict[str, list[Any]]:
        """Log probabilities as completions have them; nothing is known of a prompt's first token."""
        told: list[TokenLogprobs | None] = [*update.prompt_logprobs, *update.logprobs]
        tokens = [texts[one.id] for one in (*update.prompt_logprobs, *update.logprobs)]
        job = self._jobs[number]
        if self._echoes and number not in self._begun:
            told, tokens = [None, *told], [texts[job.ids[0]], *tokens]
        ends = list(accumulate(map(len, tokens), initial=self._ends[number]))
        self._ends[number] = ends[-1]
        # Of two tokens with one text the more probable is named, and the token itself is always there.
        tops = [one and {texts[token]: logprob for token, logprob in (*one.top[::-1], (one.id, one.logprob))} for one in told]
        return {
            "tokens": tokens,
            "token_logprobs": [one and one.logprob for one in told],
            "top_logprobs": tops,
            "text_offset": ends[:-1],
        }


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
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in jobs[::n]), "audio_tokens": 0},
        "completion_tokens_details": details,
    }


def _of_chat(update: Update, texts: Mapping[int, str]) -> dict[str, Any]:
    """Log probabilities as conversations have them."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        text = texts[token]
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [{**told(one.id, one.logprob), "top_logprobs": [told(*top) for top in one.top]} for one in update.logprobs]
    return {"content": content, "refusal": None}
