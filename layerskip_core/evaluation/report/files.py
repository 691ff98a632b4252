"""The files of a report: the HTML pages, the record as JSON and CSV, its answers, and a PNG per figure."""

from ..results import RunRecord
from .answers_page import ANSWERS_FILE, ANSWERS_PAGE, answers_page, to_jsonl
from .documents import to_csv, to_json
from .tables import PARETO_NOTE, TextTable

FIGURE_NAMES = (
    "pareto", "acceptance_by_exit", "acceptance_by_position", "perplexity", "prediction", "speed_within_an_answer",
    "time_split", "scores_by_exit", "lower_scores_by_exit",
)  # fmt: skip
REPORT_FILES = (
    "report.html", "results.json", "results.csv", ANSWERS_PAGE, ANSWERS_FILE, *(f"{name}.png" for name in FIGURE_NAMES)
)  # fmt: skip


def report_files(record: RunRecord, table: TextTable) -> dict[str, bytes]:
    """All report files, by name."""
    from .drawing import to_png
    from .html import html_report  # matplotlib takes a while to import
    from .plots import figures, title

    drawn = figures(record)
    notes = table.note.replace(PARETO_NOTE, "Green rows are on the Pareto frontier of quality and speed.").splitlines()
    files = {
        "report.html": html_report(record, drawn, notes[::-1]).encode(),
        "results.json": to_json(record).encode(),
        "results.csv": to_csv(record).encode(),
    }
    if record.answered:
        files |= {ANSWERS_PAGE: answers_page(record, title(record)).encode(), ANSWERS_FILE: to_jsonl(record.answered).encode()}
    return files | {f"{name}.png": to_png(figure) for name, figure in drawn.items()}
