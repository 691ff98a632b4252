"""Records as JSON, CSV, JSON lines and self-contained HTML pages; the files of a report, and their
folder.
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ...config.resolution import FAST
from ...errors import ConfigError, LayerSkipError, plural, require_overwrite, visible
from ...files import hold, require_writable
from ..inspection import Inspection
from ..results import ANSWERS_FILE, JOURNAL, OUTPUTS, Answered, RunRecord, result_name
from .tables import (
    NAMES,
    PARETO_NOTE,
    Column,
    Row,
    TextTable,
    cell,
    columns_of,
    flat_rows,
    has_scores,
    score_table,
)

ANSWERS_PAGE = "answers.html"
SAMPLES_FILE = "samples.jsonl"
REPORT = (
    "results.json",
    "results.csv",
    "report.html",
    ANSWERS_PAGE,
    ANSWERS_FILE,
    SAMPLES_FILE,
    OUTPUTS,
    JOURNAL,
)
_REPORT_BYTES = 1 << 20  # more than any report takes
_PIECE = re.compile(r"\s+|\w+|[^\w\s]")  # the units by which answers are compared


def to_json(record: Any) -> str:
    """The JSON document of a dataclass; that of a RunRecord has no answers."""
    fields = record.document() if isinstance(record, RunRecord) else asdict(record)
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def table_files(name: str, texts: Sequence[str] = ("", "", "")) -> dict[str, bytes]:
    """NAME.json, NAME.md and NAME.csv."""
    return {
        f"{name}.{ending}": text.encode()
        for ending, text in zip(("json", "md", "csv"), texts, strict=True)
    }


def to_csv(record: RunRecord) -> str:
    """A row per result, and below it one per category, with a column for each figure."""
    return csv_text(
        [
            {name: value for name, value in row.items() if name not in NAMES}
            for row in flat_rows(record)
        ]
    )


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


def report_files(record: RunRecord, table: TextTable) -> dict[str, bytes | None]:
    """All report files by name; None for files that only an earlier report had."""
    from .plots import FIGURES, figures, to_png, to_svg  # matplotlib takes a while to import

    drawn = figures(record)
    notes = table.note.replace(
        PARETO_NOTE, "Green rows are on the Pareto frontier of quality and speed."
    ).splitlines()
    found = [line for line in table.findings[::-1] if not line.startswith(f"Policy {FAST}: none")]
    pictures = {str(figure.get_label()): to_svg(figure) for figure in drawn.values()}
    page = report_page(record, pictures, found, notes)
    texts = {"report.html": page, "results.json": to_json(record), "results.csv": to_csv(record)}
    if record.answered:
        texts |= {ANSWERS_PAGE: answers_page(record), ANSWERS_FILE: to_jsonl(record.answered)}
    if record.samples:
        texts[SAMPLES_FILE] = "".join(
            json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in record.samples
        )
    files = {name: text.encode() for name, text in texts.items()} | {
        f"{name}.png": to_png(figure) for name, figure in drawn.items()
    }
    earlier = {ANSWERS_PAGE, ANSWERS_FILE, SAMPLES_FILE, *(f"{name}.png" for name in FIGURES)}
    return files | dict.fromkeys(earlier - files.keys())


@contextmanager
def output_folder(
    folder: str | None,
    command: str,
    names: Sequence[str] = REPORT,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Path | None]:
    """The folder for files of these `names`, created and locked by `command`. Raises ConfigError
    and LayerSkipError.
    """
    if folder is None:
        yield None
        return
    path = Path(folder)
    with hold(path, command):
        if shutil.disk_usage(path).free < _REPORT_BYTES:
            raise LayerSkipError(f"`output` {folder} is on a disk without space")
        for name in names:
            require_writable(path / name, LayerSkipError)
        unfinished = JOURNAL in names and (path / JOURNAL).exists()
        if unfinished and not (resume or overwrite):
            reason = "holds an unfinished run; give `resume` to go on, or `overwrite` to start anew"
            raise ConfigError(f"`output` {folder} {reason}")
        require_overwrite(
            folder, names[0] if (path / names[0]).exists() else "", overwrite or unfinished
        )
        if unfinished and not resume:
            (path / JOURNAL).unlink()
        yield path


def report_page(
    record: RunRecord,
    figures: Mapping[str, str],
    findings: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """Sortable tables and figures below the `findings`, the recommendation first. `figures`: SVG by
    caption.
    """
    machine = record.environment
    rows = flat_rows(record)
    columns = [column for column in columns_of(record, rows) if column[0]]
    if has_scores(record):
        scores = score_table(record)
        lines = [
            {"cells": [{"text": text, "value": text} for text in line], "pareto": False}
            for line in scores.rows
        ]
        tables = [{"caption": "", "columns": scores.headers, "rows": lines, "links": False}]
    else:
        tables = [
            _table(
                "", [row for row in rows if "category" not in row], columns, bool(record.answered)
            )
        ]
    if by_category := [row for row in rows if "category" in row]:
        columns = [("strategy", "strategy", ""), ("category", "category", ""), *columns[3:]]
        tables.append(_table("By category", by_category, columns))
    parts = (
        machine["dtype"],
        machine["device_name"],
        machine["implementation"],
        plural(machine["threads"], "thread"),
    )
    return _template("report").render(
        title=title(record),
        machine=", ".join(parts),
        findings=findings,
        notes=notes,
        tables=tables,
        figures=[{"caption": caption, "svg": Markup(svg)} for caption, svg in figures.items()],
        settings=json.dumps(
            {"config": record.config, "environment": machine}, indent=2, ensure_ascii=False
        ),
    )


def title(record: RunRecord) -> str:
    """`model on task`, for the page."""
    task = record.config["task"]
    data = task.get("data") if task.get("task") == "jsonl" else task.get("task")
    return f"{Path(record.config['model']).name} on {Path(data or 'a task').name}"


def _table(
    caption: str, rows: Sequence[Row], columns: Sequence[Column], links: bool = False
) -> dict[str, Any]:
    """A table for the template. `links`: rows link to their answers."""
    cells = [
        [{"text": cell(row, name, form), "value": row.get(name)} for _, name, form in columns]
        for row in rows
    ]
    lines = [{"cells": own, "pareto": row["pareto"]} for own, row in zip(cells, rows, strict=True)]
    return {
        "caption": caption,
        "columns": [header for header, _, _ in columns],
        "rows": lines,
        "links": links,
    }


def answers_page(record: RunRecord) -> str:
    """Per prompt, each different answer once, with the results that gave it; the autoregressive one
    first.
    """
    names = [result_name(result) for result in record.results]
    sections = list[dict[str, Any]]()
    for answered in record.answered:
        numbers: dict[str, list[int]] = {}
        for number, answer in enumerate(answered.answers):
            if answer is not None:
                numbers.setdefault(answer, []).append(number)
        first = next(iter(numbers), "")
        versions = [
            {
                "numbers": given,
                "names": [names[number] for number in given],
                "parts": _parts(answer, first),
            }
            for answer, given in numbers.items()
        ]
        sections.append(
            {"prompt": answered.prompt, "reference": answered.reference, "versions": versions}
        )
    measured = {
        number
        for section in sections
        for version in section["versions"]
        for number in version["numbers"]
    }
    choices = [(number, names[number]) for number in sorted(measured)[1:]]
    return _template("answers").render(title=title(record), sections=sections, choices=choices)


def _parts(answer: str, first: str) -> list[dict[str, Any]]:
    """The answer in parts; those that differ from `first` are marked. An empty mark stands for a
    part left out.
    """
    if answer == first:
        return [{"text": answer, "marked": False}]
    pieces = _PIECE.findall(answer)
    expected = _PIECE.findall(first)
    # Ignores frequent pieces of long texts, which would take minutes
    matcher = SequenceMatcher(None, expected, pieces)
    return [
        {"text": "".join(pieces[start:stop]), "marked": kind != "equal"}
        for kind, _, _, start, stop in matcher.get_opcodes()
    ]


def inspection_page(inspection: Inspection) -> str:
    """A row per layer, a column per token, green from the layer on where it stays correct; exit
    blocks above their layers.
    """
    blocks = {layer for trace in inspection.tokens for layer in trace.blocks}
    return _template("inspection").render(inspection=inspection, blocks=blocks)


@cache
def _template(name: str) -> Template:
    """`templates/<name>.html.j2`, which escapes every value but Markup: no text of a model becomes
    markup.
    """
    environment = Environment(
        loader=PackageLoader("layerskip_core.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "repr": repr}
    return environment.get_template(f"{name}.html.j2")
