"""The output for one prompt (tokens, text, times of its steps), and the journal of a run, with which `resume` continues."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..config.decoding import DecodingOptions
from ..decoding import DecodeStats, StopReason
from ..errors import LayerSkipError
from ..files import append_lines, parse_json, require_writable, whole_lines, write_file
from .results import Step

JOURNAL = "unfinished.jsonl"
FOUND_SKIP = "found_skip"  # among the settings: the layers to skip that this run searched
OUTPUTS = "outputs.jsonl"  # its name once the measurement is complete


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt, or the `error` that prevented it. The fields are the journal's.

    The first step is the prefill, which gives the first token. Answers of a batch have no steps.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    steps: tuple[Step, ...] = ()
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: StopReason | None = None
    peak_memory_mb: float | None = None
    error: str | None = None


def require_outputs(outputs: Sequence[Output]) -> None:
    """Raises LayerSkipError if every prompt failed."""
    errors = [output.error for output in outputs if output.error is not None]
    if len(errors) == len(outputs):
        raise LayerSkipError(f"none of the {len(errors)} prompts could be answered; the first: {errors[0]}")


class _Row(msgspec.Struct):
    """One line: the outputs of all settings for one sample in one repeat."""

    repeat: int
    sample: int
    outputs: list[Output]


class Journal:
    """A JSON line for each prompt and repeat, with the outputs of all settings. The first line holds the run's settings.

    `known`: by repeat and sample, the outputs that the interrupted run left.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """Opens the folder's journal. With `resume` its lines are kept, else it starts empty.

        An incomplete last line, left by an interruption, is dropped; its prompt is measured again. Raises LayerSkipError when
        the journal belongs to other settings, when another line is damaged, or when the file cannot be written.
        """
        self._path = folder / JOURNAL
        head = json.dumps(settings, sort_keys=True).encode()
        lines = whole_lines(self._path, LayerSkipError) if resume else []
        if lines and lines[0].strip() != head:
            raise LayerSkipError(
                f"`resume`: {self._path} belongs to a run with other settings or rows; leave out `resume` to start again"
            )
        try:
            rows = [msgspec.json.decode(line, type=_Row) for line in lines[1:]]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LayerSkipError(f"`resume`: {self._path} is damaged: {error}; leave out `resume` to start again") from None
        self.known = {(row.repeat, row.sample): row.outputs for row in rows}
        write_file(self._path, b"".join(lines) or head + b"\n", LayerSkipError)

    def add(self, repeat: int, sample: int, outputs: Sequence[Output]) -> None:
        line = {"repeat": repeat, "sample": sample, "outputs": [asdict(output) for output in outputs]}
        append_lines(self._path, [line], LayerSkipError)


def found_skip(folder: Path) -> DecodingOptions | None:
    """The layers to skip that an interrupted run in this folder searched."""
    lines = whole_lines(folder / JOURNAL, LayerSkipError)
    settings = parse_json(lines[0], f"`resume`: {folder / JOURNAL}", LayerSkipError) if lines else {}
    return msgspec.convert(settings.get(FOUND_SKIP), DecodingOptions | None)


def close_journal(folder: Path) -> None:
    """Renames the journal of a complete run to OUTPUTS: it cannot be resumed any more, and its answers can be read."""
    require_writable(folder / OUTPUTS, LayerSkipError)
    (folder / JOURNAL).replace(folder / OUTPUTS)
