"""Records of sweeps and benchmarks as text tables, and as the flat rows of CSV files and pages."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.decoding import EXACT, FAST, policy_text
from ...config.evaluation import HARNESS, TRANSFORMERS_BASELINES
from ...config.options import counts_text
from ...wording import number, plural
from ..metrics import is_share, lower_is_better
from ..results import Bounds, Result, RunRecord

PARETO_NOTE = "* on the Pareto frontier of quality and speed; pred: predicted speedup."
_HALF_NOTE = "±: half-width of the 95% bootstrap interval over prompts."
_SHORT_NAMES = {"exact_match": "EM", "rouge1": "R1", "rouge2": "R2", "rougeL": "RL"}

Columns = dict[str, Callable[[Result], str]]
"""Header -> the cell of a result, in the order shown."""


@dataclass(frozen=True)
class TextTable:
    """Cells as text. The first `labels` columns identify a row."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    labels: int = 1

    def column_blocks(self, width: int) -> list[list[int]]:
        """The columns as one table, or several of at most `width` characters. Every block repeats the label columns."""
        sizes = [max(map(len, cells)) + 1 for cells in zip(self.headers, *self.rows, strict=True)]  # with a space
        labels = list(range(self.labels))
        blocks = [labels]
        for column in range(self.labels, len(sizes)):
            if len(blocks[-1]) > self.labels and sum(sizes[index] for index in [*blocks[-1], column]) - 1 > width:
                blocks.append(labels)
            blocks[-1] = [*blocks[-1], column]
        return blocks

    def markdown(self) -> str:
        lines = [self.headers, tuple("---" for _ in self.headers), *self.rows]
        escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in lines)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in escaped) + f"\n\n{self.note}\n"


def strategy_name(result: Result) -> str:
    """What tables and figures call a strategy: `int8 drafts` for drafts by a low-bit copy."""
    return f"{result.draft_weights} drafts" if result.draft_weights and not result.skip else result.strategy


def result_name(result: Result) -> str:
    """A result's name in figures: `exit 8, 6 drafts`, `int8 exit 8, 6 drafts`, `exit 8 alone`, `lookup, 6 drafts`."""
    if result.strategy in ("autoregressive", "transformers"):
        return result.strategy
    if result.exit_confidence is not None:
        return f"exits at {result.exit_confidence:.6g}"
    if result.strategy == "early-exit":
        return f"exit {result.exit_layer} alone"
    parts = [] if result.strategy == "self-speculative" else [result.strategy]
    if result.exit_layer is not None:
        parts.append(f"{result.draft_weights or ''} exit {result.exit_layer}".strip())
    parts += [plural(result.num_draft_tokens, "draft")] if result.num_draft_tokens else []
    return ", ".join(parts)


def sweep_table(record: RunRecord) -> TextTable:
    """A row per setting. Fits 80 columns with one metric. A dash marks what was not measured."""
    results, full = record.results, record.results[0]
    metrics = [name for name in full.metrics if name != "perplexity"]  # it has its own column
    ranked = str(record.config.get("quality_metric"))
    changed = is_share(ranked) and any(ranked in result.changes for result in results)
    columns: Columns = {
        "strategy": lambda result: strategy_name(result) if result.exit_confidence is None else result_name(result),
        "exit": lambda result: number(result.exit_layer, "") if result.mean_layers is None else f"{result.mean_layers:.1f}",
        "spec": lambda result: number(result.num_draft_tokens, ""),
        **_metric_columns(metrics, 1 if len(metrics) == 1 else 0),  # with two metrics there is no room for decimals
        **({"change": lambda result: _half(*_change(result, ranked, full), ".0%")} if changed else {}),
        "ppl": lambda result: _perplexity(result.perplexity),
        "accept": lambda result: number(result.acceptance_rate, ".1%"),
        "mean": lambda result: number(result.mean_accepted_tokens, ".1f"),
        "tok/s": lambda result: number(result.tokens_per_second, ".0f"),
        "speed": lambda result: _half(*_with_ends(result, "speedup"), ".2f"),
        "pred": lambda result: number(result.predicted_speedup, ".2f"),
        "same": lambda result: number(result.identical_outputs, ".0%"),
        "": lambda result: "*" if result.pareto else "",
    }
    notes = [PARETO_NOTE]
    if any(result.exit_confidence is not None for result in results):
        notes.append(
            "exits at P: each token leaves at the first exit with a probability above P; exit: its layers, on average."
        )
    if any(result.intervals for result in results):
        notes.append(_HALF_NOTE)
    if changed:
        notes.append(f"change: of {_short(ranked)} from full depth, on the same prompts.")
    notes += [*_settings_notes(record), *_advice(record)]
    return TextTable(tuple(columns), _rows(columns, results), "\n".join(notes), labels=3)


