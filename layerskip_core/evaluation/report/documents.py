"""A record as JSON, CSV and JSON lines of its answers; and all files of a report."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from ...config.options import counts_text
from ...errors import LayerSkipError
from ...files import text_lines
from ..results import Answered, RunRecord
from .pages import ANSWERS_PAGE, answers_page, report_page
from .tables import PARETO_NOTE, TextTable

ANSWERS_FILE = "answers.jsonl"
FIGURE_NAMES = (
    "pareto", "acceptance_by_exit", "acceptance_by_position", "perplexity", "prediction", "speed_within_an_answer",
    "time_split", "scores_by_exit", "lower_scores_by_exit",
)  # fmt: skip
REPORT_FILES = (
    "report.html", "results.json", "results.csv", ANSWERS_PAGE, ANSWERS_FILE, *(f"{name}.png" for name in FIGURE_NAMES)
)  # fmt: skip


class Record(Protocol):
    def document(self) -> dict[str, Any]:
        """The record as plain values."""


def to_json(record: Record) -> str:
    return json.dumps(record.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(record: RunRecord) -> str:
    """A row per result, and below it one per category.

    Metrics, times and the ends of intervals have a column each; differences and failures are counted.
    """
    rows = []
    for result in record.document()["results"]:
        categories = result.pop("categories")
        setting = {name: result[name] for name in ("strategy", "exit_layer", "num_draft_tokens", "draft_weights")}
        rows.append(_flat(result))
        rows += [_flat({**figures, **setting, "category": name}) for name, figures in categories.items()]
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)  # rows can lack columns
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "metrics":
            flat |= value
        elif key in flat and value is None:
            continue  # a metric of that name: the answers' perplexity, where none is measured through an exit
        elif key in ("intervals", "changes"):
            part = "_change" if key == "changes" else ""
            flat |= {f"{name}{part}_{end}": ends[end == "high"] for name, ends in value.items() for end in ("low", "high")}
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": part for name, part in value.items()}
        elif key == "skip":
            flat[key] = counts_text(value)
        elif key == "acceptance_by_position":
            flat[key] = " ".join(map(str, value or ()))
        else:
            flat[key] = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return flat


def to_jsonl(answered: Sequence[Answered]) -> str:
    """An object per prompt, with the answers in the order of the results in results.json."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered)


def with_answers(record: RunRecord, saved: str) -> RunRecord:
    """The record of the results.json `saved`, with the answers that lie beside it, if they do.

    Raises LayerSkipError for a file that `to_jsonl` did not write for such a record.
    """
    file = Path(saved).with_name(ANSWERS_FILE)
    if not file.exists():
        return record
    import msgspec

    answered, results = [], len(record.results)
    for number, line in enumerate(text_lines(file, "saved"), start=1):
        where = f"line {number} of {file}, beside `saved`,"
        try:
            row = msgspec.json.decode(line, type=Answered)
        except msgspec.DecodeError as error:
            raise LayerSkipError(f"{where} must be one that a measurement wrote: {error}") from None
        if len(row.answers) != results:
            raise LayerSkipError(f"{where} must have an answer for each of the {results} results, got {len(row.answers)}")
        answered.append(row)
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
