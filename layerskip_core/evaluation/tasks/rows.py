"""The rows of tasks, from a file or from a data set on the hub; the first ones can be shots."""

from pathlib import Path
from typing import Any, TypeVar

from ...config.checks import require
from ...data.records import Record, file_records, hub_records

Item = TypeVar("Item")


def file_rows(path: str) -> list[Record]:
    """All rows of a file, at least one. Raises DataError."""
    return list(file_records(Path(path)))


def hub_rows(hub_id: str, split: str, most: int | None = None, **keywords: Any) -> list[Record]:
    """All rows of a data set on the hub, or only its first `most` rows. Raises DataError."""
    return list(hub_records(hub_id, split, most=most, **keywords))


def shots_and_rest(rows: list[Item], count: int, source: str) -> tuple[list[Item], list[Item]]:
    """The first `count` rows and the others. Raises ConfigError if the shots leave no rows."""
    require(count < len(rows) or not count, "shots", f"below {len(rows)}, the rows of {source}", count)
    return rows[:count], rows[count:]
