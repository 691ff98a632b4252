"""Data sets by name, file, folder or hub id: their rows, as records, examples or conversations."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from .config.evaluation import PROMPT_NAMES, REFERENCE_NAMES
from .config.model import COMPLETION_COLUMNS, PROMPT_COLUMNS, DataConfig
from .embedded import commands
from .errors import DataError, first_line, listed, refused, shown
from .files import parse_json, text_lines
from .splits import key_of

MESSAGES = "messages"  # the column of a conversation
_PARSING_SETS = ("commands", "topv2")
# Columns that make a row's key
_CONTENT = frozenset((*PROMPT_NAMES, *REFERENCE_NAMES, *PROMPT_COLUMNS, *COMPLETION_COLUMNS))
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT names them
_USUAL = {names[0]: names for names in (PROMPT_COLUMNS, COMPLETION_COLUMNS)}
TEXT_COLUMN = "text"  # of a .txt file, whose lines are its rows
PARSING_TEMPLATE = "{prompt}\n"  # of `commands` and `topv2`: utterance, line end, parse
_DEFAULT_COMMANDS = 20_000  # rows, unless a number is given
_TOPV2_HUB = "WillHeld/top_v2"
_TOPV2_SPLITS = {"train": "train", "validation": "eval", "test": "test"}
_MAX_FIELD = 1 << 30  # characters of a CSV field
_PARQUET_ROWS = 1000  # per read

Item = TypeVar("Item")


# `datasets` is not used for files: it silently changes values (2020-01-01, 7, NA, bad rows) and
# keeps a copy of each file.


class Record(NamedTuple):
    """A row's fields. `where`: file:line, or the data's name and the row's number."""

    where: str
    fields: dict[str, Any]

    @property
    def key(self) -> str:
        """A hash of its content (splits.py)."""
        return key_of(self.fields, _CONTENT)

    def text(self, column: str, setting: str = "") -> str:
        """A text field; a list of sentences is joined. Raises DataError for other values and for
        empty ones.
        """
        texts = self.texts(column, setting)
        return texts[0] if len(texts) == 1 else " ".join(sentence.strip() for sentence in texts)

    def texts(self, column: str, setting: str = "") -> list[str]:
        """A field with one or several texts. Raises DataError for other values and for empty
        texts.
        """
        value = self.value(column, setting)
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise self.fault(f"{column} must be a text that is not empty, or a list of them", value)
        return [text.replace("\r\n", "\n") for text in texts]

    def value(self, column: str, setting: str = "", others: Sequence[str] = ()) -> Any:
        """Any field. Raises DataError if the row has no such column. `others`: further possible
        names.
        """
        if column in self.fields:
            return self.fields[column]
        absent = repr(column)
        if others:
            absent += f", nor {', '.join(others)}"
        if setting:
            absent += f" (`{setting}`)"
        raise DataError(f"{self.where}: no column {absent}; found {listed(self.fields)}")

    def first_column(self, names: Sequence[str]) -> str:
        """The first name that is a column, else the first name, for the error to come."""
        return next((name for name in names if name in self.fields), names[0])

    def as_usual(self) -> "Record":
        """Joins Alpaca's `instruction` and `input` to one prompt, turns ShareGPT's turns into
        `messages`; else unchanged.
        """
        fields = self.fields
        instruction = fields.get("instruction")
        text = fields.get("input")
        if isinstance(instruction, str) and isinstance(text, str) and text.strip():
            return Record(self.where, {**fields, "instruction": f"{instruction}\n\n{text}"})
        turns = fields.get("conversations")
        if MESSAGES in fields or not isinstance(turns, list):
            return self
        messages = []
        for turn in turns:
            if not isinstance(turn, dict):
                return self
            role = turn.get("from")
            if isinstance(role, str):  # other values are refused as those of messages are
                role = _ROLES.get(role, role)
            messages.append({"role": role, "content": turn.get("value")})
        return Record(self.where, {**fields, MESSAGES: messages})

    def fault(self, needed: str, found: Any) -> DataError:
        """An error that names the row, what was needed and what was found."""
        return DataError(f"{self.where}: {needed}, found {shown(repr(found))}")


