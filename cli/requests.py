"""What standard input asks: prompts, each with its own settings if its row has some."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

from layerskip_core.config.decoding import DecodingSettings, GenerationSettings
from layerskip_core.errors import DataError, LayerSkipError
from layerskip_core.files import build, parse_json

from . import standard_input


class RowSettings(TypedDict, total=False):
    """The keys of a row that change the flags for its prompt; null changes nothing. A `policy` replaces all that it sets."""

    policy: str | None
    max_new_tokens: int | None
    stop: str | list[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


_ROW = "row"
_KEYS = re.compile(rf"`({'|'.join(RowSettings.__annotations__)})`")


@dataclass(frozen=True)
class Request:
    """A prompt, the number of its line and how to decode it. `problem`: what is wrong with it, if anything is; `id`: what a row
    calls itself, which its answer repeats.
    """

    number: int
    prompt: str
    settings: DecodingSettings
    problem: str | None = None
    id: Any = None

    @property
    def named(self) -> dict[str, Any]:
        """What an answer in JSON begins with, so that it can be told whose it is."""
        return {"line": self.number} | ({} if self.id is None else {"id": self.id})


def read_requests(prompt: str | None, flags: DecodingSettings) -> Iterator[Request]:
    """The argument, or all of standard input as one prompt."""
    yield Request(1, standard_input.prompts_stream().read().removesuffix("\n") if prompt is None else prompt, flags)


def requests_of(lines: Iterable[str], jsonl: bool, flags: DecodingSettings) -> Iterator[Request]:
    """Each of the lines. A row of `jsonl` may change `flags`."""
    for number, line in enumerate(lines, start=1):
        if not jsonl:
            yield Request(number, line, flags)
        elif line.strip():
            yield _of_row(line, number, flags)


def of_row(error: LayerSkipError) -> str:
    """What is wrong with the settings of a row: its keys by their names, where other messages show flags."""
    return _KEYS.sub(lambda match: match[1], str(error))


def _of_row(line: str, number: int, flags: DecodingSettings) -> Request:
    try:
        row = parse_json(line, _ROW, DataError)
    except DataError as error:
        return Request(number, "", flags, str(error).removeprefix(f"{_ROW}: "))
    prompt, name = (row.get("prompt"), row.get("id")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str):
        return Request(number, "", flags, "needed an object with a text `prompt`", name)
    try:
        return Request(number, prompt, _changed(flags, row), id=name)
    except LayerSkipError as error:
        return Request(number, prompt, flags, of_row(error), name)


def _changed(flags: DecodingSettings, row: dict[str, Any]) -> DecodingSettings:
    """The flags with a row's settings in their place. Raises SchemaError for a wrong type, ConfigError for a wrong value."""
    known = build(RowSettings, row, "")
    given = {name: known[name] for name in RowSettings.__annotations__ if known.get(name) is not None}
    if "policy" in given:
        asked = flags.generation
        kept = GenerationSettings(asked.max_new_tokens, stop=asked.stop, sampling=asked.sampling)
        flags = DecodingSettings(generation=kept)
    return flags.changed(**given)
