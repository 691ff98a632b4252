"""The answers of a record: a page that marks their differences, and a file of JSON lines to render it from again."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from ...errors import LayerSkipError
from ...files import SchemaError, build, parse_json, text_lines
from ..results import Answered, RunRecord
from .pages import render
from .points import label

ANSWERS_PAGE, ANSWERS_FILE = "answers.html", "answers.jsonl"
_PIECE = re.compile(r"\s+|\w+|[^\w\s]")  # what an answer is compared by


class _Part(NamedTuple):
    """A part of an answer; `marked` where it differs from the first answer."""

    text: str
    marked: bool


class _Version(NamedTuple):
    """An answer and the results that gave it: their numbers and names."""

    numbers: list[int]
    names: list[str]
    parts: list[_Part]


class _Section(NamedTuple):
    prompt: str
    reference: str
    versions: list[_Version]


def answers_page(record: RunRecord, title: str) -> str:
    """A section per prompt, with each different answer once, and the results that gave it. The autoregressive one is first.

    Words and signs in which another answer differs from the first are marked.
    """
    names = [label(result) for result in record.results]
    sections = [_Section(answered.prompt, answered.reference, _versions(answered, names)) for answered in record.answered]
    measured = [
        number for number in range(len(names)) if any(answered.answers[number] is not None for answered in record.answered)
    ]
    return render("answers", title=title, sections=sections, choices=[(number, names[number]) for number in measured[1:]])


def to_jsonl(answered: Sequence[Answered]) -> str:
    """An object per prompt, with the answers in the order of the results in results.json."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered)


def with_answers(record: RunRecord, saved: str) -> RunRecord:
    """The record of the results.json `saved`, with the answers that lie beside it, if they do.

    Raises LayerSkipError for a file that `to_jsonl` did not write for such a record.
    """
    file = Path(saved).with_name(ANSWERS_FILE)
    if not file.exists():
        return record
    answered, results = [], len(record.results)
    for number, line in enumerate(text_lines(file, "saved"), start=1):
        where = f"line {number} of {file}, beside `saved`,"
        try:
            row = build(Answered, parse_json(line.encode(), where, LayerSkipError), "the line")
        except SchemaError as error:
            raise LayerSkipError(f"{where} must be one that a measurement wrote: {error}") from None
        if len(row.answers) != results:
            raise LayerSkipError(f"{where} must have an answer for each of the {results} results, got {len(row.answers)}")
        answered.append(row)
    return replace(record, answered=tuple(answered))


def _versions(answered: Answered, names: Sequence[str]) -> list[_Version]:
    numbers: dict[str, list[int]] = {}
    for number, answer in enumerate(answered.answers):
        if answer is not None:
            numbers.setdefault(answer, []).append(number)
    first = next(iter(numbers), "")
    return [_Version(given, [names[number] for number in given], _parts(answer, first)) for answer, given in numbers.items()]


def _parts(answer: str, first: str) -> list[_Part]:
    """The answer in parts, of which those that `first` lacks are marked. A mark without text stands for a part left out."""
    if answer == first:
        return [_Part(answer, False)]
    pieces, expected = _PIECE.findall(answer), _PIECE.findall(first)
    return [
        _Part("".join(pieces[start:stop]), kind != "equal")
        for kind, _, _, start, stop in SequenceMatcher(None, expected, pieces, autojunk=False).get_opcodes()
    ]
