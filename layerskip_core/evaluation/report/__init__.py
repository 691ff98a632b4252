"""A record as JSON, CSV and JSON lines of its answers; all files of a report, and the folder of `output` for them."""

import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from ...errors import LayerSkipError
from ...files import hold, read_bytes, require_writable
from ..results import JOURNAL, OUTPUTS, Answered, RunRecord
from .pages import ANSWERS_PAGE, answers_page, report_page
from .tables import PARETO_NOTE, TextTable, flat_rows

ANSWERS_FILE = "answers.jsonl"
_REPORT_BYTES = 1 << 20  # more than any report takes


def to_json(record: Any) -> str:
    """The JSON document of a dataclass; answers stay out of a RunRecord's."""
    fields = record.document() if isinstance(record, RunRecord) else asdict(record)
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(tables: Sequence[TextTable]) -> str:
    return "\n".join(table.markdown() for table in tables)


def table_files(name: str, record: Any, tables: Sequence[TextTable], rows: str) -> dict[str, bytes]:
    """NAME.md of tables, NAME.json of the record and NAME.csv of the rows."""
    texts = {"md": to_markdown(tables), "json": to_json(record), "csv": rows}
    return {f"{name}.{ending}": text.encode() for ending, text in texts.items()}


def to_csv(record: RunRecord) -> str:
    """A row per result, and below it one per category, with a column for each figure."""
    return csv_text(flat_rows(record))


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table with every column that any of the rows has."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_jsonl(answered: Sequence[Answered]) -> str:
    """An object per prompt, with the answers in the order of the results in results.json."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered)


def with_answers(record: RunRecord, saved: str) -> RunRecord:
    """The record of the results.json `saved`, with the answers that lie beside it, if they do. Raises LayerSkipError."""
    file = Path(saved).with_name(ANSWERS_FILE)
    if not file.exists():
        return record
    try:
        answered = msgspec.json.Decoder(Answered).decode_lines(read_bytes(file, f"`saved` {file}", LayerSkipError))
    except msgspec.DecodeError as error:
        raise LayerSkipError(f"{file}, beside `saved`, must be one that a measurement wrote: {error}") from None
    return replace(record, answered=tuple(answered))


def report_files(record: RunRecord, table: TextTable) -> dict[str, bytes]:
    """All report files, by name."""
    from .plots import figures, to_png, to_svg  # matplotlib takes a while to import

    drawn = figures(record)
    notes = table.note.replace(PARETO_NOTE, "Green rows are on the Pareto frontier of quality and speed.").splitlines()
    pictures = {str(figure.get_label()): to_svg(figure) for figure in drawn.values()}
    texts = {
        "report.html": report_page(record, pictures, notes[::-1]),
        "results.json": to_json(record),
        "results.csv": to_csv(record),
    }
    if record.answered:
        texts |= {ANSWERS_PAGE: answers_page(record), ANSWERS_FILE: to_jsonl(record.answered)}
    files = {name: text.encode() for name, text in texts.items()}
    return files | {f"{name}.png": to_png(figure) for name, figure in drawn.items()}


@contextmanager
def output_folder(folder: str | None, command: str) -> Iterator[Path | None]:
    """The folder for a report, created and locked by `command`; None if `folder` is None. Raises LayerSkipError."""
    if folder is None:
        yield None
        return
    path = Path(folder)
    with hold(path, command):
        if shutil.disk_usage(path).free < _REPORT_BYTES:
            raise LayerSkipError(f"`output` {folder} is on a disk without space")
        for name in ("report.html", "results.json", "results.csv", ANSWERS_PAGE, ANSWERS_FILE, JOURNAL, OUTPUTS):
            require_writable(path / name, LayerSkipError)
        yield path