def file_records(path: Path, setting: str = "data") -> Iterator[Record]:
    """The rows of a file: JSON lines (.jsonl, .json, .gz), a JSON array (.json), CSV, Parquet, or a
    text's lines (.txt).

    All formats but Parquet may be gzipped (.gz after the ending), and all but JSON arrays are read
    lazily. Raises DataError, possibly after some rows, for another format, a damaged file and one
    without rows.
    """
    ending = file_ending(path)
    if ending not in _READERS:
        raise DataError(
            f"{path}: needed one of {', '.join(_READERS)}, found the ending {ending or 'none'!r}"
        )
    row = None
    for row in _READERS[ending](path, setting):
        yield row
    if row is None:
        raise DataError(f"{path} holds no rows")


def file_ending(path: Path) -> str:
    """The ending that decides the format, without .gz; .jsonl for .gz alone."""
    if path.suffix != ".gz":
        return path.suffix
    inner = Path(path.stem).suffix
    return inner if inner in FILE_ENDINGS and inner != ".parquet" else ".jsonl"


def quiet_datasets() -> None:
    """Silences datasets and the hub client: an error is reported once, by the caller."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(logging.CRITICAL)


def hub_records(
    hub_id: str, split: str, streaming: bool = False, most: int | None = None, **keywords: Any
) -> Iterator[Record]:
    """The rows of a data set on the hub; `most` fetches only the first ones. Raises DataError."""
    import datasets

    quiet_datasets()
    try:
        rows = datasets.load_dataset(
            hub_id, split=split, streaming=streaming or most is not None, **keywords
        )
        yield from (
            Record(f"{hub_id}:{number}", dict(row))
            for number, row in enumerate(islice(rows, most), start=1)
        )
    # Datasets and the hub client raise many kinds; each means the data cannot be read
    except Exception as error:
        reason = f"{first_line(error)}; a file with its rows can be given by `data`"
        raise DataError(f"cannot load data {hub_id}: {reason}") from error


def delimited(path: Path, setting: str, **dialect: Any) -> Iterator[Record]:
    """The rows below a header of column names; columns without a name are left out. Raises
    DataError.
    """
    csv.field_size_limit(_MAX_FIELD)
    rows = csv.reader(text_lines(path, setting), **dialect)
    header: list[str] = []
    number = 1
    try:
        for fields in rows:
            where = f"{path}:{number}"
            number = rows.line_num + 1
            if not header:
                header = fields
                repeated = [name for name, count in Counter(header).items() if name and count > 1]
                if repeated:
                    raise DataError(
                        f"{where}: needed distinct column names, found {listed(repeated)} more than once"
                    )
            elif fields and len(fields) != len(header):
                raise DataError(f"{where}: needed {len(header)} fields, found {len(fields)}")
            elif fields:
                named = zip(header, fields, strict=True)
                yield Record(where, {name: field for name, field in named if name})
    except csv.Error as error:
        raise DataError(f"{path}:{number}: {error}") from None


def _json(path: Path, setting: str) -> Iterator[Record]:
    """One object per line; a .json file may also hold an array of objects."""
    lines = text_lines(path, setting)
    numbered = (
        (f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()
    )
    where, first = next(numbered, ("", ""))
    if file_ending(path) == ".json" and first.lstrip().startswith("["):
        array = parse_json("".join((first, *lines)), str(path), DataError)
        values = ((f"{path}: row {number}", value) for number, value in enumerate(array, start=1))
    else:
        rest = chain([(where, first)] if first else [], numbered)
        values = ((where, parse_json(line, where, DataError)) for where, line in rest)
    for where, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{where}: needed a JSON object, found {type(value).__name__}")
        yield Record(where, value)


def _parquet(path: Path, setting: str) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        source = ParquetFile(path, page_checksum_verification=True)
        for batch in source.iter_batches(_PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}:{number}", fields)
    # PyArrow raises many kinds; each means a damaged file or unusual types
    except Exception as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"`{setting}` {path}: not readable as Parquet{place}: {first_line(error)}"
        ) from None


def _text(path: Path, setting: str) -> Iterator[Record]:
    for number, line in enumerate(text_lines(path, setting), start=1):
        if line.strip():
            yield Record(f"{path}:{number}", {TEXT_COLUMN: line.rstrip("\r\n")})


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": partial(delimited, strict=True),
    ".parquet": _parquet,
    ".txt": _text,
}
FILE_ENDINGS = tuple(_READERS)


@dataclass(frozen=True)
class Example:
    """One row: a prompt, empty for plain text, and its completion. `where` is its place, for
    errors; `key`: see splits.py.
    """

    prompt: str
    completion: str
    where: str = field(default="", compare=False)
    key: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, content), at least one of them the assistant's. `where` and `key` as in an
    Example.
    """

    messages: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)
    key: str = field(default="", compare=False)


