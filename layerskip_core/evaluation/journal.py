"""What a long measurement has found so far, in a file, so that an interrupted one goes on where it stopped."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..decoding import DecodeStats
from ..errors import LayerSkipError
from ..files import require_writable, write_file
from .generation import Output, Step

FILE_NAME = "unfinished.jsonl"
OUTPUTS = "outputs.jsonl"  # what it becomes


class Journal:
    """One JSON line for each prompt and repeat, with the outputs of all settings; the first line says what is measured."""

    def __init__(self, folder: Path, plan: dict[str, Any], resume: bool) -> None:
        """Opens the folder's journal. With `resume` its lines are kept, else it begins anew.

        Raises LayerSkipError when the one there is of another plan, or the file cannot be written.
        """
        self._path = folder / FILE_NAME
        self._known: dict[tuple[int, int], list[Output]] = {}
        head = json.dumps(plan, sort_keys=True)
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if resume and self._path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # an interruption can leave half a line at the end
        if lines and lines[0].strip() != head:
            raise LayerSkipError(f"--resume: {self._path} is of a run with other settings; leave --resume out to begin anew")
        for line in lines[1:]:
            row = json.loads(line)
            self._known[row["repeat"], row["sample"]] = [_output(one) for one in row["outputs"]]
        write_file(self._path, ("".join(lines) or head + "\n").encode(), LayerSkipError)

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


def _output(fields: dict[str, Any]) -> Output:
    stats: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields["stats"].items()
    }
    steps = tuple(Step(*step) for step in fields["steps"])
    return Output(**{**fields, "ids": tuple(fields["ids"]), "steps": steps, "stats": DecodeStats(**stats)})
