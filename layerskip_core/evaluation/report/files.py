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
from ..journal import JOURNAL, OUTPUTS
from ..results import ANSWERS_FILE, Answered, RunRecord, result_name
from .notes import PARETO_NOTE
from .tables import Table, csv_rows, has_scores, page_tables

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


def table_files(name: str, json: str = "", markdown: str = "", csv: str = "") -> dict[str, bytes]:
    """NAME.json, NAME.md and NAME.csv."""
    return {
        f"{name}.json": json.encode(),
        f"{name}.md": markdown.encode(),
        f"{name}.csv": csv.encode(),
    }


def to_csv(record: RunRecord) -> str:
    """A row per result, and below it one per category, with a column for each figure."""
    return csv_text(csv_rows(record))


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table with every column that any of the rows has."""
    text = io.StringIO()
    columns: dict[str, None] = {}
    for row in sorted(rows, key=len, reverse=True):  # the fullest row gives the order
        columns |= dict.fromkeys(row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_jsonl(answered: Sequence[Answered]) -> str:
    """An object per prompt, with the answers in the order of the results in results.json."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered)


def report_files(record: RunRecord, table: Table) -> dict[str, bytes | None]:
    """All report files by name; None for files that only an earlier report had."""
    from .plots import PLOTS, draw_plots, to_png, to_svg  # matplotlib takes a while to import

    drawn = draw_plots(record)
    # A page colours the rows, and says nothing of a policy that there is not
    notes = table.note.replace(
        PARETO_NOTE, "Green rows are on the Pareto frontier of quality and speed."
    ).splitlines()
    found = [line for line in table.findings[::-1] if not line.startswith(f"Policy {FAST}: none")]
    pictures = {str(figure.get_label()): to_svg(figure) for figure in drawn.values()}
    texts = {
        "report.html": report_page(record, pictures, found, notes),
        "results.json": to_json(record),
        "results.csv": to_csv(record),
    }
    if record.answered:
        texts[ANSWERS_PAGE] = answers_page(record)
        texts[ANSWERS_FILE] = to_jsonl(record.answered)
    if record.samples:
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in record.samples]
        texts[SAMPLES_FILE] = "".join(f"{line}\n" for line in lines)
    files: dict[str, bytes | None] = {name: text.encode() for name, text in texts.items()}
    for name, figure in drawn.items():
        files[f"{name}.png"] = to_png(figure)
    for name in (ANSWERS_PAGE, ANSWERS_FILE, SAMPLES_FILE, *(f"{name}.png" for name in PLOTS)):
        files.setdefault(name, None)
    return files


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
    threads = plural(machine["threads"], "thread")
    parts = (machine["dtype"], machine["device_name"], machine["implementation"], threads)
    settings = {"config": record.config, "environment": machine}
    return _template("report").render(
        title=title(record),
        machine=", ".join(parts),
        findings=findings,
        notes=notes,
        tables=page_tables(record),
        links=bool(record.answered) and not has_scores(record),
        figures=[{"caption": caption, "svg": Markup(svg)} for caption, svg in figures.items()],
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def title(record: RunRecord) -> str:
    """`model on task`, for the page."""
    task = record.config["task"]
    data = task.get("data") if task.get("task") == "jsonl" else task.get("task")
    return f"{Path(record.config['model']).name} on {Path(data or 'a task').name}"


def answers_page(record: RunRecord) -> str:
    """Per prompt, each different answer once, with the results that gave it; the autoregressive one
    first.
    """
    names = [result_name(result) for result in record.results]
    measured: set[int] = set()
    sections = []
    for answered in record.answered:
        numbers: dict[str, list[int]] = {}  # of the results, by their answer
        for number, answer in enumerate(answered.answers):
            if answer is not None:
                numbers.setdefault(answer, []).append(number)
                measured.add(number)
        first = next(iter(numbers), "")
        versions = []
        for answer, own in numbers.items():
            own_names = [names[number] for number in own]
            parts = _parts(answer, first)
            versions.append({"numbers": own, "names": own_names, "parts": parts})
        section: dict[str, Any] = {"prompt": answered.prompt, "reference": answered.reference}
        sections.append(section | {"versions": versions})
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
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        parts.append({"text": "".join(pieces[start:end]), "marked": kind != "equal"})
    return parts


def inspection_page(inspection: Inspection) -> str:
    """A row per layer, a column per token, green from the layer on where it stays correct; exit
    blocks above their layers.
    """
    blocks = inspection.tokens[0].blocks.keys() if inspection.tokens else ()
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
