"""What a long measurement has found so far, in a file, so that an interrupted one goes on where it stopped."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import LayerSkipError
from ...storage.json_reading import parse_json
from ...storage.schema import SchemaError, build
from ...storage.writing import require_writable, write_file
from ..outputs import Output

FILE_NAME = "unfinished.jsonl"
OUTPUTS = "outputs.jsonl"  # what it becomes
_AGES = 1e12  # no count and no number of seconds is larger


@dataclass(frozen=True)
class _Row:
    """One line: what every setting gave for a sample, in a repeat."""

    repeat: int
    sample: int
    outputs: tuple[Output, ...]


class Journal:
    """One JSON line for each prompt and repeat, with the outputs of all settings; the first line says what is measured."""

    def __init__(self, folder: Path, plan: dict[str, Any], resume: bool, settings: int, vocab_size: int) -> None:
        """Opens the folder's journal for so many settings. With `resume` its lines are kept, else it begins anew.

        Half a line at the end, which an interruption leaves, is dropped, to be measured again. Raises LayerSkipError when the
        journal there is of another plan or any other line of it is damaged, or the file cannot be written.
        """
        self._path = folder / FILE_NAME
        self._known: dict[tuple[int, int], list[Output]] = {}
        head = json.dumps(plan, sort_keys=True).encode()
        lines = _whole_lines(self._path) if resume else []
        if lines and lines[0].strip() != head:
            raise LayerSkipError(f"`resume`: {self._path} is of a run with other settings; leave `resume` out to begin anew")
        for number, line in enumerate(lines[1:], start=2):
            row = _row(line, f"`resume`: {self._path}, line {number}", settings, vocab_size)
            self._known[row.repeat, row.sample] = list(row.outputs)
        write_file(self._path, b"".join(lines) or head + b"\n", LayerSkipError)

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, repeat: int, sample: int) -> list[Output] | None:
        """The outputs of every setting, if they are known."""
        return self._known.get((repeat, sample))

    def add(self, repeat: int, sample: int, outputs: Sequence[Output]) -> None:
        row = {"repeat": repeat, "sample": sample, "outputs": [asdict(output) for output in outputs]}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise LayerSkipError(f"cannot write {self._path}: {error.strerror}") from error


def close(folder: Path) -> None:
    """For a measurement that is complete, its results written: nothing is left to resume, and every answer to be read."""
    require_writable(folder / OUTPUTS, LayerSkipError, regular=True)
    (folder / FILE_NAME).replace(folder / OUTPUTS)


def _whole_lines(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise LayerSkipError(f"`resume`: {path} cannot be read: {error.strerror}") from error
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _row(line: bytes, where: str, settings: int, vocab_size: int) -> _Row:
    """Raises LayerSkipError for anything that `add` does not write."""
    try:
        row: _Row = build(_Row, parse_json(line, where, LayerSkipError), "")
        if len(row.outputs) != settings:
            raise SchemaError(f"outputs: needed {settings}, found {len(row.outputs)}")
        for place, output in enumerate(row.outputs):
            _require_sound(output, f"outputs[{place}]", vocab_size)
    except SchemaError as error:
        told = "leave `resume` out to begin anew, or remove the line to measure its prompt again"
        raise LayerSkipError(f"{where} is damaged: {error}; {told}") from None
    return row


def _require_sound(output: Output, where: str, vocab_size: int) -> None:
    """Raises SchemaError for counts and times that no measurement gives."""
    wrong = [token for token in output.ids if not 0 <= token < vocab_size]
    if wrong:
        raise SchemaError(f"{where}.ids: needed tokens of 0..{vocab_size - 1}, found {wrong[0]}")
    for number, step in enumerate(output.steps):
        if step.tokens < 0 or not 0 < step.seconds < _AGES:
            raise SchemaError(
                f"{where}.steps[{number}]: needed a count of tokens and a time, found {step.tokens}, {step.seconds}"
            )
    for name, value in asdict(output.stats).items():
        least = 1 if name == "tested_by_position" else 0
        if any(not least <= one < _AGES for one in (value if isinstance(value, tuple) else (value,))):
            raise SchemaError(f"{where}.stats.{name}: needed at least {least}, found {value}")
    if sum(step.tokens for step in output.steps) not in (0, len(output.ids)):
        raise SchemaError(f"{where}.steps: needed {len(output.ids)} tokens in all, as many as ids")
