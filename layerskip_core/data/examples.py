"""Data sets, by name, file, folder or hub id, as examples with prompt and completion or as conversations."""

import csv
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.data import DataConfig
from ..embedded import commands
from ..errors import DataError
from ..files import listed, quoted
from .records import FILE_ENDINGS, TEXT_COLUMN, Record, file_ending, file_records, hub_records, spread, table

MESSAGES = "messages"  # the column of a conversation


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, content), at least one of them the assistant's. `where` is its place, for errors."""

    messages: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)


def conversation_of(record: Record) -> Conversation:
    """The conversation in a row's `messages`. Raises DataError for turns without text and if the assistant has none."""
    messages = record.fields[MESSAGES]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise record.fault("messages must be a list of objects with role and content", messages)
    turns = tuple((message.get("role"), message.get("content")) for message in messages)
    for role, content in turns:
        if not isinstance(role, str) or not isinstance(content, str):
            needed = "role and content of a message must be texts"
            raise DataError(f"{record.where}: {needed}, found {quoted(role)} and {quoted(content)}")
    if not any(role == "assistant" and content.strip() for role, content in turns):
        roles = listed(role for role, _ in turns)
        raise DataError(f"{record.where}: needed a message of the role 'assistant' that is not empty, found {roles}")
    return Conversation(turns, record.where)


PARSING_TEMPLATE = "{prompt}\n"  # of `commands` and `topv2`: utterance, line end, parse
_DEFAULT_COMMANDS = 20_000  # rows, unless a number is given
_MOST_COMMANDS = 5_000_000  # rows; more take minutes to draw and gigabytes of memory
_TOPV2_COLUMNS = ["domain", "utterance", "semantic_parse"]
_TOPV2_HUB = "WillHeld/top_v2"
_TOPV2_SPLITS = {"train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One row: a prompt, empty for plain text, and its completion. `where` is its place, for errors."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)


Row = Example | Conversation


def load_examples(config: DataConfig) -> list[Example]:
    """The rows of a data set, in order; `config.limit` rows, evenly spaced, if it is set.

    Raises:
        DataError: no such data or column, or an empty or malformed row, named as file:line.
    """
    rows = load_rows(config)
    examples = [row for row in rows if isinstance(row, Example)]
    if len(examples) < len(rows):
        raise DataError(f"{config.name} holds conversations (a column 'messages'); needed a prompt and a completion")
    return examples


def load_rows(config: DataConfig) -> list[Row]:
    """Like `load_examples`, but rows with `messages` and no completion become conversations."""
    if config.name == "commands":
        return list(_commands(config))
    return spread(list(_rows(config, streaming=False)), config.limit)


def load_prompts(config: DataConfig) -> list[Example]:
    """The prompts of a data set, whose rows need no completion; the lines of a text file are prompts.

    Raises DataError like `load_examples`.
    """
    if is_parsing(config):
        return [Example(row.prompt, "", row.where) for row in load_examples(config)]
    column = TEXT_COLUMN if file_ending(Path(config.name)) == ".txt" else config.prompt_column
    prompts = []
    for record in load_records(config):
        if MESSAGES in record.fields and column not in record.fields:
            raise DataError(f"{record.where}: conversations have answers, found messages; needed `answers` data")
        prompts.append(Example(record.text(column, "prompt_column"), "", record.where))
    return spread(prompts, config.limit)


