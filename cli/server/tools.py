"""Tool calls: the format that a chat template asks for, a grammar for it, and the calls in answers.

Formats: Hermes (also Qwen), Llama 3 and Mistral; for templates without tools, Hermes as plain text.
A mark such as `<tool_call>` may be text, an added token with a text in the answer, or a special
token, without one.
"""

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct, field

from layerskip_core.grammar import JSON_STYLE

_START = "<tool_call>"
_END = "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_TOLD = """\
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


class Tools(NamedTuple):
    """The tools of a request; `described`: as the client sent them; `needed`: the answer must call
    one of these.
    """

    known: tuple[Tool, ...]
    described: list[Any]
    needed: tuple[Tool, ...] = ()
    parallel: bool = True


def format_of(template: str) -> Format | None:
    """The format of calls in a chat template; None if it has no tools."""
    if not re.search(r"\btools\b", template):
        return None
    return "mistral" if _MISTRAL in template else "hermes" if _START in template else "llama"


def as_texts(
    messages: Sequence[Mapping[str, Any]], tools: Tools | None, teller: str
) -> list[dict[str, Any]]:
    """The conversation as plain texts: a message of role `teller` describes the tools, messages of
    one role are joined.
    """
    turns = list[tuple[str, str]]()
    if tools is not None:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools.described)
        place = int(messages[0]["role"] == "system")
        messages = [
            *messages[:place],
            {"role": teller, "content": _TOLD.format(listed)},
            *messages[place:],
        ]
    for message in messages:
        calls = (
            json.dumps(call["function"], ensure_ascii=False)
            for call in message.get("tool_calls", ())
        )
        content = "\n".join(
            [message["content"], *(f"{_START}\n{call}\n{_END}" for call in calls)]
        ).strip()
        is_result = message["role"] == "tool"
        turns.append(
            ("user", f"<tool_response>\n{content}\n</tool_response>")
            if is_result
            else (message["role"], content)
        )
    groups = groupby(turns, key=lambda turn: turn[0])
    return [
        {"role": role, "content": "\n\n".join(content for _, content in group)}
        for role, group in groups
    ]


def format_of_answers(form: Format | None, special: Collection[str]) -> Format | None:
    """The format that calls have in the text of answers. `special`: special tokens."""
    return "llama" if form == "hermes" and _START in special else form  # without tags


def grammar(form: Format, tools: Tools, special: dict[str, int]) -> str:
    """A Lark grammar for calls of `needed` tools; if none is, for text, calls or both. `special`:
    ids of special tokens.
    """
    key = "parameters" if form == "llama" else "arguments"
    shared = dict[str, Any]()
    choices = []
    for tool in tools.needed or tools.known:
        parameters = dict(tool.function.parameters)
        shared |= parameters.pop("$defs", {})  # their references start at the root
        properties = {"name": {"const": tool.function.name}, key: parameters}
        choices.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    call: dict[str, Any] = {"anyOf": choices}

    def token(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    several = tools.parallel and form != "llama"  # Llama's template takes one call at a time
    start = "start: call" + (' ("\\n" call)*' if several else "")
    if form == "mistral":
        call = {"type": "array", "items": call, "minItems": 1} | (
            {} if several else {"maxItems": 1}
        )
        start = f"start: {token(_MISTRAL)} object"
    elif form == "llama":
        start = "start: object"
    parts = [
        start,
        "object: %json " + json.dumps({"$defs": shared, "x-guidance": JSON_STYLE, **call}),
    ]
    if form == "hermes":
        parts += [f"call: {token(_START)} body", f'body: "\\n" object "\\n" {token(_END)}']
    if not tools.needed:
        text = [
            f"TEXT: /(?s:.+)/ & ~/(?s:.*){_START}(?s:.*)/",
            f'first[suffix="{_START}"]: /(?s:.*)/',
        ]
        parts = [start.replace("call", "TEXT? | first body", 1), *parts[1:], *text]
    return "\n".join(parts)


class Calls:
    """Splits the streamed text of one answer into text and tool calls."""

    def __init__(self, form: Format | None, tools: Tools | None) -> None:
        """Without `tools` all is text."""
        self._form = form
        self._names = set() if tools is None else {tool.function.name for tool in tools.known}
        self._held = ""  # text that may belong to a call
        self._is_text = False  # plain text has begun, after which unmarked calls cannot follow
        self.count = 0  # of calls so far

    def add(self, text: str, finished: bool) -> tuple[str, list[Call]]:
        """Takes more text; returns the text and calls that are certain by now."""
        if not self._names:
            return text, []
        self._held += text
        plain, calls = (
            self._marked(finished) if self._form == "hermes" else self._unmarked(finished)
        )
        self.count += len(calls)
        return plain, calls

    def _marked(self, finished: bool) -> tuple[str, list[Call]]:
        plain = ""
        calls = list[Call]()
        while _START in self._held:
            before, _, rest = self._held.partition(_START)
            body, closed, after = rest.partition(_END)
            if not (closed or finished):
                break
            new = list(self._read(body))
            plain += before.rstrip() if new else before + _START + body + closed
            calls = calls + new
            self._held = after.lstrip() if new else after
        else:
            ready = self._held  # all but an end where a call may begin, and white space before it
            if not finished:
                size = next(
                    (
                        size
                        for size in range(len(_START) - 1, 0, -1)
                        if ready.endswith(_START[:size])
                    ),
                    0,
                )
                ready = ready[: len(ready) - size].rstrip()
            plain = plain + ready
            self._held = self._held[len(ready) :]
        return plain, calls

    def _unmarked(self, finished: bool) -> tuple[str, list[Call]]:
        start = self._held.lstrip().removeprefix(_MISTRAL).lstrip()
        named = any(name.startswith(start[: len(name)]) for name in self._names)
        if not self._is_text and (
            not start or start[0] in "{[" or (self._form == "mistral" and named)
        ):
            if not finished:
                return "", []
            if calls := list(self._read(start)):
                self._held = ""
                return "", calls
        self._is_text = True
        plain = self._held
        self._held = ""
        return plain, []

    def _read(self, text: str) -> Iterator[Call]:
        """Yields calls in sequence or in a list; none if the text has anything else."""
        values = list[Any]()
        place = 0
        named = "|".join(map(re.escape, self._names))
        while place < len(text):
            if gap := re.compile(r"[\s;,\[\]]+").match(text, place):
                place = gap.end()
                continue
            # Mistral's later form
            name = re.compile(rf"({named})(\[ARGS\])?\s*(?={{)").match(text, place)
            try:
                value, place = json.JSONDecoder().raw_decode(text, name.end() if name else place)
            except ValueError:
                return
            values.append({"name": name[1], "arguments": value} if name else value)
        calls = [
            (call.get("name"), call.get("arguments", call.get("parameters")))
            for call in values
            if isinstance(call, dict)
        ]
        if len(calls) == len(values) and all(
            name in self._names and given is not None for name, given in calls
        ):
            for name, given in calls:
                text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                # Mistral's templates take ids of nine letters and digits only.
                yield {
                    "id": secrets.token_hex(5)[:9],
                    "type": "function",
                    "function": {"name": name, "arguments": text},
                }


def deltas(calls: Sequence[Call], first: int) -> Iterator[dict[str, Any]]:
    """Streaming deltas of calls: name, then arguments. `first`: the index of the first call in the
    answer.
    """
    for number, call in enumerate(calls, start=first):
        arguments = call["function"]["arguments"]
        yield {"index": number, **call, "function": {**call["function"], "arguments": ""}}
        yield {"index": number, "function": {"arguments": arguments}}
