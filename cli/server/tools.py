"""Tool calls: the format that a chat template asks for, a grammar for it, and the calls in answers.

Formats: Hermes (also Qwen), Llama 3 and Mistral; for templates without tools, Hermes as plain text.
A mark such as `<tool_call>` may be text, an added token with a text in the answer, or a special
token, without one.
"""

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from layerskip_core.grammar import JSON_STYLE

_START = "<tool_call>"
_END = "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_SEPARATORS = string.whitespace + ";,[]"  # between calls
_DESCRIPTION = """\
You may call functions to answer the user. Here they are in JSON, with the schemas of their parameters:
<tools>
{}
</tools>
For each call write the name and the arguments in JSON between these tags, and nothing after the last call:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""

Format = Literal["hermes", "llama", "mistral"]
Call = dict[str, Any]
"""A tool call as in OpenAI's API: `id`, `type` and `function` with `name` and `arguments`, a JSON text."""


class Function(Struct):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(Struct):
    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call."""

    functions: Sequence[Function]
    described: list[dict[str, Any]]  # the tools as chat templates get them
    required: Sequence[Function] = ()  # the answer must call one of these
    parallel: bool = True  # it may call several


def format_of(template: str) -> Format | None:
    """The format of calls in a chat template; None if it has no tools."""
    if not re.search(r"\btools\b", template):
        return None
    if _MISTRAL in template:
        return "mistral"
    if _START in template:
        return "hermes"
    return "llama"


def as_texts(
    messages: Sequence[Mapping[str, Any]], tools: Tools | None, describing_role: str
) -> list[dict[str, str]]:
    """The conversation as plain texts, for templates without tools.

    A message of `describing_role` describes the tools; neighbours of one role are joined, because
    some templates want user and assistant in turn.
    """
    turns = [_as_text(message) for message in messages]
    if tools is not None:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools.described)
        after_system = int(messages[0]["role"] == "system")
        turns.insert(after_system, (describing_role, _DESCRIPTION.format(listed)))
    joined = []
    for role, group in groupby(turns, key=lambda turn: turn[0]):
        joined.append({"role": role, "content": "\n\n".join(content for _, content in group)})
    return joined


def _as_text(message: Mapping[str, Any]) -> tuple[str, str]:
    """A message's role and text, with its calls in Hermes' format."""
    parts = [message["content"]]
    for call in message.get("tool_calls", ()):
        function = json.dumps(call["function"], ensure_ascii=False)
        parts.append(f"{_START}\n{function}\n{_END}")
    content = "\n".join(parts).strip()
    if message["role"] == "tool":
        return "user", f"<tool_response>\n{content}\n</tool_response>"
    return message["role"], content


def format_of_answers(form: Format | None, special: Collection[str]) -> Format | None:
    """The format that calls have in the text of answers. `special`: special tokens."""
    if form == "hermes" and _START in special:  # the tags have no text
        return "llama"
    return form


def grammar(form: Format, tools: Tools, special: dict[str, int]) -> str:
    """A Lark grammar for calls of the required functions; if none is, for text, calls or both.
    `special`: ids of special tokens.
    """

    def literal(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    several = tools.parallel and form != "llama"  # Llama's template takes one call at a time
    definitions, schema = _call_schema(tools, "parameters" if form == "llama" else "arguments")
    start = "object"
    rules = []
    if form == "mistral":
        start = f"{literal(_MISTRAL)} object"
        schema = {"type": "array", "items": schema, "minItems": 1}
        if not several:
            schema["maxItems"] = 1
    if form == "hermes":
        start = 'call ("\\n" call)*' if several else "call"
        rules.append(f"call: {literal(_START)} body")
        rules.append(f'body: "\\n" object "\\n" {literal(_END)}')
        if not tools.required:
            start = start.replace("call", "TEXT? | first body", 1)
            rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){_START}(?s:.*)/")
            rules.append(f'first[suffix="{_START}"]: /(?s:.*)/')
    schema = {"$defs": definitions, "x-guidance": JSON_STYLE, **schema}
    return "\n".join([f"start: {start}", f"object: %json {json.dumps(schema)}", *rules])


def _call_schema(tools: Tools, parameters_key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The definitions and the JSON schema of a call: references start at the root of the whole
    schema, so definitions move there.
    """
    definitions: dict[str, Any] = {}
    choices = []
    for function in tools.required or tools.functions:
        parameters = dict(function.parameters)
        definitions |= parameters.pop("$defs", {})
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, parameters_key: parameters},
                "required": ["name", parameters_key],
                "additionalProperties": False,
            }
        )
    return definitions, {"anyOf": choices}