Row = Example | Conversation


class _Message(msgspec.Struct):
    role: str
    content: str


def load_examples(config: DataConfig) -> list[Example]:
    """The rows of a data set in order, or `config.limit` evenly spaced ones. Raises DataError with
    file:line.
    """
    rows = load_rows(config)
    examples = [row for row in rows if isinstance(row, Example)]
    if len(examples) < len(rows):
        raise DataError(
            f"{config.name} holds conversations (a column 'messages'); needed a prompt and a completion"
        )
    return examples


def load_rows(config: DataConfig) -> list[Row]:
    """Like `load_examples`, but rows with `messages` and no completion become conversations."""
    if config.name != "commands":
        return spread(list(_rows(config, streaming=False)), config.limit)
    if config.split not in commands.SPLITS:
        raise refused(
            "split", f"one of {', '.join(commands.SPLITS)}", f"{config.split} for commands"
        )
    try:
        drawn = commands.rows(config.split, config.limit or _DEFAULT_COMMANDS, config.seed)
        pairs = [{"prompt": row.utterance, "completion": row.parse} for row in drawn]
        return [Example(**pair, key=key_of(pair, _CONTENT)) for pair in pairs]
    except ValueError as error:
        raise DataError(f"`limit` {config.limit}: {error}") from None


def load_prompts(config: DataConfig) -> list[Example]:
    """The prompts of a data set; rows without one are left out. Raises DataError like
    `load_examples`.
    """
    if is_parsing(config):
        return [replace(row, completion="") for row in load_examples(config)]
    names = _prompt_columns(config)
    prompts = []
    for record in load_records(config):
        column = record.first_column(names)
        if MESSAGES in record.fields and column not in record.fields:
            raise DataError(
                f"{record.where}: conversations have answers, found messages; needed `answers` data"
            )
        if _holds_text(record.value(column, "prompt_column", names[1:])):
            prompts.append(
                Example(record.text(column, "prompt_column"), "", record.where, record.key)
            )
        names = (column,)  # the first row decides
    if not prompts:
        raise DataError(
            f"no row of {config.name} has a prompt in the column {names[0]!r} (`prompt_column`)"
        )
    return spread(prompts, config.limit)


def has_prompts(config: DataConfig) -> bool:
    """Whether the first row has a prompt; True for a named column, whose absence is an error.
    Raises DataError.
    """
    if is_parsing(config) or config.prompt_column not in (TEXT_COLUMN, DataConfig.prompt_column):
        return True
    first = next(load_records(config, streaming=True))
    return _holds_text(first.fields.get(first.first_column(_prompt_columns(config))))


def _prompt_columns(config: DataConfig) -> tuple[str, ...]:
    """The possible columns of prompts."""
    if file_ending(Path(config.name)) == ".txt":
        return (TEXT_COLUMN,)
    return _USUAL.get(config.prompt_column, (config.prompt_column,))


def _holds_text(prompt: Any) -> bool:
    return prompt is not None and (not isinstance(prompt, str) or bool(prompt.strip()))


def stream_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of a file or a hub data set, read lazily. Raises DataError like `load_examples`."""
    if is_parsing(config):
        raise DataError(
            f"`streaming` needs a file or a hub id as `data`, got {config.name}, which fits in memory"
        )
    return _rows(config, streaming=True)


def is_parsing(config: DataConfig) -> bool:
    """Whether the data is for semantic parsing (PARSING_TEMPLATE). A folder is: other data are files."""
    return config.name in _PARSING_SETS or os.path.isdir(config.name)


def own_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that parsing data has by its name or files; none for files and hub data sets,
    whose splits are not known.
    """
    if config.name == "commands":
        return commands.SPLITS
    if not is_parsing(config):
        return ()
    if config.name == "topv2":
        return tuple(_TOPV2_SPLITS)
    splits = []
    for split, name in _TOPV2_SPLITS.items():
        if any(Path(config.name).glob(f"*_{name}.tsv")):
            splits.append(split)
    return tuple(splits)


def load_records(config: DataConfig, streaming: bool = False) -> Iterator[Record]:
    """The rows of a file or a hub data set, by `as_usual`. Raises DataError, also for a name that
    is neither.
    """
    require_data(config.name, config.setting)
    path = Path(config.name)
    if os.path.exists(path) or file_ending(path) in FILE_ENDINGS:
        rows = file_records(path, config.setting)
    else:
        rows = hub_records(config.name, config.split, streaming)
    return map(Record.as_usual, rows)


