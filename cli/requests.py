"""What standard input asks: prompts, each with its own options if its row has some."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from layerskip_core.config.decoding import DecodingOptions, changed
from layerskip_core.config.options import checked, hints_of
from layerskip_core.errors import DataError, LayerSkipError
from layerskip_core.files import parse_json

from . import streams

_ROW = "row"


@dataclass(frozen=True)
class Request:
    """A prompt, the number of its line and how to decode it, None: as the flags say.

    `problem`: what is wrong with it, if anything is. `id`: what a row calls itself, which its answer repeats.
    """

    number: int
    prompt: str
    options: DecodingOptions | None = None
    problem: str | None = None
    id: Any = None

    @property
    def named(self) -> dict[str, Any]:
        """What an answer in JSON begins with, so that it can be told whose it is."""
        return {"line": self.number} | ({} if self.id is None else {"id": self.id})


def read_requests(prompt: str | None) -> Iterator[Request]:
    """The argument, or all of standard input as one prompt."""
    yield Request(1, streams.prompts_stream().read().removesuffix("\n") if prompt is None else prompt)


def requests_of(lines: Iterable[str], jsonl: bool, flags: DecodingOptions) -> Iterator[Request]:
    """Each of the lines. A row of `jsonl` may change `flags`."""
    for number, line in enumerate(lines, start=1):
        if not jsonl:
            yield Request(number, line)
        elif line.strip():
            yield _of_row(line, number, flags)


def _of_row(line: str, number: int, flags: DecodingOptions) -> Request:
    try:
        row = parse_json(line, _ROW, DataError)
    except DataError as error:
        return Request(number, "", problem=str(error).removeprefix(f"{_ROW}: "))
    prompt, name = (row.get("prompt"), row.get("id")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str):
        return Request(number, "", problem="needed an object with a text `prompt`", id=name)
    options = {key: value for key, value in row.items() if key in hints_of(DecodingOptions)}
    try:
        own = cast(DecodingOptions, checked(DecodingOptions, options))
    except LayerSkipError as error:
        return Request(number, prompt, problem=str(error), id=name)
    return Request(number, prompt, changed(flags, own) if own else None, id=name)
