"""Data sets, by name, file, folder or hub id, as examples with prompt and completion or as conversations."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import msgspec

from ..config.model import DataConfig
from ..embedded import commands
from ..errors import DataError, listed
from .records import FILE_ENDINGS, TEXT_COLUMN, Record, delimited, file_ending, file_records, hub_records, spread

MESSAGES = "messages"  # the column of a conversation
PARSING_TEMPLATE = "{prompt}\n"  # of `commands` and `topv2`: utterance, line end, parse
_DEFAULT_COMMANDS = 20_000  # rows, unless a number is given
_TOPV2_HUB = "WillHeld/top_v2"
_TOPV2_SPLITS = {"train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One row: a prompt, empty for plain text, and its completion. `where` is its place, for errors."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, content), at least one of them the assistant's. `where` is its place, for errors."""

    messages: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)


Row = Example | Conversation


class _Message(msgspec.Struct):
    role: str
    content: str


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
    if config.name != "commands":
        return spread(list(_rows(config, streaming=False)), config.limit)
    if config.split not in commands.SPLITS:
        raise DataError(f"`split` must be one of {', '.join(commands.SPLITS)} for commands, got {config.split}")
    try:
        drawn = commands.rows(config.split, config.limit or _DEFAULT_COMMANDS, config.seed)
        return [Example(row.utterance, row.parse) for row in drawn]
    except ValueError as error:
        raise DataError(f"`limit` {config.limit}: {error}") from None


def load_prompts(config: DataConfig) -> list[Example]:
    """The prompts of a data set, whose rows need no completion; the lines of a text file are prompts.

    Raises DataError like `load_examples`.
    """
    if is_parsing(config):
        return [replace(row, completion="") for row in load_examples(config)]
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
    prompt, completion = config.prompt_column, config.completion_column
    if is_parsing(config):
        prompt, completion, records = "utterance", "semantic_parse", _topv2(config)
    else:
        records = load_records(config, streaming)
        if file_ending(Path(config.name)) == ".txt":
            prompt, completion = DataConfig.prompt_column, TEXT_COLUMN
    needs_prompt = None if prompt == DataConfig.prompt_column else True  # only plain text may lack the usual column
    for record in records:
        if MESSAGES in record.fields and completion not in record.fields:
            yield _conversation(record)
            continue
        text = record.value(completion, "completion_column")
        needs_prompt = prompt in record.fields if needs_prompt is None else needs_prompt
        asked = record.value(prompt, "prompt_column") if needs_prompt else record.fields.get(prompt)
        if not isinstance(text, str) or not text.strip():
            raise record.fault("the completion must be a text that is not empty", text)
        if not isinstance(asked, str | None):
            raise record.fault("the prompt must be a text", asked)
        yield Example(asked or "", text, record.where)


def _topv2(config: DataConfig) -> Iterator[Record]:
    """The rows of a folder of TOPv2's files, or of its copy on the hub."""
    if config.split not in _TOPV2_SPLITS:
        raise DataError(f"`split` must be one of {', '.join(_TOPV2_SPLITS)} for TOPv2, got {config.split}")
    split = _TOPV2_SPLITS[config.split]
    if config.name == "topv2":
        return hub_records(_TOPV2_HUB, split)
    files = sorted(Path(config.name).glob(f"*_{split}.tsv"))
    if not files:
        raise DataError(f"folder {config.name} holds no TOPv2 files named DOMAIN_{split}.tsv")
    return chain.from_iterable(delimited(file, config.setting, delimiter="\t", quoting=csv.QUOTE_NONE) for file in files)


def _conversation(record: Record) -> Conversation:
    """Raises DataError for turns without text and if the assistant has none."""
    try:
        messages = msgspec.convert(record.fields[MESSAGES], list[_Message])
    except msgspec.ValidationError as error:
        raise DataError(f"{record.where}: messages must be a list of objects with role and content: {error}") from None
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        roles = listed(message.role for message in messages)
        raise DataError(f"{record.where}: needed a message of the role 'assistant' that is not empty, found {roles}")
    return Conversation(tuple((message.role, message.content) for message in messages), record.where)
