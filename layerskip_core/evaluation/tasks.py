"""What a model is evaluated on: prompts with references, and how answers to them are scored."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import DataConfig, TaskConfig
from ..data import Example, is_parsing, load_examples
from ..errors import DataError
from .metrics import exact_match, rouge2

PARSING_TASKS = ("commands", "topv2")
_MAX_NEW_TOKENS = 128  # more than twice the mean parse
_REFERENCE_COLUMNS = ("completion", "reference")


@dataclass(frozen=True)
class Task:
    """Prompts with references. Parsing is scored by exact match, whitespace folded; other text by ROUGE-2 and exact match."""

    name: str
    examples: tuple[Example, ...]
    parsing: bool
    max_new_tokens: int
    config: TaskConfig  # with every default filled in

    @property
    def quality_metric(self) -> str:
        """The metric, of those that `score` returns, that says how good an exit is."""
        return "exact_match" if self.parsing else "rouge2"

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """Each metric, in 0..1, of one prediction for each example; an answer that failed is an empty text."""
        references = [example.completion for example in self.examples]
        if self.parsing:
            return {"exact_match": exact_match(predictions, references, fold_whitespace=True)}
        return {"rouge2": rouge2(predictions, references), "exact_match": exact_match(predictions, references)}


def load_task(config: TaskConfig) -> Task:
    """The task's rows, read at once.

    Raises:
        DataError: no such data, no such column, no rows, a malformed row, or a row without a prompt.
    """
    name = config.task or config.data or "commands"
    source = config.data or name
    column = config.completion_column or _reference_column(Path(source))
    data = DataConfig(source, config.split, config.prompt_column, column, config.samples, config.seed)
    examples = tuple(load_examples(data))
    if not examples:
        raise DataError(f"--data {source} has no rows in split {config.split}")
    for number, example in enumerate(examples, start=1):
        if not example.prompt.strip():
            raise DataError(f"--data {source}: a task needs a prompt in every row, found none in row {number} of those read")
    limit = config.max_new_tokens or _MAX_NEW_TOKENS
    resolved = replace(config, task=name, data=source, max_new_tokens=limit, completion_column=column)
    return Task(name, examples, name in PARSING_TASKS or is_parsing(data), limit, resolved)


def _reference_column(path: Path) -> str:
    """The first of the usual names that stands in the first row of a JSONL or CSV file; `completion` where none does."""
    found: list[str] = []
    if path.is_file() and path.suffix in (".jsonl", ".json", ".csv"):
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            first = next((line for line in lines if line.strip()), "")
        found = next(csv.reader([first]), []) if path.suffix == ".csv" else _keys(first)
    return next((name for name in _REFERENCE_COLUMNS if name in found), _REFERENCE_COLUMNS[0])


def _keys(line: str) -> list[str]:
    """Keys of a JSON object; none of anything else, which `load_examples` will name with its line."""
    try:
        row = json.loads(line)
    except ValueError:
        return []
    return list(row) if isinstance(row, dict) else []
