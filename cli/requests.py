"""What standard input asks: prompts, each with its own settings if its row has some."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from layerskip_core.config.decoding import DecodingSettings, GenerationSettings
from layerskip_core.errors import DataError, LayerSkipError
from layerskip_core.storage.json_reading import parse_json
from layerskip_core.storage.schema import build

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
_SAMPLING = ("temperature", "top_k", "top_p", "seed")
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
    given = {name: value for name, value in build(RowSettings, row, "").items() if value is not None}
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    limits = {"max_new_tokens": given["max_new_tokens"]} if "max_new_tokens" in given else {}
    if "stop" in given:
        limits["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    generation = replace(flags.generation, sampling=replace(flags.generation.sampling, **sampling), **limits)
    if "policy" not in given:
        return replace(flags, generation=generation)
    kept = GenerationSettings(generation.max_new_tokens, stop=generation.stop, sampling=generation.sampling)
    return DecodingSettings(generation=kept, policy=given["policy"])
