"""A record as one self-contained HTML page: sortable tables and figures, for light and dark screens and for phones."""

import json
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from ..metrics import lower_is_better
from ..results import RunRecord
from .answers_page import ANSWERS_PAGE
from .drawing import to_svg
from .pages import render
from .plots import title

_PERCENT = ("acceptance_rate", "identical_outputs", "agreement", "predicted_acceptance_rate")
_TWO_DECIMALS = ("speedup", "decode_speedup", "speedup_over_transformers", "predicted_speedup", "mean_accepted_tokens")
_HIDDEN = (
    "acceptance_by_position",
    "pareto",
    "time_split_ms",
    "longest_answer",
    "intervals",
    "changes",
    "categories",
    "stderr",
    "samples",
)
_NAMES = {
    "exit_layer": "exit",
    "num_draft_tokens": "drafts",
    "acceptance_rate": "accepted",
    "mean_accepted_tokens": "accepted per round",
    "tokens_per_second": "tokens/s",
    "predicted_tokens_per_second": "predicted tokens/s",
    "predicted_acceptance_rate": "predicted accepted",
    "identical_outputs": "identical",
    "ttft_ms": "first token (ms)",
    "time_per_token p50 (ms)": "token p50 (ms)",
    "time_per_token p95 (ms)": "token p95 (ms)",
    "peak_memory_mb": "memory (MB)",
    "speedup_over_transformers": "speedup over transformers",
}


class _Cell(NamedTuple):
    """A cell's text, and the value by which its column is sorted."""

    text: str
    value: str


class _Row(NamedTuple):
    cells: list[_Cell]
    pareto: bool
    answers: str | None = None  # where its answers are


class _Table(NamedTuple):
    caption: str
    columns: list[str]
    rows: list[_Row]


class _Figure(NamedTuple):
    caption: str
    svg: Markup


def html_report(record: RunRecord, figures: dict[str, Figure], notes: Sequence[str]) -> str:
    """The page. `notes` are paragraphs above the tables, the verdict first."""
    results = record.document()["results"]
    by_category = [
        {"strategy": result["strategy"], "category": name, **figures}
        for result in results
        for name, figures in result.get("categories", {}).items()
    ]
    links = [f"{ANSWERS_PAGE}#setting-{number}" for number in range(len(results))] if record.answered else None
    tables = [_table("", results, links), *([_table("By category", by_category)] if by_category else [])]
    settings = {"config": record.config, "environment": record.environment}
    return render(
        "report",
        title=title(record),
        machine=_machine(record.environment),
        notes=notes,
        tables=tables,
        figures=[_Figure(str(figure.get_label()), Markup(to_svg(figure))) for figure in figures.values()],
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def _machine(environment: dict[str, Any]) -> str:
    threads = "thread" if environment.get("threads") == 1 else "threads"
    parts = ("dtype", "device_name", "implementation", "threads")
    return ", ".join(f"{environment[part]}" for part in parts if part in environment) + f" {threads}"


def _table(caption: str, results: Sequence[dict[str, Any]], links: Sequence[str] | None = None) -> _Table:
    """With a column for every figure that any result has. `links`: to the answers of each result."""
    figures = [_figures(result) for result in results]
    names = dict.fromkeys(name for row in sorted(figures, key=len, reverse=True) for name in row)
    columns = [name for name in names if any(row.get(name) not in (None, "") for row in figures)]
    rows = []
    for result, row, link in zip(results, figures, links or repeat(None, len(results)), strict=True):
        ends, errors = result["intervals"], result.get("stderr", {})
        keys = [column.removeprefix("metrics.") for column in columns]
        cells = [
            _cell(column, row.get(column), ends.get(key), errors.get(key)) for column, key in zip(columns, keys, strict=True)
        ]
        rows.append(_Row(cells, bool(result.get("pareto")), link))
    return _Table(caption, [_header(column) for column in columns], rows)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """A result's figures by column: a column per metric and per time, the number of failures and differences."""
    figures: dict[str, Any] = {}
    for key, value in result.items():
        if key in _HIDDEN:
            continue
        if key == "metrics":
            figures |= {f"metrics.{name}": figure for name, figure in value.items()}
        elif isinstance(value, dict):
            unit = " (ms)" if key.endswith("_ms") else ""
            figures |= {f"{key.removesuffix('_ms')} {name}{unit}": part for name, part in value.items()}
        elif isinstance(value, list | tuple):
            figures[key] = len(value) or None
        else:
            figures[key] = value
    return figures


def _cell(column: str, value: Any, ends: Sequence[float] | None, error: float | None = None) -> _Cell:
    """`ends` of the value's interval, or its standard error, stand behind it."""
    spread = "" if ends is None else f" ({_text(column, ends[0])}\N{EN DASH}{_text(column, ends[1])})"
    spread += "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.2g}"
    return _Cell(_text(column, value) + spread, "" if value is None else str(value))


def _text(column: str, value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if column.startswith("metrics.") and " " in column:  # of lm-eval, in its own scale
        return f"{value:.4g}"
    if column in _PERCENT or (column.startswith("metrics.") and not lower_is_better(column.removeprefix("metrics."))):
        return f"{value:.1%}"
    if column in _TWO_DECIMALS:
        return f"{value:.2f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _header(column: str) -> str:
    return _NAMES.get(column, column.removeprefix("metrics.").replace("_", " "))
