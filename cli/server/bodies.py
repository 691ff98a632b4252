"""Request bodies: a Struct per endpoint declares keys, types and ranges; `read_request` makes a
request of one. Errors have OpenAI's format and name the parameter.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, Struct, field

from layerskip_core.config.decoding import (
    GUIDES,
    UNLIMITED,
    Penalty,
    RequestOptions,
    ServeConfig,
    changed,
)
from layerskip_core.config.options import Count, CountOrNone, Ratio, Share, Temperature, hints_of
from layerskip_core.errors import ConfigError, ContextError, DataError, LayerSkipError, MemoryFull
from layerskip_core.files import parse_json
from layerskip_core.serving import QueueFull, Stopped

from .tools import Function, Tool, Tools

# Endpoints whose work is queued
Endpoint = Literal["completions", "chat", "responses", "embeddings"]
Conversation = tuple[dict[str, Any], ...]
"""Messages as chat templates read them."""
Prompt = str | list[int] | Conversation
"""A text, token ids or a conversation."""
Body = TypeVar("Body", bound=Struct)

_LOGPROBS = "message.output_text.logprobs"
_SEEDS = 2**32
_MAX_ANSWERS = 128
# Stop strings and biased tokens are read at every token, in the thread that decodes for all
# clients. OpenAI documents 4 stops and 300 biased tokens.
_Stop = Annotated[str, Meta(min_length=1, max_length=256)]
_MAX_STOPS = Meta(max_length=16)
_MAX_TOKENS = Meta(max_length=1_024)
_TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
_Texts = (
    str
    | Annotated[
        list[str | _TokenId | Annotated[list[_TokenId], Meta(min_length=1)]], Meta(min_length=1)
    ]
)
"""One prompt or several, each a text or token ids: see `_prompts`."""
_Guide = Annotated[str, Meta(min_length=1)]
# By endpoint, keys that would change the answer but are not supported, with the value that changes
# nothing. Other unknown keys are ignored.
_FOREIGN = {
    "best_of": 1,
    "length_penalty": 1,
    "typical_p": 1,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "bad_words": [],
    "functions": [],
    "suffix": "",
    "modalities": ["text"],
}
_UNSUPPORTED: dict[Endpoint, dict[str, Any]] = {
    "completions": {**_FOREIGN, "top_logprobs": 0, "tools": []},
    "chat": {**_FOREIGN, "echo": False},
    "responses": {
        **_FOREIGN,
        "n": 1,
        "truncation": "disabled",
        "prompt": None,
        "max_tool_calls": None,
        # Nothing is kept: the input must be the whole conversation.
        "store": False,
        "background": False,
        "previous_response_id": None,
        "conversation": None,
    },
    "embeddings": {"dimensions": None},
}


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
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(
    message: str, param: str | None = None, code: str | None = None, status: int = 400
) -> ApiError:
    """An error that is the client's fault."""
    return ApiError(status, message, "invalid_request_error", param, code)


def api_error(error: BaseException, endpoint: Endpoint | None = None) -> ApiError:
    """The response for an exception, with the endpoint's names of settings; an unexpected one
    reveals nothing.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "rate_limit_error", code="queue_full")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "server_error", code="shutting_down")
    if isinstance(error, MemoryFull):
        return ApiError(503, f"{error}; try again later", "server_error", code="memory_full")
    if not isinstance(error, LayerSkipError):
        message = "the server failed to answer this request; its log says why"
        return ApiError(500, message, "server_error")
    names = _api_names(endpoint)
    # Messages of the core have settings in backquotes.
    message = re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[1]), str(error))
    setting = error.field if isinstance(error, ConfigError) else None
    code = "context_length_exceeded" if isinstance(error, ContextError) else None
    return invalid(message, names.get(setting or "", setting), code)


def _api_names(endpoint: Endpoint | None) -> dict[str, str]:
    """A request's keys by the names of the settings that they become."""
    if endpoint is None:
        return {}
    names = {each.name: each.encode_name for each in msgspec.structs.fields(_BODIES[endpoint])}
    names["schema"] = "text.format" if endpoint == "responses" else "response_format"
    return names


# --- parts of bodies ----------------------------------------------------------------------------


class _Part(Struct):
    type: Literal["text", "input_text", "output_text"]
    text: str


_Content = str | list[_Part]


class _CalledFunction(Struct):
    name: str
    arguments: str


