"""The outputs of an unfinished measurement, in a file, so that `resume` continues where it was interrupted."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config.decoding import SkipChoice
from ...errors import LayerSkipError
from ...files import SchemaError, append_lines, build, parse_json, require_writable, whole_lines, write_file
from ..outputs import Output

FILE_NAME = "unfinished.jsonl"
FOUND_SKIP = "found_skip"  # among the settings: the layers to skip that this run searched
OUTPUTS = "outputs.jsonl"  # its name once the measurement is complete
_LARGEST = 1e12  # of any count and any number of seconds


@dataclass(frozen=True)
class _Row:
    """One line: the outputs of all methods for one sample in one repeat."""

    repeat: int
    sample: int
    outputs: tuple[Output, ...]


class Journal:
    """A JSON line for each prompt and repeat, with the outputs of all methods. The first line holds the run's settings."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool, methods: int, vocab_size: int) -> None:
        """Opens the folder's journal for a run of `methods` methods. With `resume` its lines are kept, else it starts empty.

        An incomplete last line, left by an interruption, is dropped; its prompt is measured again. Raises LayerSkipError when
        the journal belongs to other settings, when any other line is damaged, or when the file cannot be written.
        """
        self._path = folder / FILE_NAME
        self._known: dict[tuple[int, int], list[Output]] = {}
        head = json.dumps(settings, sort_keys=True).encode()
        lines = whole_lines(self._path, LayerSkipError) if resume else []
        if lines and lines[0].strip() != head:
            raise LayerSkipError(
                f"`resume`: {self._path} belongs to a run with other settings or rows; leave out `resume` to start again"
            )
        for number, line in enumerate(lines[1:], start=2):
            row = _row(line, f"`resume`: {self._path}, line {number}", methods, vocab_size)
            self._known[row.repeat, row.sample] = list(row.outputs)
        write_file(self._path, b"".join(lines) or head + b"\n", LayerSkipError)

    def recall(self, repeat: int, sample: int) -> list[Output] | None:
        """The outputs of all methods, or None if they are missing."""
        return self._known.get((repeat, sample))

    def add(self, repeat: int, sample: int, outputs: Sequence[Output]) -> None:
        row = {"repeat": repeat, "sample": sample, "outputs": [asdict(output) for output in outputs]}
        append_lines(self._path, [row], LayerSkipError)


def found_skip(folder: Path) -> SkipChoice | None:
    """The layers to skip that an interrupted run in this folder searched."""
    lines = whole_lines(folder / FILE_NAME, LayerSkipError)
    try:
        settings = build(dict[str, Any], parse_json(lines[0], str(folder / FILE_NAME), LayerSkipError) if lines else {}, "")
        choice: SkipChoice | None = build(SkipChoice | None, settings.get(FOUND_SKIP), FOUND_SKIP)
    except (SchemaError, LayerSkipError):  # settings that no run has: the journal refuses them
        return None
    return choice


def close(folder: Path) -> None:
    """Renames the journal of a complete run to OUTPUTS: it cannot be resumed any more, and its answers can be read."""
    require_writable(folder / OUTPUTS, LayerSkipError)
    (folder / FILE_NAME).replace(folder / OUTPUTS)


def _row(line: bytes, where: str, methods: int, vocab_size: int) -> _Row:
    """Parses a line. Raises LayerSkipError for anything that `add` does not write."""
    try:
        row: _Row = build(_Row, parse_json(line, where, LayerSkipError), "")
        if len(row.outputs) != methods:
            raise SchemaError(f"outputs: needed {methods}, found {len(row.outputs)}")
        for index, output in enumerate(row.outputs):
            _require_valid(output, f"outputs[{index}]", vocab_size)
    except SchemaError as error:
        remedy = "leave out `resume` to start again, or remove the line to measure its prompt again"
        raise LayerSkipError(f"{where} is damaged: {error}; {remedy}") from None
    return row


def _require_valid(output: Output, where: str, vocab_size: int) -> None:
    """Raises SchemaError for counts and times that no measurement can give."""
    wrong = [token for token in output.ids if not 0 <= token < vocab_size]
    if wrong:
        raise SchemaError(f"{where}.ids: needed tokens in 0..{vocab_size - 1}, found {wrong[0]}")
    for number, step in enumerate(output.steps):
        if step.tokens < 0 or not 0 < step.seconds < _LARGEST:
            raise SchemaError(
                f"{where}.steps[{number}]: needed a count of tokens and a time, found {step.tokens}, {step.seconds}"
            )
    for name, value in asdict(output.stats).items():
        least = 1 if name == "tested_by_position" else 0
        numbers = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        if any(not least <= number < _LARGEST for number in numbers):
            raise SchemaError(f"{where}.stats.{name}: needed at least {least}, found {value}")
    if sum(step.tokens for step in output.steps) not in (0, len(output.ids)):
        raise SchemaError(f"{where}.steps: needed {len(output.ids)} tokens in all, as many as ids")
