"""HTML pages, each one self-contained file: a report, its answers, an inspection. For light and dark screens and for phones."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...wording import visible
from ..inspection import Inspection, LayerPrediction, TokenTrace
from ..metrics import lower_is_better
from ..results import Answered, RunRecord
from .tables import result_name

ANSWERS_PAGE = "answers.html"
_PIECE = re.compile(r"\s+|\w+|[^\w\s]")  # what an answer is compared by
_PERCENT = ("acceptance_rate", "identical_outputs", "agreement", "predicted_acceptance_rate")
_TWO_DECIMALS = ("speedup", "decode_speedup", "speedup_over_transformers", "predicted_speedup", "mean_accepted_tokens")
_HIDDEN = (
    "acceptance_by_position", "pareto", "time_split_ms", "longest_answer", "intervals", "changes", "categories", "stderr",
    "samples",
)  # fmt: skip
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


def report_page(record: RunRecord, figures: Mapping[str, str], notes: Sequence[str]) -> str:
    """Sortable tables and figures. `notes` are paragraphs above the tables, the verdict first; `figures`: SVG by caption."""
    results = record.document()["results"]
    by_category = [
        {"strategy": result["strategy"], "category": name, **part}
        for result in results
        for name, part in result["categories"].items()
    ]
    tables = [_table("", results, answers=bool(record.answered))]
    return _render(
        "report",
        title=title(record),
        machine=_machine(record.environment),
        notes=notes,
        tables=[*tables, _table("By category", by_category)] if by_category else tables,
        figures=[{"caption": caption, "svg": Markup(svg)} for caption, svg in figures.items()],
        settings=json.dumps({"config": record.config, "environment": record.environment}, indent=2, ensure_ascii=False),
    )


def title(record: RunRecord) -> str:
    """`model on task`, for the page."""
    task = record.config["task"]
    data = task.get("data") if task.get("task") == "jsonl" else task.get("task")
    return f"{Path(record.config['model']).name} on {Path(data or 'a task').name}"


def _machine(environment: dict[str, Any]) -> str:
    threads = "thread" if environment.get("threads") == 1 else "threads"
    parts = ("dtype", "device_name", "implementation", "threads")
    return ", ".join(f"{environment[part]}" for part in parts if part in environment) + f" {threads}"


def _table(caption: str, results: Sequence[dict[str, Any]], answers: bool = False) -> dict[str, Any]:
    """With a column for every figure that any result has. `answers`: each row links to the answers of its result."""
    figures = [_figures(result) for result in results]
    names = dict.fromkeys(name for row in sorted(figures, key=len, reverse=True) for name in row)
    columns = [name for name in names if any(row.get(name) not in (None, "") for row in figures)]
    rows = []
    for number, (result, row) in enumerate(zip(results, figures, strict=True)):
        cells = []
        for column in columns:
            key = column.removeprefix("metrics.")
            spread = _spread(column, result["intervals"].get(key), result.get("stderr", {}).get(key))
            value = row.get(column)
            cells.append({"text": _text(column, value) + spread, "value": "" if value is None else str(value)})
        link = f"{ANSWERS_PAGE}#setting-{number}" if answers else None
        rows.append({"cells": cells, "pareto": bool(result.get("pareto")), "answers": link})
    return {"caption": caption, "columns": [_header(column) for column in columns], "rows": rows}


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


def _spread(column: str, ends: Sequence[float] | None, error: float | None) -> str:
    """What stands behind a value: the ends of its interval, or its standard error."""
    spread = "" if ends is None else f" ({_text(column, ends[0])}\N{EN DASH}{_text(column, ends[1])})"
    return spread + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.2g}")


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


def answers_page(record: RunRecord) -> str:
    """A section per prompt, with each different answer once, and the results that gave it. The autoregressive one is first.

    Words and signs in which another answer differs from the first are marked.
    """
    names = [result_name(result) for result in record.results]
    sections = [
        {"prompt": answered.prompt, "reference": answered.reference, "versions": _versions(answered, names)}
        for answered in record.answered
    ]
    measured = [
        number for number in range(len(names)) if any(answered.answers[number] is not None for answered in record.answered)
    ]
    choices = [(number, names[number]) for number in measured[1:]]
    return _render("answers", title=title(record), sections=sections, choices=choices)


def _versions(answered: Answered, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each different answer in parts, and the results that gave it: their numbers and names."""
    numbers: dict[str, list[int]] = {}
    for number, answer in enumerate(answered.answers):
        if answer is not None:
            numbers.setdefault(answer, []).append(number)
    first = next(iter(numbers), "")
    return [
        {"numbers": given, "names": [names[number] for number in given], "parts": _parts(answer, first)}
        for answer, given in numbers.items()
    ]


def _parts(answer: str, first: str) -> list[dict[str, Any]]:
    """The answer in parts, of which those that `first` lacks are marked. A mark without text stands for a part left out."""
    if answer == first:
        return [{"text": answer, "marked": False}]
    pieces, expected = _PIECE.findall(answer), _PIECE.findall(first)
    return [
        {"text": "".join(pieces[start:stop]), "marked": kind != "equal"}
        for kind, _, _, start, stop in SequenceMatcher(None, expected, pieces, autojunk=False).get_opcodes()
    ]


def inspection_page(inspection: Inspection) -> str:
    """A row per layer, a column per token, green from the layer on where it stays correct."""
    return _render(
        "inspection",
        model=inspection.model,
        prompt=inspection.prompt,
        answer="".join(trace.token for trace in inspection.tokens),
        mean_layers=f"{inspection.mean_layers:.1f}",
        num_layers=inspection.num_layers,
        tokens=[visible(trace.token) for trace in inspection.tokens],
        rows=list(_layer_rows(inspection)),
        has_blocks=any(trace.blocks for trace in inspection.tokens),
        needed=[trace.settled for trace in inspection.tokens],
    )


def _layer_rows(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Of every layer, the last one first; that of an exit block is above the layer it follows."""
    tokens = inspection.tokens
    for layer in range(inspection.num_layers, 0, -1):
        name = f"block {layer}"
        if any(layer in trace.blocks for trace in tokens):
            yield {"name": name, "cells": [_token_cell(name, trace, trace.blocks[layer], False) for trace in tokens]}
        where = f"layer {layer}"
        cells = [_token_cell(where, trace, trace.predictions[layer - 1], layer >= trace.settled) for trace in tokens]
        yield {"name": str(layer), "cells": cells}


def _token_cell(where: str, trace: TokenTrace, prediction: LayerPrediction, stays: bool) -> dict[str, str]:
    """The prediction for a token after a layer. `kind` is the CSS class, `title` is shown when hovering."""
    kind = "right" if stays else "early" if prediction.token == trace.token else "wrong"
    title = f"{where}: {prediction.token!r} {prediction.probability:.0%}"
    return {"token": visible(prediction.token), "kind": kind, "probability": f"{prediction.probability:.2f}", "title": title}


def _render(template: str, **values: Any) -> str:
    """Renders `templates/<template>.html.j2`, which escapes every value but Markup: no text of a model becomes markup."""
    return _templates().get_template(f"{template}.html.j2").render(values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("layerskip_core.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