class Calls:
    """Splits the streamed text of one answer into text and tool calls."""

    def __init__(self, form: Format | None, tools: Tools | None) -> None:
        """Without `tools` all is text."""
        self._form = form
        self._names = [] if tools is None else [function.name for function in tools.functions]
        self._held = ""  # text that may belong to a call
        self._is_text = False  # plain text has begun, after which unmarked calls cannot follow
        self.count = 0  # of calls so far

    def add(self, text: str, finished: bool) -> tuple[str, list[Call]]:
        """Takes more text; returns the text and calls that are certain by now."""
        if not self._names:
            return text, []
        self._held += text
        split = self._split_marked if self._form == "hermes" else self._split_unmarked
        plain, calls = split(finished)
        self.count += len(calls)
        return plain, calls

    def _split_marked(self, finished: bool) -> tuple[str, list[Call]]:
        plain = ""
        calls: list[Call] = []
        while _START in self._held:
            before, _, rest = self._held.partition(_START)
            body, closed, after = rest.partition(_END)
            if not (closed or finished):
                return plain, calls
            found = _read_calls(body, self._names)
            if found:
                plain += before.rstrip()
                self._held = after.lstrip()
            else:
                plain += before + _START + body + closed
                self._held = after
            calls += found
        ready = self._held
        if not finished:  # a call may begin at the end, and white space before it is no text
            ready = _without_begun(ready, _START).rstrip()
        self._held = self._held[len(ready) :]
        return plain + ready, calls

    def _split_unmarked(self, finished: bool) -> tuple[str, list[Call]]:
        start = self._held.lstrip().removeprefix(_MISTRAL).lstrip()
        may_call = not start or start[0] in "{["
        if self._form == "mistral":
            may_call |= any(name.startswith(start[: len(name)]) for name in self._names)
        if may_call and not self._is_text:
            if not finished:
                return "", []
            calls = _read_calls(start, self._names)
            if calls:
                return "", calls
        self._is_text = True
        plain = self._held
        self._held = ""
        return plain, []


def _without_begun(text: str, mark: str) -> str:
    """The text without an end that begins the mark."""
    for size in range(len(mark) - 1, 0, -1):
        if text.endswith(mark[:size]):
            return text[:-size]
    return text


def _read_calls(text: str, names: Sequence[str]) -> list[Call]:
    """Calls in sequence or in a list; none if the text has anything else."""
    calls = []
    # Mistral's later form: the name, then the arguments
    named = re.compile(rf"({'|'.join(map(re.escape, names))})(\[ARGS\])?\s*(?={{)")
    rest = text.lstrip(_SEPARATORS)
    while rest:
        name = named.match(rest)
        try:
            value, end = json.JSONDecoder().raw_decode(rest, name.end() if name else 0)
        except ValueError:
            return []
        if name:
            value = {"name": name[1], "arguments": value}
        call = _call(value, names)
        if call is None:
            return []
        calls.append(call)
        rest = rest[end:].lstrip(_SEPARATORS)
    return calls


def _call(value: Any, names: Sequence[str]) -> Call | None:
    """A call in OpenAI's form; None if the value is no call of a known function."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    # Mistral's templates take ids of nine letters and digits only.
    name = secrets.token_hex(5)[:9]
    function = {"name": value["name"], "arguments": arguments}
    return {"id": name, "type": "function", "function": function}


def deltas(calls: Sequence[Call], first: int) -> Iterator[dict[str, Any]]:
    """Streaming deltas of calls: name, then arguments. `first`: the index of the first call in the
    answer.
    """
    for number, call in enumerate(calls, start=first):
        arguments = call["function"]["arguments"]
        yield {"index": number, **call, "function": {**call["function"], "arguments": ""}}
        yield {"index": number, "function": {"arguments": arguments}}