def _advice(record: RunRecord) -> Iterator[str]:
    """What a sweep found out, as notes."""
    for skip in dict.fromkeys(counts_text(result.skip) for result in record.results if result.skip):
        yield f"Layers that drafts skip: --skip {skip}."
    if error := record.prediction_error:
        over = f"Prediction error over {plural(error.settings, 'setting')}"
        yield f"{over}: median {error.median:.1%}, largest {error.largest:.1%}, mean {error.mean:+.1%}."
    if advice := record.recommendation:
        yield f"{'Recommended' if advice.pays else 'Not recommended'}: {advice.reason}."
        if EXACT in advice.policies:
            yield f"Policy {EXACT}: {policy_text(advice.policies[EXACT])}."
        if advice.fast_reason:
            yield f"Policy {FAST}: {advice.fast_reason}."


def bench_table(record: RunRecord) -> TextTable:
    """A column per strategy, a row per figure that any of them has."""
    results, config, machine = record.results, record.config, record.environment
    rows = ((name, *map(cell, results)) for name, cell in _bench_figures(results[0]).items())
    medians = f"medians of {plural(config['repeats'], 'repeat')}"
    method = medians.capitalize()
    if config.get("batch_size", 1) > 1:
        speed = f"{plural(config['timed'], 'prompt')} at batch size 1, {medians}" if config.get("timed") else "not measured"
        method = f"Quality: answers in batches of {config['batch_size']}; speed: {speed}"
    notes = [f"{method}; {machine['dtype']} on {machine['device_name']}, {plural(machine['threads'], 'thread')}."]
    if any(result.intervals for result in results):
        notes.append("In brackets: 95% bootstrap intervals over prompts.")
    notes += _settings_notes(record)
    if "llama_cpp" in machine:
        notes.append(f"llama.cpp: {machine['llama_cpp']}, on {config.get('gguf')}.")
    with_transformers = any(name in TRANSFORMERS_BASELINES for name in config.get("baselines", ()))
    if with_transformers and config.get("timed") != 0 and not str(machine.get("device")).startswith("cuda"):
        notes.append("Memory is that of the whole process, which also holds transformers' copy of the model.")
    known = tuple(row for row in rows if set(row[1:]) != {"-"})
    return TextTable(("", *map(strategy_name, results)), known, "\n".join(notes))


def _bench_figures(full: Result) -> Columns:
    """The rows of a benchmark. Below each metric: by how much it differs from that of `full` depth, if any answer does."""

    def metric(name: str) -> Columns:
        label, form = name.replace("_", " "), ".4g" if lower_is_better(name) else ".1%"
        return {
            label: lambda result: _ends(*_with_ends(result, name), form),
            f"{label}, change": lambda result: _ends(*_change(result, name, full), f"+{form}"),
        }

    figures = {
        "exit layer": lambda result: number(result.exit_layer, ""),
        "exit confidence": lambda result: number(result.exit_confidence, ".3g"),
        "mean layers": lambda result: number(result.mean_layers, ".1f"),
        "draft tokens": lambda result: number(result.num_draft_tokens, ""),
        "draft weights": lambda result: result.draft_weights or "-",
        "skipped layers": lambda result: counts_text(result.skip) or "-",
        "drafted by": lambda result: _shares(result.steps_by_drafter),
    }
    for name in full.metrics:
        figures |= metric(name)
    return figures | {
        "identical outputs": lambda result: number(result.identical_outputs, ".1%"),
        "acceptance rate": lambda result: number(result.acceptance_rate, ".1%"),
        "mean accepted tokens": lambda result: number(result.mean_accepted_tokens, ".2f"),
        "tokens/s": lambda result: number(result.tokens_per_second, ".1f"),
        "speedup": lambda result: _ends(*_with_ends(result, "speedup"), ".2f"),
        "over transformers": lambda result: _ends(*_with_ends(result, "speedup_over_transformers"), ".2f"),
        "decode speedup": lambda result: _ends(*_with_ends(result, "decode_speedup"), ".2f"),
        "first token (ms)": lambda result: number(result.ttft_ms, ".1f"),
        "token p50 (ms)": lambda result: number(result.time_per_token_ms.get("p50"), ".2f"),
        "token p95 (ms)": lambda result: number(result.time_per_token_ms.get("p95"), ".2f"),
        "peak memory (MB)": lambda result: number(result.peak_memory_mb, ".0f"),
    }