def stream_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of a file or a hub data set, read lazily. Raises DataError like `load_examples`."""
    if is_parsing(config):
        raise DataError(f"`streaming` needs a file or a hub id as `data`, got {config.name}, which fits in memory")
    return _rows(config, streaming=True)


def is_parsing(config: DataConfig) -> bool:
    """Whether the data is semantic parsing by name or layout, with PARSING_TEMPLATE as its prompt template."""
    return config.name in ("commands", "topv2") or os.path.isdir(config.name)


def load_records(config: DataConfig, streaming: bool = False) -> Iterator[Record]:
    """The unchanged rows of a file or a hub data set. Raises DataError, also for a name that is neither."""
    path = Path(config.name)
    if os.path.exists(path) or file_ending(path) in FILE_ENDINGS:
        return file_records(path, config.setting)
    if config.name.count("/") == 1 and not path.is_absolute() and not config.name.startswith("."):
        return hub_records(config.name, config.split, streaming)
    kinds = "a .jsonl/.json/.csv/.parquet/.txt file, a folder of TOPv2 files, a hub id"
    raise DataError(f"`{config.setting}` {listed([config.name])} is none of: commands, topv2, {kinds}")


def _rows(config: DataConfig, streaming: bool) -> Iterator[Row]:
    if config.name == "topv2":
        columns = replace(config, prompt_column="utterance", completion_column="semantic_parse")
        return _checked(hub_records(_TOPV2_HUB, _topv2_split(config.split)), columns)
    if os.path.isdir(config.name):
        return _topv2_folder(config)
    if file_ending(Path(config.name)) == ".txt":
        config = replace(config, prompt_column=DataConfig.prompt_column, completion_column=TEXT_COLUMN)
    return _checked(load_records(config, streaming), config)


def _commands(config: DataConfig) -> list[Example]:
    if config.split not in commands.SPLITS:
        raise DataError(f"`split` must be one of {', '.join(commands.SPLITS)} for commands, got {config.split}")
    count = config.limit or _DEFAULT_COMMANDS
    if count > _MOST_COMMANDS:
        raise DataError(f"`data` commands gives at most {_MOST_COMMANDS} rows at a time, got {count} to be drawn")
    try:
        return [Example(row.utterance, row.parse) for row in commands.rows(config.split, count, config.seed)]
    except ValueError as error:
        raise DataError(f"`limit` {config.limit}: {error}") from None


def _topv2_folder(config: DataConfig) -> Iterator[Example]:
    folder, split = Path(config.name), _topv2_split(config.split)
    files = sorted(folder.glob(f"*_{split}.tsv"))
    if not files:
        raise DataError(f"folder {folder} holds no TOPv2 files named DOMAIN_{split}.tsv")
    for file in files:
        rows = table(file, config.setting, delimiter="\t", quoting=csv.QUOTE_NONE)
        _, header = next(rows, (1, []))
        if header != _TOPV2_COLUMNS:
            raise DataError(f"{file}:1: needed the columns {', '.join(_TOPV2_COLUMNS)}, found {listed(header)}")
        for number, row in rows:
            if len(row) != len(_TOPV2_COLUMNS):
                raise DataError(f"{file}:{number}: needed {len(_TOPV2_COLUMNS)} tab-separated fields, found {len(row)}")
            yield _example(row[1], row[2], f"{file}:{number}")


def _topv2_split(split: str) -> str:
    if split not in _TOPV2_SPLITS:
        raise DataError(f"`split` must be one of {', '.join(_TOPV2_SPLITS)} for TOPv2, got {split}")
    return _TOPV2_SPLITS[split]


def _checked(records: Iterator[Record], config: DataConfig) -> Iterator[Row]:
    """Records as rows. The first record decides which columns every row must have."""
    needed: dict[str, str] | None = None
    for record in records:
        if needed is None:
            needed = _needed_columns(record.fields, config)
        for setting, column in needed.items():
            record.value(column, setting)
        yield _row(record, config)


def _needed_columns(columns: Collection[str], config: DataConfig) -> dict[str, str]:
    """Setting -> column: the completion, and the prompt; only plain text may lack the default prompt column."""
    if _is_chat(columns, config):
        return {}
    needed = {"completion_column": config.completion_column}
    if config.prompt_column != DataConfig.prompt_column or config.prompt_column in columns:
        needed["prompt_column"] = config.prompt_column
    return needed


def _is_chat(columns: Collection[str], config: DataConfig) -> bool:
    return MESSAGES in columns and config.completion_column not in columns


def _row(record: Record, config: DataConfig) -> Row:
    if _is_chat(record.fields, config):
        return conversation_of(record)
    completion = record.value(config.completion_column, "completion_column")  # rows of a file may differ
    return _example(record.fields.get(config.prompt_column), completion, record.where)


def _example(prompt: Any, completion: Any, where: str) -> Example:
    if not isinstance(completion, str) or not completion.strip():
        raise DataError(f"{where}: the completion must be a text that is not empty, found {quoted(completion)}")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{where}: the prompt must be a text, found {quoted(prompt)}")
    return Example(prompt or "", completion, where)
