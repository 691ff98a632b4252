"""The journal of a benchmark: all outputs as JSON lines, to resume an interrupted run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ..errors import LayerSkipError, shown
from ..files import append_lines, parse_json, whole_lines, write_file
from .results import Output

JOURNAL = "unfinished.jsonl"
OUTPUTS = "outputs.jsonl"  # the journal's name after a complete measurement


class _Row(msgspec.Struct):
    repeat: int
    sample: int
    outputs: list[Output]


class Journal:
    """JSON lines: the run's settings, then all settings' outputs by prompt and repeat; `known`:
    outputs read at the start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """Raises LayerSkipError if the journal to `resume` belongs to other settings, or cannot be
        read.
        """
        self._path = folder / JOURNAL
        head = json.dumps(settings, sort_keys=True).encode()
        lines = whole_lines(self._path, LayerSkipError) if resume else []
        if lines and lines[0].strip() != head:
            self._refuse(lines[0], head)
        self.known: dict[tuple[int, int], list[Output]] = {}
        for line in lines[1:]:
            row = parse_json(line, f"`resume`: {self._path}", LayerSkipError, _Row)
            self.known[row.repeat, row.sample] = row.outputs
        # Without a last line that the interrupt cut
        write_file(self._path, b"".join(lines) or head + b"\n", LayerSkipError)

    def add(self, repeat: int, sample: int, outputs: Sequence[Output]) -> None:
        values = [asdict(output) for output in outputs]
        line = {"repeat": repeat, "sample": sample, "outputs": values}
        append_lines(self._path, [line], LayerSkipError)

    def _refuse(self, old_head: bytes, new_head: bytes) -> None:
        where = f"`resume`: {self._path}"
        old = _by_name(parse_json(old_head, where, LayerSkipError))
        new = _by_name(parse_json(new_head, where, LayerSkipError))
        changes = []
        for name in old | new:
            if old.get(name) != new.get(name):
                changes.append(f"{name} {shown(old.get(name))} then, {shown(new.get(name))} now")
        raise LayerSkipError(
            f"{where} belongs to another run ({', '.join(changes)}); "
            "give `overwrite` instead to start anew"
        )


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested settings, with names in backquotes."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _by_name(value) if isinstance(value, dict) else {f"`{name}`": value}
    return flat
