"""Parses request bodies: prompts, options and tools. Errors have OpenAI's format and name the
parameter.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast

import msgspec
from msgspec import Meta, Struct

from layerskip_core.config.decoding import GUIDES, UNLIMITED, RequestOptions, ServeConfig, changed
from layerskip_core.config.options import checked
from layerskip_core.errors import ConfigError, ContextError, DataError, LayerSkipError, MemoryFull
from layerskip_core.files import parse_json
from layerskip_core.serving import QueueFull, Stopped

from .tools import Tool, Tools

# Options under another name in the API.
_NAMES = {"max_new_tokens": "max_tokens", "schema": "response_format"}
_NAMES |= {name: f"guided_{name}" for name in ("regex", "grammar", "choice")}
# Chat parameters under another name in the responses API.
_RESPONSE_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
_STATE: dict[str, Any] = {
    "store": False,
    "background": False,
    "previous_response_id": None,
    "conversation": None,
}
_NOT_IN_RESPONSES: dict[str, Any] = {
    "n": 1,
    "truncation": "disabled",
    "prompt": None,
    "max_tool_calls": None,
}
_LOGPROBS = "message.output_text.logprobs"
_SEEDS = 2**32
_MOST_ANSWERS = 128
# Read at every token, in the thread that decodes for all. OpenAI documents 4 stops and 300 biased
# tokens.
_MOST_STOPS = 16
_LONGEST_STOP = 256
_MOST_TOKENS = 1_024  # in logit_bias and stop_token_ids
# Unsupported keys, with the value that has no effect.
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("best_of", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("include_stop_str_in_output", "use_beam_search"), False),
    **{key: [] for key in ("bad_words", "functions")},
    **{"suffix": "", "modalities": ["text"]},
}
_NOT_IN_COMPLETIONS: dict[str, Any] = {"top_logprobs": 0, "tools": []}
# RequestOptions under the same name in a body.
_OPTIONS = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ),
    *("logit_bias", "min_tokens", "ignore_eos", "stop_token_ids"),
)

# Of endpoints whose work is queued
Family = Literal["completions", "chat", "responses", "embeddings"]
Prompt = str | list[int] | tuple[dict[str, Any], ...]
"""A text, token ids, or the messages of a conversation, as chat templates read them."""
_Stop = Annotated[str, Meta(min_length=1, max_length=_LONGEST_STOP)]
_Ids = Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]


class ApiError(Exception):
    """A refused or failed request, with the status and fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.document: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def renamed(self, family: Family) -> "ApiError":
        """With the parameter's name in this family, in `param` and in the message."""
        error = self.document["error"]
        if (
            family == "responses"
            and (name := _RESPONSE_NAMES.get(param := error["param"])) is not None
        ):
            error |= {"param": name, "message": error["message"].replace(param, name, 1)}
        return self


def invalid(
    message: str, param: str | None = None, code: str | None = None, status: int = 400
) -> ApiError:
    """An error that is the client's fault."""
    return ApiError(status, message, "invalid_request_error", param, code)


def demand(
    condition: bool,
    message: str,
    param: str | None = None,
    code: str | None = None,
    status: int = 400,
) -> None:
    """Raises `invalid` unless the condition holds."""
    if not condition:
        raise invalid(message, param, code, status)


def api_error(error: BaseException) -> ApiError:
    """The response for an exception; an unexpected one reveals nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "rate_limit_error", code="queue_full")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "server_error", code="shutting_down")
    if isinstance(error, MemoryFull):
        return ApiError(503, f"{error}; try again later", "server_error", code="memory_full")
    if isinstance(error, ConfigError):
        param = None if error.field is None else _NAMES.get(error.field, error.field)
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return invalid(_named(str(error)), param, code)
    if isinstance(error, LayerSkipError):
        return invalid(_named(str(error)))
    return ApiError(
        500, "the server failed to answer this request; its log says why", "server_error"
    )


def _named(message: str) -> str:
    """A message of the core, with API names in place of settings in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: _NAMES.get(match[1], match[1]), message)


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
        content = (
            "".join(part.text for part in self.content)
            if isinstance(self.content, list)
            else self.content or ""
        )
        made: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        if self.content is None and not self.tool_calls:
            raise invalid(
                f"messages must have a content or tool_calls; one of the role {self.role} has neither",
                "messages",
            )
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": arguments},
                }
                for call in self.tool_calls
                for arguments in [
                    parse_json(
                        call.function.arguments or "{}", "the arguments of a call", DataError
                    )
                ]
            ]
        return made | {
            key: value
            for key in ("tool_call_id", "name")
            if (value := getattr(self, key)) is not None
        }