def category_tables(record: RunRecord) -> list[TextTable]:
    """A row per strategy and category of the data; no table if it has none."""
    categories = [(result, name, figures) for result in record.results for name, figures in result.categories.items()]
    if not categories:
        return []
    columns: Columns = {
        "n": lambda result: str(result.samples),
        **_metric_columns(list(categories[0][2].metrics), 1),
        "same": lambda result: number(result.identical_outputs, ".0%"),
        "accept": lambda result: _half(*_with_ends(result, "acceptance_rate"), ".1%"),
        "mean": lambda result: _half(*_with_ends(result, "mean_accepted_tokens"), ".1f"),
        "tok/s": lambda result: number(result.tokens_per_second, ".0f"),
        "speed": lambda result: _half(*_with_ends(result, "speedup"), ".2f"),
    }
    cells = _rows(columns, [figures for *_, figures in categories])
    rows = tuple((strategy_name(result), name, *row) for (result, name, _), row in zip(categories, cells, strict=True))
    return [TextTable(("strategy", "category", *columns), rows, _HALF_NOTE, labels=2)]


def has_scores(record: RunRecord) -> bool:
    """Whether the record's metrics are scores of lm-evaluation-harness, named `TASK METRIC`."""
    return str(record.config["task"].get("task")).startswith(HARNESS)


def score_table(record: RunRecord) -> TextTable:
    """A row per task and metric, a column per setting; below them the figures of generated answers."""
    results, config, machine = record.results, record.config, record.environment
    counts = {task: rows for result in results if isinstance(result.samples, dict) for task, rows in result.samples.items()}
    rows = []
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        task, _, metric = name.partition(" ")
        rows.append((task, metric, str(counts.get(task, "-")), *(_score(result, name) for result in results)))
    answers: Columns = {
        "identical outputs": lambda result: number(result.identical_outputs, ".1%"),
        "acceptance rate": lambda result: number(result.acceptance_rate, ".1%"),
        "tokens/s": lambda result: number(result.tokens_per_second, ".0f"),
        "speedup": lambda result: number(result.speedup, ".2f"),
    }
    below = [("all answers", name, "", *map(cell, results)) for name, cell in answers.items()]
    rows += [row for row in below if set(row[3:]) != {"-"}]
    samples = config["task"].get("samples")
    shown = f"the first {samples} rows of each task" if samples else "all rows of each task"
    note = f"Scores of lm-eval {machine.get('versions', {}).get('lm_eval', '')}, ± its standard error; {shown}."
    note += f"\nPrompt template: {config.get('prompt_template')}; {machine['dtype']} on {machine['device_name']}."
    names = [
        {"autoregressive": "full depth", "early-exit": f"exit {result.exit_layer}"}.get(result.strategy, strategy_name(result))
        for result in results
    ]
    return TextTable(("task", "metric", "n", *names), tuple(rows), note, labels=3)


def _score(result: Result, name: str) -> str:
    """`.612±.034`, or a perplexity with three digits."""
    value, error = result.metrics.get(name), result.stderr.get(name)
    if lower_is_better(name):
        return number(value, ".3g") + ("" if error is None else f"±{error:.2g}")
    return number(value, ".3f") + ("" if error is None else f"±{error:.3f}".replace("±0.", "±."))


def flat_rows(record: RunRecord) -> list[dict[str, Any]]:
    """A row per result, and below it one per category, with a plain value for each figure.

    Metrics, times and the ends of intervals have a column each; differences and failures are counted.
    """
    rows = []
    for result in record.document()["results"]:
        categories = result.pop("categories")
        setting = {name: result[name] for name in ("strategy", "exit_layer", "num_draft_tokens", "draft_weights")}
        rows.append(_flat(result))
        rows += [_flat({**figures, **setting, "category": name}) for name, figures in categories.items()]
    return rows


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "metrics":
            flat |= value
        elif key in ("intervals", "changes"):
            part = "_change" if key == "changes" else ""
            flat |= {f"{name}{part}_{end}": ends[end == "high"] for name, ends in value.items() for end in ("low", "high")}
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": part for name, part in value.items()}
        elif key == "skip":
            flat[key] = counts_text(value)
        elif key == "acceptance_by_position":
            flat[key] = " ".join(map(str, value or ()))
        elif isinstance(value, list | tuple):
            flat[key] = len(value)
        elif value is not None or key not in flat:  # a metric can have the name of a figure that was not measured: perplexity
            flat[key] = value
    return flat


