"""Data sets by name, file, folder or hub id -> examples of prompt and completion, or conversations."""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig
from .embedded import commands
from .errors import DataError

PARSING_TEMPLATE = "{prompt}\n"  # of `commands` and `topv2`: utterance, line end, parse
_MESSAGES = "messages"  # the column of a conversation
_DEFAULT_COMMANDS = 20_000  # rows, when nobody says how many
_TOPV2_COLUMNS = ["domain", "utterance", "semantic_parse"]
_TOPV2_HUB = "WillHeld/top_v2"
_TOPV2_SPLITS = {"train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One row: a prompt, possibly empty (plain text), and what should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """One row of chat: messages as (role, content), at least one of them the assistant's."""

    messages: tuple[tuple[str, str], ...]


Row = Example | Conversation


def load_examples(config: DataConfig) -> list[Example]:
    """The rows of a data set, in its order; `config.limit` takes that many, spread evenly over it.

    Raises:
        DataError: no such data, no such column, or a row that is empty or malformed, named file:line.
    """
    rows = load_rows(config)
    examples = [row for row in rows if isinstance(row, Example)]
    if len(examples) < len(rows):
        raise DataError(f"{config.name} holds conversations (a column 'messages'); needed a prompt and a completion")
    return examples


def load_rows(config: DataConfig) -> list[Row]:
    """As `load_examples`; rows with `messages` and no completion become conversations."""
    path = Path(config.name)
    if config.name == "commands":
        return list(_commands(config))
    if config.name == "topv2":
        return _spread(list(_topv2_from_hub(config.split)), config.limit)
    if path.is_dir():
        return _spread(list(_topv2_folder(path, config.split)), config.limit)
    return _spread(list(_files_or_hub(config, streaming=False)), config.limit)


def stream_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of a file or a hub data set one by one, never all in memory. Raises DataError as `load_examples`."""
    if config.name in ("commands", "topv2") or Path(config.name).is_dir():
        raise DataError(f"--streaming needs a file or a hub id as --data, got {config.name}, which fits in memory")
    return _files_or_hub(config, streaming=True)


def _files_or_hub(config: DataConfig, streaming: bool) -> Iterator[Row]:
    path = Path(config.name)
    if path.is_file():
        yield from _file(path, config, streaming)
    elif path.suffix in _READERS:
        raise DataError(f"--data {config.name}: there is no such file")
    elif config.name.count("/") == 1 and not path.is_absolute() and not config.name.startswith("."):
        rows = _load_dataset(config.name, split=config.split, **_streaming(streaming))
        yield from _library_rows(rows, config, config.name)
    else:
        raise DataError(
            f"--data {config.name} is none of: commands, topv2, a .jsonl/.csv/.parquet/.txt file, a folder of TOPv2 files, "
            "a hub id"
        )


def _streaming(wanted: bool) -> dict[str, bool]:
    return {"streaming": True} if wanted else {}


def is_parsing(config: DataConfig) -> bool:
    """Whether the data is semantic parsing by name or layout, with PARSING_TEMPLATE as its prompt template."""
    return config.name in ("commands", "topv2") or Path(config.name).is_dir()


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


def _topv2_from_hub(split: str) -> list[Row]:
    if split not in _TOPV2_SPLITS:
        raise DataError(f"--split must be one of {', '.join(_TOPV2_SPLITS)} for TOPv2, got {split}")
    rows = _load_dataset(_TOPV2_HUB, split=_TOPV2_SPLITS[split])
    config = DataConfig(_TOPV2_HUB, prompt_column="utterance", completion_column="semantic_parse")
    return list(_library_rows(rows, config, _TOPV2_HUB))


def _file(path: Path, config: DataConfig, streaming: bool) -> Iterator[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: needed one of {', '.join(_READERS)}, found the ending {path.suffix or 'none'!r}")
    number = 0
    for number, row in enumerate(reader(path, config, streaming), start=1):  # noqa: B007
        yield row
    if not number:
        raise DataError(f"{path} holds no rows")


# Files of lines are read here and not by datasets, which in silence turns a bad row into None, the text 2020-01-01 into a date,
# 7 into a number and NA into nothing.


def _jsonl(path: Path, config: DataConfig, _: bool) -> Iterator[Row]:
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
        yield _row(row, config, where)


def _csv(path: Path, config: DataConfig, _: bool) -> Iterator[Row]:
    rows = _table(path, strict=True)
    header = next(rows, (1, []))[1]
    _require_columns(header, _needed_columns(header, config), f"{path}:1")
    for number, fields in rows:
        if fields and len(fields) != len(header):
            raise DataError(f"{path}:{number}: needed {len(header)} fields, found {len(fields)}")
        if fields:
            yield _row(dict(zip(header, fields, strict=True)), config, f"{path}:{number}")


def _parquet(path: Path, config: DataConfig, streaming: bool) -> Iterator[Row]:
    rows = _load_dataset("parquet", data_files=str(path), split="train", **_streaming(streaming))
    return _library_rows(rows, config, str(path))


def _text(path: Path, config: DataConfig, _: bool) -> Iterator[Row]:
    lines = (line.rstrip("\r\n") for line in _lines(path))
    yield from (_example("", line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip())


_READERS: dict[str, Callable[[Path, DataConfig, bool], Iterator[Row]]] = {
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


def _library_rows(rows: Any, config: DataConfig, where: str) -> Iterator[Row]:
    """The rows of a datasets.Dataset, or of a stream of one, counted from 1."""
    needed: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if number == 1:
            needed = _needed_columns(list(row), config)
            _require_columns(list(row), needed, where)
        yield _row(row, config, f"{where}:{number}")


def _needed_columns(found: list[str], config: DataConfig) -> dict[str, str]:
    """Flag to column: the completion, and the prompt unless the default one is not among `found` (plain text has none)."""
    if _is_chat(found, config):
        return {}
    needed = {"--completion-column": config.completion_column}
    if config.prompt_column != DataConfig.prompt_column or config.prompt_column in found:
        needed["--prompt-column"] = config.prompt_column
    return needed


def _require_columns(found: list[str], needed: dict[str, str], where: str) -> None:
    for flag, column in needed.items():
        if column not in found:
            raise DataError(f"{where}: no column {column!r} ({flag}); found {', '.join(found) or 'none'}")


def _is_chat(columns: Collection[str], config: DataConfig) -> bool:
    return _MESSAGES in columns and config.completion_column not in columns


def _row(row: Mapping[str, Any], config: DataConfig, where: str) -> Row:
    if _is_chat(row.keys(), config):
        return _conversation(row[_MESSAGES], where)
    if config.completion_column not in row:  # of a file whose rows differ
        raise DataError(f"{where}: no column {config.completion_column!r} (--completion-column); found {', '.join(row)}")
    return _example(row.get(config.prompt_column), row[config.completion_column], where)


def _conversation(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects with role and content, found {messages!r}")
    turns = tuple((message.get("role"), message.get("content")) for message in messages)
    for role, content in turns:
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: a message must have a text as role and as content, found {role!r} and {content!r}")
    if not any(role == "assistant" and content.strip() for role, content in turns):
        raise DataError(
            f"{where}: needed a message of the role 'assistant', found {', '.join(role for role, _ in turns) or 'none'}"
        )
    return Conversation(turns)


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


def _spread(examples: list[Row], limit: int) -> list[Row]:
    """`limit` rows at even distances, so that a sample of a set sorted by domain holds every domain."""
    if not limit or limit >= len(examples):
        return examples
    return [examples[index * len(examples) // limit] for index in range(limit)]