class _Body(TypedDict, total=False):
    """Keys besides the prompt and the RequestOptions; null counts as absent."""

    model: str
    seed: int
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Meta(max_length=_MOST_STOPS)],
        Meta(description=f"at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters"),
    ]
    logit_bias: Annotated[
        dict[Any, Any],
        Meta(
            max_length=_MOST_TOKENS,
            description=f"an object of at most {_MOST_TOKENS} token ids with numbers",
        ),
    ]
    stop_token_ids: Annotated[
        list[Any],
        Meta(max_length=_MOST_TOKENS, description=f"a list of at most {_MOST_TOKENS} token ids"),
    ]
    n: int
    stream: bool
    stream_options: Annotated[
        dict[str, bool | None], Meta(description="an object, such as include_usage: true")
    ]
    echo: bool
    logprobs: Annotated[
        bool | int,
        Meta(description="true or false in a conversation, a number in 0..20 for completions"),
    ]
    top_logprobs: Annotated[int, Meta(ge=0, le=20)]
    parallel_tool_calls: bool


class _ResponseBody(TypedDict, total=False):
    """Keys whose format differs from chat."""

    instructions: str
    text: Annotated[dict[str, Any], Meta(description="an object with a format")]
    tools: Annotated[list[dict[str, Any]], Meta(description="a list of functions")]
    include: list[str]


def text_of(document: Mapping[str, Any], model: str) -> Prompt:
    """The text or conversation of a /tokenize body."""
    _require_model(document.get("model", model), model)
    prompts = (
        _conversation(document["messages"])
        if "messages" in document
        else _prompts(document.get("prompt"))
    )
    demand(len(prompts) == 1, f"prompt must be one text, got {len(prompts)}", "prompt")
    return prompts[0]


class Asked(NamedTuple):
    """A request. Each prompt has `n` answers, each with options of its own."""

    prompts: tuple[Prompt, ...]
    options: list[RequestOptions]  # by answer; they differ in seed
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    tools: Tools | None = None  # of a conversation


def _refuse_unsupported(
    document: Mapping[str, Any], unsupported: Mapping[str, Any], why: str = ""
) -> None:
    """Raises ApiError for an unsupported key, unless its value has no effect."""
    for key in document.keys() & unsupported.keys():
        value = document[key]
        harmless = unsupported[key]
        if value != harmless or isinstance(value, bool) != isinstance(harmless, bool):
            raise invalid(
                f"{key} is not supported by this server{why}", key, "unsupported_parameter"
            )


def _embedded(document: Mapping[str, Any], model: str, most: int) -> Asked:
    """The texts to embed."""
    form = document.get("encoding_format", "float")
    demand(
        form in ("float", "base64"),
        f"encoding_format must be float or base64, got {form!r:.50}",
        "encoding_format",
    )
    _refuse_unsupported(document, {"dimensions": None})
    _require_model(document.get("model", model), model)
    prompts = _prompts(document.get("input"), "input")
    demand(len(prompts) <= most, f"input must be at most {most} texts, got {len(prompts)}", "input")
    return Asked(prompts, [{} for _ in prompts])