class _Call(Struct):
    function: _CalledFunction
    id: str = ""


class _Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def as_templates_read_it(self) -> dict[str, Any]:
        """A dict in which the arguments of calls are objects. Raises DataError."""
        if self.content is None and not self.tool_calls:
            raise DataError(f"a message of the role {self.role} has no content and no tool_calls")
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [_template_call(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


def _template_call(call: _Call) -> dict[str, Any]:
    text = call.function.arguments or "{}"
    arguments = parse_json(text, "the arguments of a call", DataError)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


class _Schema(Struct):
    schema: dict[str, Any]


class _Format(Struct):
    """The form of an answer. Chat has the schema in `json_schema`, responses in `schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None
    schema: dict[str, Any] | None = None


class _ResponseText(Struct):
    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Named(Struct):
    name: str


class _ChatChoice(Struct):
    function: _Named
    type: Literal["function"] = "function"

    @property
    def name(self) -> str:
        return self.function.name


class _ResponseChoice(Struct):
    name: str
    type: Literal["function"] = "function"


_Mode = Literal["none", "auto", "required"]


class _InputMessage(Struct, tag="message"):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class _InputCall(Struct, tag="function_call"):
    call_id: str
    name: str
    arguments: str


class _InputResult(Struct, tag="function_call_output"):
    call_id: str
    output: _Content


_Item = _InputMessage | _InputCall | _InputResult


class _ToolList(Struct):
    tools: list[Tool]


# --- bodies -------------------------------------------------------------------------------------


class _AnswerBody(Struct, kw_only=True):
    """Keys of all endpoints that answer. Fields are named as the RequestOptions that they set."""

    model: str | None = None
    stream: bool = False
    n: Annotated[int, Meta(ge=1)] = 1
    seed: int | None = None
    max_new_tokens: Count | None = field(default=None, name="max_tokens")
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: CountOrNone | None = None
    min_p: Ratio | None = None
    stop: _Stop | Annotated[list[_Stop], _MAX_STOPS] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[_TokenId, Annotated[float, Meta(ge=-100, le=100)]], _MAX_TOKENS] | None
    ) = None
    min_tokens: CountOrNone | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_TokenId], _MAX_TOKENS] | None = None
    regex: _Guide | None = field(default=None, name="guided_regex")
    grammar: _Guide | None = field(default=None, name="guided_grammar")
    choice: Annotated[list[_Guide], Meta(min_length=1)] | None = field(
        default=None, name="guided_choice"
    )
    guided_json: dict[str, Any] | str | None = None
    response_format: _Format | None = None
    stream_options: _StreamOptions = field(default_factory=_StreamOptions)

    def options(self) -> dict[str, Any]:
        """The RequestOptions of the fields with their names, and `schema`."""
        given = msgspec.structs.asdict(self)
        options = {name: given[name] for name in hints_of(RequestOptions) if name in given}
        options["schema"] = _schema(self)
        return {name: value for name, value in options.items() if value is not None}


class CompletionBody(_AnswerBody, kw_only=True):
    prompt: _Texts
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class ChatBody(_AnswerBody, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    with_logprobs: bool = field(default=False, name="logprobs")
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    tools: list[Tool] = field(default_factory=list)
    tool_choice: _Mode | _ChatChoice = "auto"
    parallel_tool_calls: bool = True


class ResponseBody(_AnswerBody, kw_only=True):
    input: str | Annotated[list[_Item], Meta(min_length=1)]
    instructions: str | None = None
    max_new_tokens: Count | None = field(default=None, name="max_output_tokens")
    text: _ResponseText = field(default_factory=_ResponseText)
    include: list[str] = field(default_factory=list)
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: _Mode | _ResponseChoice = "auto"
    parallel_tool_calls: bool = True


class EmbeddingBody(Struct):
    input: _Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeBody(Struct):
    model: str | None = None
    prompt: str | Annotated[list[_TokenId], Meta(min_length=1)] | None = None
    messages: Annotated[list[_Message], Meta(min_length=1)] | None = None


_BODIES: dict[Endpoint, type[Struct]] = {
    "completions": CompletionBody,
    "chat": ChatBody,
    "responses": ResponseBody,
    "embeddings": EmbeddingBody,
}

# --- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerRequest:
    """Prompts with `n` answers each."""

    prompts: Sequence[Prompt]
    options: Sequence[RequestOptions]  # by answer; they differ in seed
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    tools: Tools | None = None  # of a conversation


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts to embed."""

    prompts: Sequence[Prompt]
    as_base64: bool
    n: int = 1
    stream: bool = False


def parse_body(content: bytes) -> dict[str, Any]:
    """A body without its nulls, which count as absent. Raises ApiError and DataError."""
    document = parse_json(content, "the body", DataError)
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    return {key: value for key, value in document.items() if value is not None}


def read_request(
    document: Mapping[str, Any], endpoint: Endpoint, model: str, config: ServeConfig
) -> AnswerRequest | EmbeddingRequest:
    """A body's request to the model of this name. Raises ApiError and DataError."""
    for key, harmless in _UNSUPPORTED[endpoint].items():
        if document.get(key, harmless) != harmless:
            raise invalid(f"{key} is not supported by this server", key, "unsupported_parameter")
    if endpoint == "embeddings":
        texts = _convert(document, EmbeddingBody)
        require_model(texts.model, model)
        prompts = _prompts(texts.input, "input")
        _require_places(len(prompts), config, "input")
        return EmbeddingRequest(prompts, texts.encoding_format == "base64")
    if endpoint == "completions":
        body = _convert(document, CompletionBody)
        options = body.options()
        options["prompt_logprobs"] = body.echo and body.logprobs is not None
        prompts = _prompts(body.prompt, "prompt")
        return _answer_request(body, model, prompts, options, config, None)
    if endpoint == "chat":
        return _chat_request(document, model, config)
    return _response_request(document, model, config)


def tokenize_prompt(document: Mapping[str, Any], model: str) -> Prompt:
    """The prompt of a `/tokenize` body. Raises ApiError."""
    body = _convert(document, TokenizeBody)
    require_model(body.model, model)
    if body.messages is not None:
        return _conversation(body.messages, "messages")
    if body.prompt is None:
        raise invalid("prompt must be given, or messages", "prompt")
    return body.prompt


def require_model(named: str | None, model: str) -> None:
    """Raises ApiError for another model; a request need not name one."""
    if named not in (None, model):
        message = f"the model {named!r:.200} does not exist; this server has {model}"
        raise invalid(message, "model", "model_not_found", 404)


def _convert(document: Mapping[str, Any], kind: type[Body]) -> Body:
    try:
        return msgspec.convert(document, kind, str_keys=True)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        if named := re.search(r"\$\.([^`]+)", path):
            place = named[1]
        else:  # a required key of the body itself is missing
            place = reason.split("`")[1]
            reason = "it is missing"
        param = re.split(r"[.\[]", place)[0]
        raise invalid(f"{place} is not valid: {reason}", param) from None


def _chat_request(document: Mapping[str, Any], model: str, config: ServeConfig) -> AnswerRequest:
    body = _convert(document, ChatBody)
    options = body.options()
    if body.max_completion_tokens is not None:
        options["max_new_tokens"] = body.max_completion_tokens
    if body.with_logprobs:
        options["logprobs"] = body.top_logprobs
    elif body.top_logprobs:
        raise invalid("top_logprobs must be used with logprobs: true", "top_logprobs")
    # Templates get tools as the client sent them, with keys that no Struct has.
    tools = _tools(body, body.tools, document.get("tools", []))
    prompts = [_conversation(body.messages, "messages")]
    return _answer_request(body, model, prompts, options, config, tools)


def _response_request(
    document: Mapping[str, Any], model: str, config: ServeConfig
) -> AnswerRequest:
    items = document.get("input")
    if isinstance(items, list):  # messages need not say their type
        items = [{"type": "message", **item} if isinstance(item, dict) else item for item in items]
        document = {**document, "input": items}
    body = _convert(document, ResponseBody)
    options = body.options()
    if body.top_logprobs or _LOGPROBS in body.include:
        options["logprobs"] = body.top_logprobs
    described = [_chat_tool(tool) for tool in body.tools]
    tools = _tools(body, _convert({"tools": described}, _ToolList).tools, described)
    prompts = [_conversation(_input_messages(body), "input")]
    return _answer_request(body, model, prompts, options, config, tools)


def _answer_request(
    body: _AnswerBody,
    model: str,
    prompts: Sequence[Prompt],
    options: dict[str, Any],
    config: ServeConfig,
    tools: Tools | None,
) -> AnswerRequest:
    require_model(body.model, model)
    count = body.n * len(prompts)
    _require_places(count, config, "n")
    if tools is not None and tools.required and options.keys() & set(GUIDES):
        message = "tool_choice must be none or auto with response_format or a guided_ key"
        raise invalid(message, "tool_choice")
    flags = config.decoding
    max_new_tokens = options.get("max_new_tokens", flags.get("max_new_tokens", UNLIMITED))
    options["max_new_tokens"] = min(max_new_tokens, config.token_limit or UNLIMITED)
    options = cast(dict[str, Any], changed(flags, cast(RequestOptions, options)))
    first_seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
    by_answer = [
        cast(RequestOptions, {**options, "seed": (first_seed + number) % _SEEDS})
        for number in range(count)
    ]
    return AnswerRequest(
        prompts,
        by_answer,
        n=body.n,
        stream=body.stream,
        include_usage=bool(body.stream_options.include_usage),
        echo=isinstance(body, CompletionBody) and body.echo,
        tools=tools,
    )


def _require_places(count: int, config: ServeConfig, param: str) -> None:
    """Raises ApiError for more answers or texts than could ever wait together."""
    most = min(_MAX_ANSWERS, config.batch_size + config.queue_size)
    if count > most:
        raise invalid(f"{param} must ask for at most {most} answers or texts, got {count}", param)


def _prompts(given: Any, param: str) -> list[Prompt]:
    """The prompts of a `_Texts`: a list of ids is one prompt, other lists are several."""
    if isinstance(given, str):
        return [given]
    ids = [each for each in given if isinstance(each, int)]
    if not ids:
        return list(given)
    if len(ids) < len(given):
        raise invalid(f"{param} must not mix token ids with texts", param)
    return [ids]


def _conversation(messages: Sequence[_Message], param: str) -> Conversation:
    try:
        return tuple(message.as_templates_read_it() for message in messages)
    except DataError as error:
        raise invalid(f"{param} is not valid: {error}", param) from None


def _input_messages(body: ResponseBody) -> list[_Message]:
    """Instructions and input items as messages. A call joins the assistant's message before it, if
    there is one.
    """
    messages = []
    if body.instructions is not None:
        messages.append(_Message("system", body.instructions))
    if isinstance(body.input, str):
        return [*messages, _Message("user", body.input)]
    for item in body.input:
        if isinstance(item, _InputMessage):
            messages.append(_Message(item.role, item.content))
        elif isinstance(item, _InputResult):
            messages.append(_Message("tool", item.output, tool_call_id=item.call_id))
        else:
            if not messages or messages[-1].role != "assistant":
                messages.append(_Message("assistant"))
            call = _Call(_CalledFunction(item.name, item.arguments), item.call_id)
            messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
    return messages


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool of the responses API in the form of chat."""
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": tool.get("type"), "function": function}


def _tools(
    body: ChatBody | ResponseBody, tools: Sequence[Tool], described: list[dict[str, Any]]
) -> Tools | None:
    """The tools that an answer may call; None without any. `described`: as templates get them."""
    choice = body.tool_choice
    functions = [tool.function for tool in tools]
    required: list[Function] = []
    if choice == "none":
        return None
    if choice == "required":
        required = functions
    elif not isinstance(choice, str):
        required = [function for function in functions if function.name == choice.name]
    if choice != "auto" and not required:
        raise invalid("tool_choice must be used with tools, and name one of them", "tool_choice")
    if not functions:
        return None
    parallel = body.parallel_tool_calls and isinstance(choice, str)
    return Tools(functions, described, required, parallel)


def _schema(body: _AnswerBody) -> dict[str, Any] | None:
    """The JSON schema that an answer must match; `strict` is ignored. Raises ApiError."""
    if isinstance(body, ResponseBody):
        form = body.text.format
        param = "text.format"
    else:
        form = body.response_format
        param = "response_format"
    guided = body.guided_json
    if isinstance(guided, str):
        guided = parse_json(guided, "guided_json", DataError, dict[str, Any])
    if form is None or form.type == "text":
        return guided
    if guided is not None:
        raise invalid(f"{param} and guided_json must not be given both", param)
    if form.type == "json_object":
        return {"type": "object"}
    schema = form.json_schema.schema if form.json_schema is not None else form.schema
    if schema is None:
        raise invalid(f"{param} of the type json_schema must have a schema", param)
    return schema
