"""Data sets by name, file, folder or hub id -> examples of prompt and completion -> token ids with masked prompts."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import encode_prompt
from .config import DataConfig
from .embedded import commands
from .errors import DataError
from .training.exit_loss import IGNORED

PARSING_TEMPLATE = "{prompt}\n"  # of `commands` and `topv2`: utterance, line end, parse
_DEFAULT_COMMANDS = 20_000  # rows, when nobody says how many
_TOPV2_COLUMNS = ["domain", "utterance", "semantic_parse"]
_TOPV2_HUB = "WillHeld/top_v2"
_TOPV2_SPLITS = {"train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One row: a prompt, possibly empty (plain text), and what should follow it."""

    prompt: str
    completion: str


def load_examples(config: DataConfig) -> list[Example]:
    """The rows of a data set, in its order; `config.limit` takes that many, spread evenly over it.

    Raises:
        DataError: no such data, no such column, or a row that is empty or malformed, named file:line.
    """
    path = Path(config.name)
    if config.name == "commands":
        return _commands(config)
    if config.name == "topv2":
        return _spread(_topv2_from_hub(config.split), config.limit)
    if path.is_dir():
        return _spread(list(_topv2_folder(path, config.split)), config.limit)
    if path.is_file():
        return _spread(_file(path, config), config.limit)
    if path.suffix in _READERS:
        raise DataError(f"--data {config.name}: there is no such file")
    if config.name.count("/") == 1 and not path.is_absolute() and not config.name.startswith("."):
        rows = _load_dataset(config.name, split=config.split)
        return _spread(list(_library_rows(rows, config, config.name)), config.limit)
    raise DataError(
        f"--data {config.name} is none of: commands, topv2, a .jsonl/.csv/.parquet/.txt file, a folder of TOPv2 files, a hub id"
    )


def is_parsing(config: DataConfig) -> bool:
    """Whether the data is semantic parsing by name or layout, with PARSING_TEMPLATE as its prompt template."""
    return config.name in ("commands", "topv2") or Path(config.name).is_dir()


@dataclass(frozen=True)
class EncodedData:
    """Tokenised rows, for a Trainer. `truncated` rows were cut at the maximum length; `tokens` counts all that are left."""

    rows: Any  # datasets.Dataset of input_ids, labels and length
    tokens: int
    target_tokens: int
    truncated: int


def encode_examples(examples: list[Example], tokenizer: Any, template: str | None, max_length: int) -> EncodedData:
    """Prompt, completion and end of text as ids, the prompt's labels masked.

    Raises DataError when no row has a completion token within `max_length`.
    """
    from datasets import Dataset

    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    completions = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
    rows: list[dict[str, Any]] = []
    truncated = targets = 0
    for example, completion in zip(examples, completions, strict=True):
        prompt = encode_prompt(tokenizer, template if example.prompt else None, example.prompt)
        ids = prompt + list(completion) + eos
        truncated += len(ids) > max_length
        ids = ids[:max_length]
        if len(ids) > max(len(prompt), 1):
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            targets += len(ids) - len(prompt)
            rows.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    if not rows:
        raise DataError(f"no row has room for a completion within --max-length {max_length}: every prompt is longer")
    return EncodedData(Dataset.from_list(rows), sum(len(row["input_ids"]) for row in rows), targets, truncated)


@dataclass(frozen=True)
class Collator:
    """Rows to a batch (B, T), padded at the right: causality alone then keeps real tokens from seeing padding."""

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        labels[:, 0] = IGNORED  # nothing predicts a row's first token; it must not count as a target either
        batch = {"input_ids": input_ids, "labels": labels}
        if "documents" in rows[0]:
            batch["documents"] = torch.full((len(rows), length), -1, dtype=torch.long)
            for index, row in enumerate(rows):
                batch["documents"][index, : len(row["documents"])] = torch.tensor(row["documents"])
        return batch


def _commands(config: DataConfig) -> list[Example]:
    if config.split not in commands.SPLITS:
        raise DataError(f"--split must be one of {', '.join(commands.SPLITS)} for commands, got {config.split}")
    rows = commands.rows(config.split, config.limit or _DEFAULT_COMMANDS, config.seed)
    try:
        return [Example(row.utterance, row.parse) for row in rows]
    except ValueError as error:
        raise DataError(f"--samples {config.limit}: {error}") from None