def _rows(columns: Columns, results: Sequence[Result]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell(result) for cell in columns.values()) for result in results)


def _metric_columns(names: Sequence[str], decimals: int) -> Columns:
    """Under short names; shares with half of their intervals."""

    def column(name: str) -> Callable[[Result], str]:
        if lower_is_better(name):
            return lambda result: number(result.metrics.get(name), ".4g")
        return lambda result: _half(*_with_ends(result, name), f".{decimals}%")

    return {_short(name): column(name) for name in names}


def _with_ends(result: Result, name: str) -> tuple[float | None, Bounds | None]:
    """A metric or another figure, and its interval."""
    value = result.metrics[name] if name in result.metrics else getattr(result, name, None)
    return value, result.intervals.get(name)


def _change(result: Result, name: str, full_depth: Result) -> tuple[float | None, Bounds | None]:
    """By how much a metric differs from full depth; None where no prompt differs."""
    ends = result.changes.get(name)
    return (None if ends is None else result.metrics[name] - full_depth.metrics[name]), ends


def _half(value: float | None, ends: Bounds | None, form: str) -> str:
    """`2.31±.12`, `81±2%`: a figure and half the width of its 95% interval."""
    if value is None or ends is None:
        return number(value, form)
    half = (ends.high - ends.low) / 2
    if form.endswith("%"):
        return f"{100 * value:.0f}±{100 * half:.0f}%"
    return f"{value:{form}}" + f"±{half:{form}}".replace("±0.", "±.")


def _ends(value: float | None, ends: Bounds | None, form: str) -> str:
    """`2.31 (2.20-2.44)`, `-8.3% (-25 to +8)`: a figure and its 95% interval."""
    if ends is None:
        return number(value, form)
    scale, shown = (100, form.replace(".1%", ".0f")) if form.endswith("%") else (1, form)  # the figure has the sign
    between = " to " if form.startswith("+") else "-"
    return number(value, form) + f" ({scale * ends.low:{shown}}{between}{scale * ends.high:{shown}})"


def _settings_notes(record: RunRecord) -> Iterator[str]:
    """How prompts and answers were made, as far as it is not the default, and which exits have a block."""
    config = record.config
    generation = config.get("generation", {})
    if "prompt_template" in config:
        yield f"Prompt template: {config['prompt_template']}."
    if temperature := generation.get("temperature"):
        top = f"top-k {generation.get('top_k', 0)}, top-p {generation.get('top_p', 1):g}"
        yield f"Sampled at temperature {temperature:g}, {top}."
    if confidence := generation.get("draft_confidence"):
        yield f"Drafts stop below a confidence of {confidence:g}."
    if lookup := generation.get("lookup"):
        yield f"Matches of {lookup} tokens or more are drafts, before anything else drafts."
    if "specs" in config and (confidence or lookup or temperature):
        yield "Predictions are for greedy decoding with whole drafts."
    blocks = record.environment.get("exit_blocks", {})
    if blocks:
        named = ", ".join(f"{exit_layer} (feature {feature})" for exit_layer, feature in blocks.items())
        yield f"Exits with a block: {named}."


def _shares(steps_by_drafter: dict[str, int]) -> str:
    """`lookup 21%, int8 72%, plain 7%`: the share of steps by what drafted. A dash if one drafter made all drafts."""
    total = sum(steps_by_drafter.values())
    if len(steps_by_drafter) < 2:
        return "-"
    ordered = sorted(steps_by_drafter.items(), key=lambda item: (item[0] == "plain", -item[1]))
    return ", ".join(f"{name} {count / total:.0%}" for name, count in ordered)


def _short(metric: str) -> str:
    return _SHORT_NAMES.get(metric, metric.replace("pass@", "p@"))


def _perplexity(value: float | None) -> str:
    """Three significant digits, with short exponents: 12.3, 1.2e4."""
    return number(value, ".3g") if value is None or value < 1000 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
