"""Records as text tables, as flat rows of CSV files and pages, and as points of figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...config.evaluation import HARNESS, TRANSFORMERS_BASELINES
from ...config.options import counts_text
from ...config.resolution import EXACT, FAST, policy_text
from ...errors import number, plural
from ..metrics import frontier, is_share, lower_is_better
from ..results import NEAR_TIE, Result, RunRecord, bandwidth_text, result_name

PARETO_NOTE = "* on the Pareto frontier of quality and speed; pred: predicted speedup."
_DISTURBING = 0.2  # cores that other processes keep busy during a measurement
_WIDE = 8  # the largest ratio of highest to lowest value for a linear axis
_LEGEND = {
    "EM": "EM: exact match",
    "R1": "R1: ROUGE-1",
    "R2": "R2: ROUGE-2",
    "RL": "RL: ROUGE-L",
    "ppl": "ppl: perplexity",
    "accept": "accept: share of drafts accepted",
    "mean": "mean: accepted drafts per round",
    "speed": "speed: speedup over plain decoding",
    "same": "same: share of outputs equal to plain decoding",
    "first": "first: milliseconds to the first token",
    "MB": "MB: peak memory",
}  # of columns
_FEW_ROWS = "?"  # in place of an interval wider than its value
_HALF_NOTE = "±: half-width of the 95% interval over prompts{}."
_SHORT_NAMES = {"exact_match": "EM", "rouge1": "R1", "rouge2": "R2", "rougeL": "RL"}

# In tables: a setting, its exit or mean layers, and a mark on the frontier
NAMES = ("setting", "exit", "front")
_SPARE = ("MB", "first", "mean", "ppl", "pred")  # columns that a narrow terminal leaves out first

Column = tuple[str, str, str]
"""Header, the figure's name in `flat_rows`, and format."""
Row = Mapping[str, Any]
"""One of `flat_rows`: a figure by its name, and the ends of its interval as `NAME_low` and `NAME_high`."""