def require_data(name: str, setting: str = "data") -> None:
    """Raises DataError for a missing file, and for a name that no data can have. Reads nothing."""
    path = Path(name)
    if name in _PARSING_SETS or os.path.exists(path):
        return
    if file_ending(path) in FILE_ENDINGS:
        raise DataError(f"`{setting}` {path}: there is no such file")
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        kinds = "a .jsonl/.json/.csv/.parquet/.txt file, a folder of TOPv2 files, a hub id"
        raise DataError(f"`{setting}` {listed([name])} is none of: commands, topv2, {kinds}")


def is_data(name: str) -> bool:
    """Whether a value of `validation` or `task` names data, and not a split or a task."""
    named = name in _PARSING_SETS or "/" in name or Path(name).exists() or Path(name).suffix != ""
    return named and name not in commands.SPLITS


def first_turn(record: Record) -> tuple[str, str]:
    """A conversation's first user message and the answer to it. Raises DataError if it has none."""
    messages = iter(_conversation(record).messages)
    # The answer is the first one after the message: both searches share an iterator
    asked = next((text for role, text in messages if role == "user"), "")
    answer = next((text for role, text in messages if role == "assistant"), "")
    if not asked.strip() or not answer.strip():
        needed = "messages must have one of the role 'user', and an answer to it"
        raise record.fault(needed, record.fields[MESSAGES])
    return asked, answer


def _rows(config: DataConfig, streaming: bool) -> Iterator[Row]:
    prompts = _USUAL.get(config.prompt_column, (config.prompt_column,))
    completions = _USUAL.get(config.completion_column, (config.completion_column,))
    if is_parsing(config):
        prompts = ("utterance",)
        completions = ("semantic_parse",)
        records = _topv2(config)
    else:
        records = load_records(config, streaming)
        if file_ending(Path(config.name)) == ".txt":
            prompts = PROMPT_COLUMNS
            completions = (TEXT_COLUMN,)
    # Only plain text may lack the usual column, which the first row decides
    needs_prompt = None if prompts == PROMPT_COLUMNS else True
    for record in records:
        prompt = record.first_column(prompts)
        completion = record.first_column(completions)
        if MESSAGES in record.fields and completion not in record.fields:
            yield _conversation(record)
            continue
        text = record.value(completion, "completion_column", completions[1:])
        if needs_prompt is None:
            needs_prompt = prompt in record.fields
        # Later rows must have the columns of the first
        prompts = (prompt,)
        completions = (completion,)
        asked = record.fields.get(prompt)
        if needs_prompt:
            asked = record.value(prompt, "prompt_column")
        if not isinstance(text, str) or not text.strip():
            raise record.fault("the completion must be a text that is not empty", text)
        if not isinstance(asked, str | None):
            raise record.fault("the prompt must be a text", asked)
        yield Example(asked or "", text, record.where, record.key)


def _topv2(config: DataConfig) -> Iterator[Record]:
    """The rows of a folder with TOPv2's files, or of the data set's copy on the hub."""
    if config.split not in _TOPV2_SPLITS:
        raise refused("split", f"one of {', '.join(_TOPV2_SPLITS)}", f"{config.split} for TOPv2")
    split = _TOPV2_SPLITS[config.split]
    if config.name == "topv2":
        return hub_records(_TOPV2_HUB, split)
    files = sorted(Path(config.name).glob(f"*_{split}.tsv"))
    if not files:
        raise DataError(f"folder {config.name} holds no TOPv2 files named DOMAIN_{split}.tsv")
    return chain.from_iterable(
        delimited(file, config.setting, delimiter="\t", quoting=csv.QUOTE_NONE) for file in files
    )


def _conversation(record: Record) -> Conversation:
    """Raises DataError for messages that are malformed, or have no text of the assistant."""
    try:
        messages = msgspec.convert(record.fields[MESSAGES], list[_Message])
    except msgspec.ValidationError as error:
        raise DataError(
            f"{record.where}: messages must be a list of objects with role and content: {error}"
        ) from None
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        roles = listed(message.role for message in messages)
        raise DataError(
            f"{record.where}: needed a message of the role 'assistant' that is not empty, found {roles}"
        )
    return Conversation(
        tuple((message.role, message.content) for message in messages), record.where, record.key
    )


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """`limit` evenly spaced items (0: all), so that a sample of sorted data has every domain."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
