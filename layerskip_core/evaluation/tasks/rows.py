"""Rows of files and hub data sets, of which a task takes the fields it knows; samples and shots of them."""

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import DataError

ENDINGS = (".jsonl", ".json", ".gz")
Item = TypeVar("Item")


class Row(NamedTuple):
    """A row's fields, and where it stands."""

    where: str
    fields: dict[str, Any]

    def text(self, column: str, flag: str = "") -> str:
        """A field that is a text, or a list of sentences. Raises DataError when it is neither, or empty."""
        texts = self.texts(column, flag)
        return texts[0] if len(texts) == 1 else " ".join(sentence.strip() for sentence in texts)

    def texts(self, column: str, flag: str = "") -> list[str]:
        """A field that is a text or several. Raises DataError when it is neither, or one is empty."""
        if column not in self.fields:
            raise DataError(f"{self.where}: no column {column!r}{f' ({flag})' if flag else ''}; found {self._columns()}")
        value = self.fields[column]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one.strip() for one in texts):
            raise DataError(f"{self.where}: {column} must be a text that is not empty, or a list of such, found {value!r}")
        return [one.replace("\r\n", "\n") for one in texts]

    def first_column(self, names: Sequence[str]) -> str:
        """The first of the names that is a column; the first of all where none is, for an error to name."""
        return next((name for name in names if name in self.fields), names[0])

    def _columns(self) -> str:
        return ", ".join(self.fields) or "none"


def file_rows(path: Path) -> list[Row]:
    """The objects of a file of JSON lines, or of one JSON array; gzip'ed where it ends in .gz. Raises DataError."""
    if not path.is_file():
        raise DataError(f"--data {path}: there is no such file")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from None
    is_array = path.suffix == ".json" and content.lstrip().startswith("[")
    rows = []
    for where, value in _array(content, path) if is_array else _lines(content, path):
        if not isinstance(value, dict):
            raise DataError(f"{where}: needed a JSON object a line, found {type(value).__name__}")
        rows.append(Row(where, value))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def hub_rows(hub_id: str, split: str, most: int | None = None, **keywords: Any) -> list[Row]:
    """Rows of a data set on the hub; with `most` only the first ones are fetched. Raises DataError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(hub_id, split=split, streaming=most is not None, **keywords)
        return [Row(f"{hub_id}:{number}", row) for number, row in enumerate(islice(found, most), start=1)]
    except Exception as error:  # datasets and the hub client raise many kinds; each means the data cannot be read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load data {hub_id}: {reason}; a file with its rows can be given by --data") from error


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """`limit` items (0: all) at even distances."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def _array(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    yield from ((f"{path}: row {number}", value) for number, value in enumerate(values, start=1))


def _lines(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