def _topv2_folder(folder: Path, split: str) -> Iterator[Example]:
    if split not in _TOPV2_SPLITS:
        raise DataError(f"--split must be one of {', '.join(_TOPV2_SPLITS)} for TOPv2, got {split}")
    files = sorted(folder.glob(f"*_{_TOPV2_SPLITS[split]}.tsv"))
    if not files:
        raise DataError(f"folder {folder} holds no TOPv2 files named DOMAIN_{_TOPV2_SPLITS[split]}.tsv")
    for file in files:
        rows = _table(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        _, header = next(rows, (1, []))
        if header != _TOPV2_COLUMNS:
            raise DataError(f"{file}:1: needed the columns {', '.join(_TOPV2_COLUMNS)}, found {', '.join(header) or 'none'}")
        for number, row in rows:
            if len(row) != len(_TOPV2_COLUMNS):
                raise DataError(f"{file}:{number}: needed {len(_TOPV2_COLUMNS)} tab-separated fields, found {len(row)}")
            yield _example(row[1], row[2], f"{file}:{number}")


def _topv2_from_hub(split: str) -> list[Example]:
    if split not in _TOPV2_SPLITS:
        raise DataError(f"--split must be one of {', '.join(_TOPV2_SPLITS)} for TOPv2, got {split}")
    rows = _load_dataset(_TOPV2_HUB, split=_TOPV2_SPLITS[split])
    config = DataConfig(_TOPV2_HUB, prompt_column="utterance", completion_column="semantic_parse")
    return list(_library_rows(rows, config, _TOPV2_HUB))


def _file(path: Path, config: DataConfig) -> list[Example]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: needed one of {', '.join(_READERS)}, found the ending {path.suffix or 'none'!r}")
    examples = list(reader(path, config))
    if not examples:
        raise DataError(f"{path} holds no rows")
    return examples


# Files of lines are read here and not by datasets, which in silence turns a bad row into None, the text 2020-01-01 into a date,
# 7 into a number and NA into nothing.


def _jsonl(path: Path, config: DataConfig) -> Iterator[Example]:
    needed: dict[str, str] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: needed a JSON object a line, found {type(row).__name__}")
        needed = needed or _needed_columns(list(row), config)
        _require_columns(list(row), needed, where)
        yield _example(row.get(config.prompt_column), row[config.completion_column], where)


def _csv(path: Path, config: DataConfig) -> Iterator[Example]:
    rows = _table(path, strict=True)
    _, header = next(rows, (1, []))
    _require_columns(header, _needed_columns(header, config), f"{path}:1")
    for number, fields in rows:
        if fields and len(fields) != len(header):
            raise DataError(f"{path}:{number}: needed {len(header)} fields, found {len(fields)}")
        if fields:
            row = dict(zip(header, fields, strict=True))
            yield _example(row.get(config.prompt_column), row[config.completion_column], f"{path}:{number}")


def _parquet(path: Path, config: DataConfig) -> Iterator[Example]:
    return _library_rows(_load_dataset("parquet", data_files=str(path), split="train"), config, str(path))


def _text(path: Path, _: DataConfig) -> Iterator[Example]:
    lines = (line.rstrip("\r\n") for line in _lines(path))
    yield from (_example("", line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip())


_READERS: dict[str, Callable[[Path, DataConfig], Iterator[Example]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends kept and a byte order mark at the start left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
            yield text


def _table(path: Path, **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a delimited file, each with the number of its last line."""
    rows = csv.reader(_lines(path), **dialect)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}") from None


def _library_rows(rows: Any, config: DataConfig, where: str) -> Iterator[Example]:
    """The rows of a datasets.Dataset, counted from 1."""
    _require_columns(rows.column_names, _needed_columns(rows.column_names, config), where)
    for number, row in enumerate(rows, start=1):
        yield _example(row.get(config.prompt_column), row[config.completion_column], f"{where}:{number}")


def _needed_columns(found: list[str], config: DataConfig) -> dict[str, str]:
    """Flag to column: the completion, and the prompt unless the default one is not among `found` (plain text has none)."""
    needed = {"--completion-column": config.completion_column}
    if config.prompt_column != DataConfig.prompt_column or config.prompt_column in found:
        needed["--prompt-column"] = config.prompt_column
    return needed


def _require_columns(found: list[str], needed: dict[str, str], where: str) -> None:
    for flag, column in needed.items():
        if column not in found:
            raise DataError(f"{where}: no column {column!r} ({flag}); found {', '.join(found) or 'none'}")


def _example(prompt: Any, completion: Any, where: str) -> Example:
    if not isinstance(completion, str) or not completion.strip():
        raise DataError(f"{where}: the completion must be a text that is not empty, found {completion!r}")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{where}: the prompt must be a text, found {prompt!r}")
    return Example(prompt or "", completion)


def _load_dataset(name: str, **keywords: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, **keywords)
    except Exception as error:  # datasets and the hub client raise many kinds; each means the data cannot be read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load data {keywords.get('data_files', name)}: {reason}") from error


def _spread(examples: list[Example], limit: int) -> list[Example]:
    """`limit` rows at even distances, so that a sample of a set sorted by domain holds every domain."""
    if not limit or limit >= len(examples):
        return examples
    return [examples[index * len(examples) // limit] for index in range(limit)]
