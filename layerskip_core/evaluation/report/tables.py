"""One description of the columns of a record, from which its table is drawn in the terminal, in
markdown and on the page; its rows as flat values, for CSV.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ...config.evaluation import HARNESS
from ...config.options import counts_text
from ..columns import COLUMNS, Column, column_named
from ..metrics import frontier, metric_named
from ..results import Result, RunRecord, result_name
from .notes import notes_of, verdict_lines

FEW_ROWS = "?"  # in place of an interval wider than its value
_WIDE = 8  # the largest ratio of highest to lowest value for a linear axis

FlatRow = dict[str, Any]
"""A figure by its name, and the ends of its interval as `NAME_low` and `NAME_high`."""


# Not part of CSV files: the name of a setting, its exit or mean layers, a mark on the frontier
_LABELS = ("setting", "exit", "front")
_SETTING = (
    Column("strategy", "setting"),
    Column("exit", "exit"),
    Column("spec", "num_draft_tokens"),
)


class Cell(NamedTuple):
    """A cell as text, and the plain value by which a page sorts it."""

    text: str
    value: Any = None


def text_cells(texts: Sequence[str]) -> tuple[Cell, ...]:
    """A row that is sorted as text."""
    return tuple(Cell(text, text) for text in texts)


@dataclass(frozen=True)
class Table:
    """What every renderer draws."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    labels: int = 1  # the number of leading columns that identify a row
    spare: tuple[str, ...] = ()  # headers of columns to drop, in this order, if there is no room
    findings: tuple[str, ...] = ()  # below the note
    marked: frozenset[int] = frozenset()  # rows on the Pareto frontier
    caption: str = ""

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.note, *self.findings)))

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The cells of the rows as text."""
        texts = []
        for row in self.rows:
            texts.append(tuple(cell.text for cell in row))
        return texts

    def column_blocks(self, width: int) -> list[list[int]]:
        """Splits the columns into tables of at most `width` characters. Every block repeats the
        label columns.
        """
        sizes = []
        for cells in zip(self.headers, *self.texts, strict=True):
            sizes.append(max(map(len, cells)) + 1)  # with a space

        def fits(columns: Sequence[int]) -> bool:
            return sum(sizes[column] for column in columns) - 1 <= width

        columns = list(range(len(sizes)))
        for header in self.spare:
            if header in self.headers and not fits(columns):
                columns.remove(self.headers.index(header))
        labels = columns[: self.labels]
        blocks = [labels]
        for column in columns[self.labels :]:
            is_begun = len(blocks[-1]) > self.labels
            if is_begun and not fits([*blocks[-1], column]):
                blocks.append(labels)
            blocks[-1] = [*blocks[-1], column]
        return blocks

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.headers)
        lines = []
        for cells in (self.headers, rule, *self.texts):
            escaped = [text.replace("|", "\\|").replace("\n", " ") for text in cells]
            lines.append(f"| {' | '.join(escaped)} |")
        return "\n".join(lines) + f"\n\n{self.text}\n"


def strategy_name(result: Result) -> str:
    """The name of a strategy in tables and figures: `int8 drafts` for drafts by a low-bit copy."""
    if result.draft_weights and not result.skip:
        return f"{result.draft_weights} drafts"
    return result.strategy


def results_table(record: RunRecord) -> Table:
    """A row per setting, and below it one per category; fits 80 characters with one metric, without
    `spare` columns.
    """
    if has_scores(record):
        return score_table(record)
    rows = flat_rows(record)
    columns = columns_of(record, rows)
    spare = sorted((each for each in columns if each.spare_rank), key=lambda each: each.spare_rank)
    cells = tuple(_cells(row, columns) for row in rows)
    has_few_rows = any(each.text.endswith(f"±{FEW_ROWS}") for row in cells for each in row)
    note, findings = notes_of(record, _legend(columns), has_few_rows, _change_of(record, columns))
    return Table(
        tuple(column.header for column in columns),
        cells,
        note,
        len(_SETTING),
        tuple(column.header for column in spare),
        findings,
    )


def page_tables(record: RunRecord) -> list[Table]:
    """The tables of a page, which can be sorted: settings, then categories."""
    if has_scores(record):
        return [score_table(record)]
    rows = flat_rows(record)
    columns = [column for column in columns_of(record, rows) if column.header]
    of_settings = [row for row in rows if "category" not in row]
    of_categories = [row for row in rows if "category" in row]
    tables = [_page_table(of_settings, columns)]
    if of_categories:
        named = [Column("strategy", "strategy"), Column("category", "category")]
        figures = columns[len(_SETTING) :]
        tables.append(_page_table(of_categories, [*named, *figures], "By category"))
    return tables


def _page_table(rows: Sequence[FlatRow], columns: Sequence[Column], caption: str = "") -> Table:
    marked = frozenset(number for number, row in enumerate(rows) if row["pareto"])
    headers = tuple(column.header for column in columns)
    cells = tuple(_cells(row, columns) for row in rows)
    return Table(headers, cells, marked=marked, caption=caption)


def columns_of(record: RunRecord, rows: Sequence[FlatRow]) -> list[Column]:
    """The columns that name a row, and those with a figure in any row."""
    used = []
    for column in [*_metric_columns(record), *COLUMNS]:
        if column.is_tabulated and any(row.get(column.figure) not in (None, "") for row in rows):
            used.append(column)
    return [*_SETTING, *used]


def _metric_columns(record: RunRecord) -> list[Column]:
    results = record.results
    # Without references answers are compared with those at full depth. `same` says it of strategies
    # with its outputs.
    has_exits = any(result.strategy == "early-exit" for result in results)
    if record.config.get("has_references") is False and not has_exits:
        return []
    metrics = [name for name in results[0].metrics if name != "perplexity"]  # it has its own column
    columns = [column_named(name) for name in metrics]
    if len(columns) > 1:  # two have no room for the decimals of shares without an interval
        columns = [replace(each, form=each.form.replace("±.1%", "±.0%")) for each in columns]
    ranked = str(record.config.get("quality_metric"))
    if metric_named(ranked).is_share and any(ranked in result.changes for result in results):
        columns.append(Column("change", f"{ranked}_change", "±.0%"))
    return columns


def _legend(columns: Sequence[Column]) -> str:
    parts = [f"{column.header}: {column.legend}" for column in columns if column.legend]
    return "; ".join(parts)


def _change_of(record: RunRecord, columns: Sequence[Column]) -> str:
    """The metric whose change is shown, if there is one."""
    if any(column.header == "change" for column in columns):
        return metric_named(str(record.config["quality_metric"])).short_name
    return ""


def has_scores(record: RunRecord) -> bool:
    """Whether the metrics are scores of lm-evaluation-harness, named `TASK METRIC`."""
    return str(record.config["task"].get("task")).startswith(HARNESS)


def score_table(record: RunRecord) -> Table:
    """A row per task and metric, a column per setting; below them the figures of generated
    answers.
    """
    results = record.results
    counts: dict[str, int] = {}
    names: dict[str, None] = {}
    for result in results:
        if isinstance(result.samples, dict):
            counts |= result.samples
        names |= dict.fromkeys(result.metrics)
    rows: list[tuple[str, ...]] = []
    for name in names:
        task, _, metric = name.partition(" ")
        scores = [_score(result, name) for result in results]
        rows.append((task, metric, str(counts.get(task, "-")), *scores))
    flat = flat_rows(record)
    for figure in ("identical_outputs", "acceptance_rate", "tokens_per_second", "speedup"):
        label = figure.replace("_per_second", "/s").replace("_", " ")
        column = column_named(figure)
        texts = [cell_text(row, replace(column, form=column.plain_form)) for row in flat]
        if set(texts) != {"-"}:
            rows.append(("all answers", label, "", *texts))
    headers = ["task", "metric", "n"]
    for result in results:
        usual = strategy_name(result)
        names_here = {"autoregressive": "full depth", "early-exit": f"exit {result.exit_layer}"}
        headers.append(names_here.get(result.strategy, usual))
    findings = tuple(verdict_lines(record)) if record.is_bench else ()
    cells = tuple(map(text_cells, rows))
    return Table(tuple(headers), cells, _score_note(record), 3, findings=findings)


def _score_note(record: RunRecord) -> str:
    config = record.config
    machine = record.environment
    samples = config["task"].get("samples")
    shown = f"the first {samples} rows of each task" if samples else "all rows of each task"
    version = machine.get("versions", {}).get("lm_eval", "")
    where = f"{machine['dtype']} on {machine['device_name']}"
    return (
        f"Scores of lm-eval {version}, ± its standard error; {shown}.\n"
        f"Prompt template: {config.get('prompt_template')}; {where}."
    )


def _score(result: Result, name: str) -> str:
    """`.612±.034`, or a perplexity with three digits."""
    value = result.metrics.get(name)
    if value is None:
        return "-"
    error = result.stderr.get(name)
    if metric_named(name).lower_is_better:
        return f"{value:.3g}" if error is None else f"{value:.3g}±{error:.2g}"
    return f"{value:.3f}" if error is None else f"{value:.3f}±{_bare(error, '.3f')}"


def flat_rows(record: RunRecord) -> list[FlatRow]:
    """A row per result and per category, with a plain value for each figure and interval end, and
    labels for tables.
    """
    rows = []
    full = record.results[0].metrics if record.results else {}
    for result in record.results:
        row = _flat(result)
        for name in result.changes:
            row[f"{name}_change"] = result.metrics[name] - full[name]
        row["setting"] = strategy_name(result)
        row["exit"] = result.exit_layer
        row["front"] = "*" if result.pareto else ""
        if result.exit_confidence is not None:
            row["setting"] = result_name(result)
        if result.mean_layers is not None:
            row["exit"] = f"{result.mean_layers:.1f}"
        rows.append(row)
        for category, own in result.categories.items():
            of_setting = ("strategy", "exit_layer", "num_draft_tokens", "draft_weights", "exit")
            named = {name: row[name] for name in of_setting}
            setting = f"  {category} ({own.samples})"
            named |= {"category": category, "setting": setting, "front": ""}
            rows.append(_flat(own) | named)
    return rows


def csv_rows(record: RunRecord) -> list[FlatRow]:
    """The flat rows without the labels of tables."""
    rows = flat_rows(record)
    for row in rows:
        for label in _LABELS:
            row.pop(label, None)
    return rows


def _flat(result: Result) -> FlatRow:
    flat: FlatRow = {}
    for name, value in asdict(result).items():
        match name, value:
            case "categories", _:
                pass  # rows of their own
            case "metrics", _:
                flat |= value
            case "intervals", _:
                flat |= _ends(value)
            case "changes", _:
                flat |= _ends(value, "_change")
            case "skip", _:
                flat[name] = counts_text(value)
            case "acceptance_by_position", _:
                flat[name] = " ".join(map(str, value or ()))
            case _, dict():
                flat |= {f"{name}_{key}": part for key, part in value.items()}
            case _, tuple():
                flat[name] = len(value)
            case _, None if name in flat:
                pass  # an unmeasured figure must not hide a metric of its name: perplexity
            case _:
                flat[name] = value
    return flat


def _ends(intervals: dict[str, Any], suffix: str = "") -> FlatRow:
    ends = {}
    for name, bounds in intervals.items():
        ends[f"{name}{suffix}_low"] = bounds.low
        ends[f"{name}{suffix}_high"] = bounds.high
    return ends


def _cells(row: FlatRow, columns: Sequence[Column]) -> tuple[Cell, ...]:
    return tuple(Cell(cell_text(row, column), row.get(column.figure)) for column in columns)


def cell_text(row: FlatRow, column: Column) -> str:
    """A figure in the column's form, such as `2.31±.12`, `81±2%` or `1.2e4`; `-` if not measured."""
    value = row.get(column.figure)
    if column.form == "*":
        return str(value or "")
    if value in (None, ""):
        return "-"
    if column.form == "ppl":
        return _perplexity_text(value)
    form = column.form.removeprefix("±")
    low = row.get(f"{column.figure}_low")
    high = row.get(f"{column.figure}_high")
    if form == column.form or low is None or high is None:
        return format(value, form)
    half = (high - low) / 2
    if form.endswith("%"):
        return f"{100 * value:.0f}±{100 * half:.0f}%"
    return f"{value:{form}}±{FEW_ROWS if half >= value else _bare(half, form)}"