@dataclass(frozen=True)
class TextTable:
    """Cells as text."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    labels: int = 1  # the number of leading columns that identify a row
    spare: tuple[str, ...] = ()  # headers of columns to drop, in this order, if there is no room
    findings: tuple[str, ...] = ()  # below the note

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (self.note, *self.findings)))

    def column_blocks(self, width: int) -> list[list[int]]:
        """Splits the columns into tables of at most `width` characters. Every block repeats the
        label columns.
        """
        # With a space
        sizes = [max(map(len, cells)) + 1 for cells in zip(self.headers, *self.rows, strict=True)]
        columns = list(range(len(sizes)))
        for header in self.spare:
            if header in self.headers and sum(sizes[column] for column in columns) - 1 > width:
                columns.remove(self.headers.index(header))
        labels = columns[: self.labels]
        blocks = [labels]
        for column in columns[self.labels :]:
            if (
                len(blocks[-1]) > self.labels
                and sum(sizes[index] for index in [*blocks[-1], column]) - 1 > width
            ):
                blocks.append(labels)
            blocks[-1] = [*blocks[-1], column]
        return blocks

    def markdown(self) -> str:
        lines = [self.headers, tuple("---" for _ in self.headers), *self.rows]
        escaped = (
            [cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in lines
        )
        return (
            "\n".join("| " + " | ".join(cells) + " |" for cells in escaped) + f"\n\n{self.text}\n"
        )


def strategy_name(result: Result) -> str:
    """The name of a strategy in tables and figures: `int8 drafts` for drafts by a low-bit copy."""
    return (
        f"{result.draft_weights} drafts"
        if result.draft_weights and not result.skip
        else result.strategy
    )


def results_table(record: RunRecord) -> TextTable:
    """A row per setting, and below it one per category; fits 80 characters with one metric, without
    `spare` columns.
    """
    if has_scores(record):
        return score_table(record)
    rows = flat_rows(record)
    columns = columns_of(record, rows)
    note = []
    results = record.results
    cells = tuple(tuple(cell(row, name, form) for _, name, form in columns) for row in rows)
    if any(result.pareto for result in results):
        note.append(PARETO_NOTE)
    if any(result.exit_confidence is not None for result in results):
        note.append(
            "exits at P: each token leaves at the first exit with a probability above P; exit: its layers, on average."
        )
    if any(result.intervals for result in results):
        note.append(
            _HALF_NOTE.format(" and repeats" if record.config.get("repeats", 1) > 1 else "")
        )
    if any(of_row.endswith(f"±{_FEW_ROWS}") for of_rows in cells for of_row in of_rows):
        note.append(f"±{_FEW_ROWS}: too few rows for an interval.")
    if any(name.endswith("_change") for _, name, _ in columns):
        note.append(
            f"change: of {_short(str(record.config['quality_metric']))} from full depth, on the same prompts."
        )
    if legend := [_LEGEND[header] for header, _, _ in columns if header in _LEGEND]:
        note.append(f"{'; '.join(legend)}.")
    note += _settings_notes(record)
    return TextTable(
        tuple(header for header, _, _ in columns),
        cells,
        "\n".join(note),
        3,
        _SPARE,
        tuple(findings(record)),
    )


def columns_of(record: RunRecord, rows: Sequence[Row]) -> list[Column]:
    """The columns that name a row, and those with a figure in any row."""
    results = record.results
    ranked = str(record.config.get("quality_metric"))
    metrics = [name for name in results[0].metrics if name != "perplexity"]  # it has its own column
    # Without references answers are compared with those at full depth. `same` says it of strategies
    # with its outputs.
    if record.config.get("has_references") is False and not any(
        each.strategy == "early-exit" for each in results
    ):
        metrics = []
    # With two metrics there is no room for decimals
    percent = f"±.{1 if len(metrics) == 1 else 0}%"
    changed = is_share(ranked) and any(ranked in result.changes for result in results)
    setting = [("strategy", "setting", ""), ("exit", "exit", ""), ("spec", "num_draft_tokens", "")]
    figures = [
        *((_short(name), name, ".4g" if lower_is_better(name) else percent) for name in metrics),
        *([("change", f"{ranked}_change", "±.0%")] if changed else []),
        ("ppl", "perplexity", "ppl"),
        ("accept", "acceptance_rate", ".1%"),
        ("mean", "mean_accepted_tokens", ".1f"),
        ("tok/s", "tokens_per_second", ".0f"),
        ("speed", "speedup", "±.2f"),
        ("vs hf", "speedup_over_transformers", ".2f"),
        ("pred", "predicted_speedup", ".2f"),
        ("same", "identical_outputs", ".0%"),
        ("first", "ttft_ms", ".1f"),
        ("MB", "peak_memory_mb", ".0f"),
        ("", "front", "*"),
    ]
    return setting + [
        column for column in figures if any(row.get(column[1]) not in (None, "") for row in rows)
    ]


def findings(record: RunRecord) -> Iterator[str]:
    """The findings, the recommendation or the verdict last."""
    for skip in dict.fromkeys(counts_text(result.skip) for result in record.results if result.skip):
        yield f"Layers that drafts skip: --skip {skip}."
    if "repeats" in record.config:
        for result in record.results:
            steps = result.steps_by_drafter
            if result.strategy == "adaptive" and len(steps) > 1:
                ordered = sorted(steps, key=lambda name: (name == "plain", -steps[name]))
                shares = ", ".join(
                    f"{name} {steps[name] / sum(steps.values()):.0%}" for name in ordered
                )
                yield f"Steps of adaptive decoding: {shares}."
        yield from _verdict(record)
    if advice := record.recommendation:
        yield f"Policy {FAST}: {advice.fast_reason}."
        yield f"Policy {EXACT}: {policy_text(advice.policies[EXACT])}."
        yield f"{'Recommended' if advice.pays else 'Not recommended'}: {advice.reason}."


def _verdict(record: RunRecord) -> Iterator[str]:
    """The fastest strategy of a benchmark with the outputs of autoregressive decoding, up to
    near-ties.
    """
    plain, *others = record.results
    sampled = record.config.get("generation", {}).get("temperature")
    tie = math.inf if sampled else NEAR_TIE[getattr(torch, record.environment["dtype"])]
    same = [
        result
        for result in others
        if result.strategy != "early-exit" and result.keeps_outputs(plain, tie)
    ]
    timed = [result for result in same if result.speedup is not None]
    what = "outputs of the same distribution" if sampled else "the same outputs"
    if others and not same:
        yield f"No other strategy had {what} as autoregressive decoding."
    elif timed:
        best = max(timed, key=lambda result: result.speedup or 0.0)
        speedup = best.speedup or 0.0
        ends = best.intervals.get("speedup")
        summary = f"{result_name(best)}, {speedup:.2f}x autoregressive"
        rows = best.rows_to_halve
        halved = (
            ""
            if rows is None
            else f"; about {plural(rows, 'row')} would halve it"
            if rows
            else "; more repeats would halve it"
        )
        if ends is not None and ends.high - ends.low >= 2 * speedup:
            summary += " (too few rows for an interval)"
        elif ends is not None:
            summary += f" (95% interval {ends.low:.2f} to {ends.high:.2f}{halved})"
        if best.differences and not sampled:
            summary += f"; {plural(len(best.differences), 'output')} differed at a near-tie"
        surely = ends is not None and ends.low > 1
        yield f"{'Fastest' if surely else 'Nothing was certainly faster'} with {what}{':' if surely else '; best:'} {summary}."


def has_scores(record: RunRecord) -> bool:
    """Whether the metrics are scores of lm-evaluation-harness, named `TASK METRIC`."""
    return str(record.config["task"].get("task")).startswith(HARNESS)


def score_table(record: RunRecord) -> TextTable:
    """A row per task and metric, a column per setting; below them the figures of generated
    answers.
    """
    results = record.results
    config = record.config
    machine = record.environment
    counts = {
        task: rows
        for result in results
        if isinstance(result.samples, dict)
        for task, rows in result.samples.items()
    }
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        task, _, metric = name.partition(" ")
        rows.append(
            (
                task,
                metric,
                str(counts.get(task, "-")),
                *(_score(result, name) for result in results),
            )
        )
    for name, label, form in (
        ("identical_outputs", "identical outputs", ".1%"),
        ("acceptance_rate", "acceptance rate", ".1%"),
        ("tokens_per_second", "tokens/s", ".0f"),
        ("speedup", "speedup", ".2f"),
    ):
        cells = [cell(row, name, form) for row in flat_rows(record)]
        if set(cells) != {"-"}:
            rows.append(("all answers", label, "", *cells))
    samples = config["task"].get("samples")
    shown = f"the first {samples} rows of each task" if samples else "all rows of each task"
    note = f"Scores of lm-eval {machine.get('versions', {}).get('lm_eval', '')}, ± its standard error; {shown}."
    note += f"\nPrompt template: {config.get('prompt_template')}; {machine['dtype']} on {machine['device_name']}."
    names = [
        {"autoregressive": "full depth", "early-exit": f"exit {result.exit_layer}"}.get(
            result.strategy, strategy_name(result)
        )
        for result in results
    ]
    found = tuple(_verdict(record)) if "repeats" in config else ()
    return TextTable(("task", "metric", "n", *names), tuple(rows), note, 3, findings=found)


def _score(result: Result, name: str) -> str:
    """`.612±.034`, or a perplexity with three digits."""
    value = result.metrics.get(name)
    error = result.stderr.get(name)
    if lower_is_better(name):
        return number(value, ".3g") + ("" if error is None else f"±{error:.2g}")
    return number(value, ".3f") + ("" if error is None else f"±{error:.3f}".replace("±0.", "±."))


def flat_rows(record: RunRecord) -> list[dict[str, Any]]:
    """A row per result and per category, with a plain value for each figure and interval end, and
    NAMES.
    """
    rows = []
    full = record.results[0].metrics if record.results else {}
    for result, figures in zip(record.results, record.document()["results"], strict=True):
        categories = figures.pop("categories")
        depth = result.mean_layers
        own = {
            name: figures[name]
            for name in ("strategy", "exit_layer", "num_draft_tokens", "draft_weights")
        }
        changes = {f"{name}_change": result.metrics[name] - full[name] for name in result.changes}
        name = strategy_name(result) if result.exit_confidence is None else result_name(result)
        exit_layer = result.exit_layer if depth is None else f"{depth:.1f}"
        named = {"setting": name, "exit": exit_layer, "front": "*" if result.pareto else ""}
        rows.append({**_flat(figures), **changes, **named})
        for category, each in categories.items():
            named |= {"setting": f"  {category} ({each['samples']})", "front": ""}
            rows.append({**_flat({**each, **own, "category": category}), **named})
    return rows


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "metrics":
            flat |= value
        elif key in ("intervals", "changes"):
            part = "_change" if key == "changes" else ""
            flat |= {
                f"{name}{part}_{end}": ends[end == "high"]
                for name, ends in value.items()
                for end in ("low", "high")
            }
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": part for name, part in value.items()}
        elif key == "skip":
            flat[key] = counts_text(value)
        elif key == "acceptance_by_position":
            flat[key] = " ".join(map(str, value or ()))
        elif isinstance(value, list | tuple):
            flat[key] = len(value)
        # An unmeasured figure must not hide a metric of its name: perplexity
        elif value is not None or key not in flat:
            flat[key] = value
    return flat


def cell(row: Row, name: str, form: str) -> str:
    """A figure in this format: `2.31±.12`, `81±2%` after `±`, `-` if not measured, 1.2e4 for `ppl`,
    a mark for `*`.
    """
    spread = form.startswith("±")
    form = form.removeprefix("±")
    value = row.get(name)
    low = row.get(f"{name}_low")
    high = row.get(f"{name}_high")
    if value in (None, "") or form == "*":
        return str(value or "") if form == "*" else "-"
    if form == "ppl":
        return (
            f"{value:.3g}"
            if value < 999.5
            else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
        )
    if not spread or low is None or high is None:
        return format(value, form)
    if form.endswith("%"):
        return f"{100 * value:.0f}±{50 * (high - low):.0f}%"
    half = (high - low) / 2
    shown = _FEW_ROWS if half >= value else f"{half:{form}}".removeprefix("0" if half < 1 else "")
    return f"{value:{form}}±{shown}"


def _settings_notes(record: RunRecord) -> Iterator[str]:
    """Notes on measurement, prompts and decoding that differ from the defaults, and on exits with a
    block.
    """
    config = record.config
    machine = record.environment
    generation = config.get("generation", {})
    if "repeats" in config:
        medians = f"medians of {plural(config['repeats'], 'repeat')}"
        method = medians.capitalize()
        if config.get("batch_size", 1) > 1:
            speed = (
                f"{plural(config['timed'], 'prompt')} at batch size 1, {medians}"
                if config.get("timed")
                else "not measured"
            )
            method = f"Quality: answers in batches of {config['batch_size']}; speed: {speed}"
        yield f"{method}; {machine['dtype']} on {machine['device_name']}, {plural(machine['threads'], 'thread')}."
    if (busy := machine.get("busy_cores", 0.0)) >= _DISTURBING:
        yield f"Other processes kept {busy:.1f} cores busy: speeds are lower than on a quiet machine, and intervals wider."
    if read := machine.get("bandwidth"):
        yield f"P{bandwidth_text(read)[1:]}."
    if "prompt_template" in config:
        yield f"Prompt template: {config['prompt_template']}."
    if temperature := generation.get("temperature"):
        top = f"top-k {generation.get('top_k', 0)}, top-p {generation.get('top_p', 1):g}"
        yield f"Sampled at temperature {temperature:g}, {top}."
    if lookup := generation.get("lookup"):
        yield f"Matches of {lookup} tokens or more are drafts, before anything else drafts."
    if "specs" in config and (lookup or temperature):
        yield "Predictions are for greedy decoding with whole drafts."
    if "llama_cpp" in machine:
        yield f"llama.cpp: {machine['llama_cpp']}, on {config.get('gguf')}."
    with_transformers = any(name in TRANSFORMERS_BASELINES for name in config.get("baselines", ()))
    if (
        with_transformers
        and config.get("timed") != 0
        and not str(machine.get("device")).startswith("cuda")
    ):
        yield "MB: of the whole process, which also holds transformers' copy of the model."
    if blocks := machine.get("exit_blocks", {}):
        yield f"Exits with a block: {', '.join(map(str, blocks))}."


def _short(metric: str) -> str:
    return _SHORT_NAMES.get(metric, metric.replace("pass@", "p@"))


@dataclass(frozen=True)
class Points:
    """Tokens per second and the quality metric, in percent unless a lower value is better."""

    results: list[Result]
    speeds: list[float]
    values: list[float]
    optimal: list[int]  # indices of the points on the Pareto frontier
    strategies: list[str]  # their names, in the order of the results
    lower_is_better: bool
    quality_label: str


def points_of(record: RunRecord) -> Points | None:
    """None without quality or speed."""
    metric = str(record.config.get("quality_metric"))
    shown = [
        result
        for result in record.results
        if metric in result.metrics and result.tokens_per_second is not None
    ]
    if not shown:
        return None
    lower = lower_is_better(metric)
    share = is_share(metric)
    speeds = [result.tokens_per_second or 0.0 for result in shown]
    values = [result.metrics[metric] * (100 if share else 1) for result in shown]
    label = f"Quality: {metric.replace('_', ' ')}" + (
        ", lower is better" if lower else " (%)" if share else ""
    )
    strategies = list(dict.fromkeys(map(strategy_name, shown)))
    return Points(shown, speeds, values, frontier(shown, metric), strategies, lower, label)


def is_wide(values: list[float]) -> bool:
    """Whether an axis should be logarithmic: one very fast exit would squeeze all other points
    together.
    """
    return max(values) > _WIDE * min(values) > 0