def request_of(
    document: Mapping[str, Any], family: Family, model: str, config: ServeConfig
) -> Asked:
    """Parses a body, for the model of this name. Raises ApiError, and ConfigError for an option out
    of range.
    """
    # Answers or texts, all of which must fit the queue
    most = min(_MOST_ANSWERS, config.batch_size + config.queue_size)
    if family == "embeddings":
        return _embedded(document, model, most)
    document = _as_conversation(document) if family == "responses" else document
    is_chat = family != "completions"
    _refuse_unsupported(
        document, _UNSUPPORTED | ({"echo": False} if is_chat else _NOT_IN_COMPLETIONS)
    )
    prompts = (
        _conversation(document.get("messages")) if is_chat else _prompts(document.get("prompt"))
    )
    given = checked(_Body, {key: document[key] for key in _Body.__annotations__ if key in document})
    demand("model" in given, f"model is missing; this server has {model}", "model")
    _require_model(given["model"], model)
    n = given.get("n", 1)
    count = n * len(prompts)
    demand(
        1 <= count <= most, f"n times the number of prompts must be in 1..{most}, got {count}", "n"
    )
    options = {name: document[name] for name in _OPTIONS if name in document}
    flags = config.decoding
    limit = config.token_limit or UNLIMITED
    usual = flags.get("max_new_tokens", UNLIMITED)
    options["max_new_tokens"] = document.get(
        "max_completion_tokens", document.get("max_tokens", usual)
    )
    options |= _logprobs(given, is_chat) | _guide(document)
    decoding = cast(RequestOptions, checked(RequestOptions, options))
    decoding["max_new_tokens"] = min(decoding["max_new_tokens"], limit)
    seed = given.get("seed")
    seeds = (
        (secrets.randbelow(_SEEDS) if seed is None else seed + number) % _SEEDS
        for number in range(count)
    )
    of_answers: list[RequestOptions] = [
        {**changed(flags, decoding), "seed": each} for each in seeds
    ]
    include_usage = bool(given.get("stream_options", {}).get("include_usage"))
    stream = given.get("stream", False)
    tools = _tools(document, given.get("parallel_tool_calls", True)) if is_chat else None
    if tools is not None and tools.needed and decoding.keys() & set(GUIDES):
        raise invalid(
            "tool_choice must be none or auto with response_format or a guided_ key", "tool_choice"
        )
    return Asked(prompts, of_answers, n, stream, include_usage, given.get("echo", False), tools)


def _tools(document: Mapping[str, Any], parallel: bool) -> Tools | None:
    try:
        known = msgspec.convert(document.get("tools", []), tuple[Tool, ...])
    except msgspec.ValidationError as error:
        raise invalid(
            f"tools must be a list of functions with their names and parameters: {error}", "tools"
        ) from None
    choice = document.get("tool_choice", "auto")
    needed = known
    match choice:
        case "none" | "auto":
            needed = ()
        case {"type": "function", "function": {"name": str(name)}}:
            needed = tuple(tool for tool in known if tool.function.name == name)
        case _ if choice != "required":
            raise invalid(
                "tool_choice must be none, auto, required, or a function's name in an object",
                "tool_choice",
            )
    if choice not in ("none", "auto") and not needed:
        raise invalid("tool_choice must be used with tools, and name one of them", "tool_choice")
    return (
        Tools(known, document["tools"], needed, parallel and isinstance(choice, str))
        if known and choice != "none"
        else None
    )


def _guide(document: Mapping[str, Any]) -> dict[str, Any]:
    """The option that constrains the answer; `strict` is ignored."""
    made = {
        name: document[f"guided_{name}"]
        for name in ("regex", "grammar", "choice")
        if f"guided_{name}" in document
    }
    if "guided_json" in document:
        given = document["guided_json"]
        made["schema"] = (
            parse_json(given, "guided_json", DataError) if isinstance(given, str) else given
        )
    match document.get("response_format"):
        case None | {"type": "text"}:
            pass
        case _ if "schema" in made:
            raise invalid(
                "response_format and guided_json must not be given both", "response_format"
            )
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            made["schema"] = schema
        case {"type": "json_object"}:
            made["schema"] = {"type": "object"}
        case _:
            needed = "response_format must be of the type text, json_object, or json_schema with its schema"
            raise invalid(needed, "response_format")
    return made