def _perplexity_text(value: float) -> str:
    if value < 999.5:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _bare(half: float, form: str) -> str:
    """`.12`, without the zero."""
    text = format(half, form)
    return text.removeprefix("0") if half < 1 else text


@dataclass(frozen=True)
class Point:
    """A result by tokens per second and the quality metric, in percent unless a lower value is
    better.
    """

    result: Result
    speed: float
    value: float
    is_optimal: bool  # on the Pareto frontier

    @property
    def strategy(self) -> str:
        return strategy_name(self.result)


@dataclass(frozen=True)
class Points:
    """The results of a record that have quality and speed."""

    points: list[Point]
    lower_is_better: bool
    quality_label: str


def points_of(record: RunRecord) -> Points | None:
    """None without quality or speed."""
    ranked = str(record.config.get("quality_metric"))
    metric = metric_named(ranked)
    shown = []
    for result in record.results:
        if ranked in result.metrics and result.tokens_per_second is not None:
            shown.append(result)
    if not shown:
        return None
    label = f"Quality: {ranked.replace('_', ' ')}"
    scale = 1.0
    if metric.lower_is_better:
        label += ", lower is better"
    elif metric.is_share:
        label += " (%)"
        scale = 100.0
    optimal = frontier(shown, ranked)
    points = []
    for number, result in enumerate(shown):
        speed = result.tokens_per_second or 0.0
        points.append(Point(result, speed, scale * result.metrics[ranked], number in optimal))
    return Points(points, metric.lower_is_better, label)


def is_wide(values: Sequence[float]) -> bool:
    """Whether an axis should be logarithmic: one very fast exit would squeeze all other points
    together.
    """
    return max(values) > _WIDE * min(values) > 0
