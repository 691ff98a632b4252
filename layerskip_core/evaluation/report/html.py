"""A record as one HTML page that needs nothing else: tables that sort, figures, light and dark, readable on a phone."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from ..metrics import LOWER_IS_BETTER
from .plots import title, to_svg
from .record import RunRecord

_CSS = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #1d2328; --soft: #66707a; --line: #dfe3e6; --row: #f1f3f4;
  --mark: #e6f2ea; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181b; --text: #e3e7ea; --soft: #98a2ab; --line: #2f373d; --row: #1c2226;
    --mark: #1d3226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; } .soft { color: var(--soft); }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px;  /* a shadow where more is to be scrolled to */
  background: linear-gradient(to left, var(--back) 50%, transparent) right / 4rem 100% no-repeat local,
    linear-gradient(to left, rgb(128 128 128 / .45), transparent) right / 1.2rem 100% no-repeat; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { white-space: normal; vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tbody tr:hover td { background: var(--row); } tr.mark td { background: var(--mark); } tbody tr:last-child td { border: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
details { margin: 1rem 0; } pre { overflow-x: auto; font-size: .8rem; }
"""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.querySelector("button").addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[head.cellIndex].dataset.value;
  const order = (a, b) => a === "" ? 1 : b === "" ? -1 : (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
});
"""
_PERCENT = ("acceptance_rate", "identical_outputs", "agreement", "predicted_acceptance_rate")
_TWO_DECIMALS = ("speedup", "decode_speedup", "speedup_over_transformers", "predicted_speedup", "mean_accepted_tokens")
_HIDDEN = ("acceptance_by_position", "pareto", "time_split_ms")
_NAMES = {
    "exit_layer": "exit",
    "num_draft_tokens": "drafts",
    "acceptance_rate": "accepted",
    "mean_accepted_tokens": "accepted a round",
    "tokens_per_second": "tokens/s",
    "predicted_tokens_per_second": "predicted tokens/s",
    "predicted_acceptance_rate": "predicted accepted",
    "identical_outputs": "identical",
    "ttft_ms": "first token (ms)",
    "time_per_token p50 (ms)": "token p50 (ms)",
    "time_per_token p95 (ms)": "token p95 (ms)",
    "peak_memory_mb": "memory (MB)",
    "decode_speedup": "speedup behind prefill",
    "speedup_over_transformers": "over transformers",
}


def html_report(record: RunRecord[Any], figures: dict[str, Figure], notes: Sequence[str]) -> str:
    """The page. `notes` are paragraphs above the table, the first of them the verdict."""
    machine = record.environment
    parts = ("dtype", "device_name", "implementation", "threads")
    threads = "thread" if machine.get("threads") == 1 else "threads"
    where = ", ".join(f"{machine[part]}" for part in parts if part in machine) + f" {threads}"
    shown = "".join(
        f"<figure><figcaption>{escape(str(figure.get_label()))}</figcaption>{to_svg(figure)}</figure>"
        for figure in figures.values()
    )
    if shown:
        shown = f'<h2>Figures</h2><div class="figures">{shown}</div>'
    text = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    name = escape(title(record))
    settings = json.dumps({"config": record.config, "environment": record.environment}, indent=2, ensure_ascii=False)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>'
        f'<body><h1>{name}</h1><p class="soft">{escape(where)}</p>{text}{_table(record)}'
        f"{shown}"
        f"<details><summary>Settings and machine</summary><pre>{escape(settings)}</pre></details>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(record: RunRecord[Any]) -> str:
    """All figures that any result has; rows on the Pareto frontier are marked."""
    results = record.document()["results"]
    rows = [_cells(result) for result in results]
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    columns = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    head = "".join(f'<th scope="col"><button>{escape(_name(column))}</button></th>' for column in columns)
    body = "".join(
        f"<tr{' class=mark' if result.get('pareto') else ''}>"
        + "".join(_cell(column, row.get(column)) for column in columns)
        + "</tr>"
        for result, row in zip(results, rows, strict=True)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(result: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for key, value in result.items():
        if key in _HIDDEN:
            continue
        if key == "metrics":
            cells |= {f"metrics.{name}": figure for name, figure in value.items()}
        elif isinstance(value, dict):
            cells |= {f"{key.removesuffix('_ms')} {name} (ms)": part for name, part in value.items()}
        elif isinstance(value, list | tuple):
            cells[key] = len(value) or None
        else:
            cells[key] = value
    return cells


def _cell(column: str, value: Any) -> str:
    plain = "" if value is None else str(value)
    return f'<td data-value="{escape(plain)}">{escape(_text(column, value))}</td>'


def _text(column: str, value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if column in _PERCENT or (column.startswith("metrics.") and column.removeprefix("metrics.") not in LOWER_IS_BETTER):
        return f"{value:.1%}"
    if column in _TWO_DECIMALS:
        return f"{value:.2f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(column: str) -> str:
    return _NAMES.get(column, column.removeprefix("metrics.").replace("_", " "))