def _logprobs(given: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The options for log probabilities: in chat a boolean and `top_logprobs`, in completions a
    number.
    """
    wanted = given.get("logprobs")
    if wanted is not None and isinstance(wanted, bool) != is_chat:
        raise invalid(
            f"logprobs must be {'true or false' if is_chat else 'a number in 0..20'}, got {wanted}",
            "logprobs",
        )
    if not is_chat:
        return (
            {}
            if wanted is None
            else {"logprobs": wanted, "prompt_logprobs": given.get("echo", False)}
        )
    demand(
        wanted or not given.get("top_logprobs"),
        "top_logprobs must be used with logprobs: true",
        "top_logprobs",
    )
    return {"logprobs": given.get("top_logprobs", 0)} if wanted else {}


def parsed(body: bytes) -> dict[str, Any]:
    """A body without its nulls. Raises ApiError for one that is no object, DataError for invalid
    JSON.
    """
    document = parse_json(body, "the body", DataError)
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    return {key: value for key, value in document.items() if value is not None}


def _require_model(named: Any, model: str) -> None:
    demand(
        named == model,
        f"the model {named!r:.200} does not exist; this server has {model}",
        "model",
        "model_not_found",
        404,
    )


def _conversation(messages: Any) -> tuple[Prompt, ...]:
    try:
        turns = msgspec.convert(messages, Annotated[list[_Message], Meta(min_length=1)])
        return (tuple(message.plain for message in turns),)
    except (msgspec.ValidationError, DataError) as error:
        raise invalid(
            f"messages must be a list of messages with a role and a text: {error}", "messages"
        ) from None


def _prompts(prompt: Any, key: str = "prompt") -> tuple[Prompt, ...]:
    """One prompt or several, each a text or token ids."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    try:
        return tuple(msgspec.convert(one, str | _Ids) for one in (prompt if several else [prompt]))
    except msgspec.ValidationError:
        raise invalid(
            f"{key} must be a text, a list of token ids, or a list of several of these", key
        ) from None


def _as_conversation(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat body equivalent to a responses body. Raises ApiError and ConfigError."""
    _refuse_unsupported(
        body, _STATE, ", which keeps no responses: the input must be the whole conversation"
    )
    _refuse_unsupported(body, _NOT_IN_RESPONSES)
    given = checked(
        _ResponseBody, {key: body[key] for key in _ResponseBody.__annotations__ if key in body}
    )
    text = given.get("text", {})
    choice = body.get("tool_choice")
    made = dict(body)
    if text.get("verbosity") not in (None, "medium"):
        raise invalid(
            f"text.verbosity must be medium, got {text['verbosity']!r:.50}", "text.verbosity"
        )
    if form := text.get("format"):
        made["response_format"] = (
            {"type": form.get("type"), "json_schema": form} if isinstance(form, dict) else form
        )
    system = (
        [{"role": "system", "content": given["instructions"]}] if "instructions" in given else []
    )
    made["messages"] = system + _messages(body.get("input"))
    tools = [
        {key: value for key, value in tool.items() if value is not None}
        for tool in given.get("tools", [])
    ]
    made["tools"] = [{"type": tool.pop("type", None), "function": tool} for tool in tools]
    if isinstance(choice, dict) and "name" in choice:
        made["tool_choice"] = {"type": choice.get("type"), "function": choice}
    if "max_output_tokens" in body:
        made["max_completion_tokens"] = body["max_output_tokens"]
    if _LOGPROBS in given.get("include", []) or body.get("top_logprobs"):
        made["logprobs"] = True
    return made


def _messages(given: Any) -> list[dict[str, Any]]:
    """Input items as messages, not yet validated. A call joins the assistant's message before it,
    if there is one.
    """
    messages: list[dict[str, Any]] = []
    for item in given if isinstance(given, list) else [{"role": "user", "content": given}]:
        match {"type": "message", **item} if isinstance(item, dict) else item:
            case {
                "type": "message",
                "role": "system" | "developer" | "user" | "assistant" as role,
                "content": content,
            }:
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
    """The content of an input or output item in the chat format."""
    parts = content if isinstance(content, list) else []
    if all(
        isinstance(part, dict) and part.get("type") in ("input_text", "output_text")
        for part in parts
    ):
        return [{**part, "type": "text"} for part in parts] or content
    raise invalid(
        "input must have contents that are texts, or lists of input_text and output_text parts",
        "input",
    )
