"""Scores of lm-evaluation-harness: a table of tasks by setting, and the curves over the exits."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...config.evaluation import HARNESS
from ...wording import number
from ..metrics import lower_is_better
from ..results import Result, RunRecord
from .drawing import GREY, color, new_figure
from .points import label
from .tables import TextTable, strategy_name

Record = RunRecord


def has_scores(record: Record) -> bool:
    """Whether the record's metrics are scores of lm-evaluation-harness, named `TASK METRIC`."""
    return str(record.config["task"].get("task")).startswith(HARNESS)


def score_table(record: Record) -> TextTable:
    """A row per task and metric, a column per setting; below them the figures of generated answers."""
    results = record.results
    names = dict.fromkeys(name for result in results for name in result.metrics)
    rows = [(*_parts(name, results), *(_score(result, name) for result in results)) for name in names]
    figures = {
        "identical outputs": [number(result.identical_outputs, ".1%") for result in results],
        "acceptance rate": [number(result.acceptance_rate, ".1%") for result in results],
        "tokens/s": [number(result.tokens_per_second, ".0f") for result in results],
        "speedup": [number(result.speedup, ".2f") for result in results],
    }
    rows += [("all answers", name, "", *cells) for name, cells in figures.items() if set(cells) != {"-"}]
    config, machine = record.config, record.environment
    samples = config["task"].get("samples")
    note = f"Scores of lm-eval {machine.get('versions', {}).get('lm_eval', '')}, ± its standard error"
    note += f"; the first {samples} rows of each task." if samples else "; all rows of each task."
    note += f"\nPrompt template: {config.get('prompt_template')}; {machine['dtype']} on {machine['device_name']}."
    headers = ("task", "metric", "n", *(_setting_name(result) for result in results))
    return TextTable(headers, tuple(rows), note, labels=3)


def scores_by_exit(record: Record) -> Figure | None:
    """Accuracies and the like, of which more is better."""
    return _by_exit(record, "Scores by exit", lower=False)


def lower_scores_by_exit(record: Record) -> Figure | None:
    """Perplexities and the like."""
    return _by_exit(record, "Perplexities by exit", lower=True)


def _by_exit(record: Record, caption: str, lower: bool) -> Figure | None:
    """A line per task, of its first metric, with the standard errors, and a dashed line at full depth."""
    if not has_scores(record):
        return None
    exits = [result for result in record.results if result.strategy == "early-exit" and result.exit_layer is not None]
    names: dict[str, str] = {}  # by task
    for name in record.results[0].metrics:
        if lower_is_better(name) == lower:
            names.setdefault(name.split()[0], name)
    if len(exits) < 2 or not names:
        return None
    figure, axes = new_figure(caption)
    for place, name in enumerate(names.values()):
        shown = [result for result in exits if name in result.metrics]
        layers, values = [result.exit_layer for result in shown], [result.metrics[name] for result in shown]
        errors = [result.stderr.get(name, 0.0) for result in shown]
        axes.errorbar(layers, values, errors, marker="o", markersize=4, capsize=2, color=color(place), label=name)
        axes.axhline(record.results[0].metrics[name], linestyle="--", linewidth=1, color=color(place))
    axes.plot([], [], linestyle="--", linewidth=1, color=GREY, label="all layers")
    if lower:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="exit layer", ylabel="lower is better" if lower else "score")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return figure


def _setting_name(result: Result) -> str:
    if result.strategy == "autoregressive":
        return "full depth"
    return f"exit {result.exit_layer}" if label(result).endswith("alone") else strategy_name(result)


def _parts(name: str, results: Sequence[Result]) -> tuple[str, str, str]:
    """Task, metric and number of rows."""
    task, _, metric = name.partition(" ")
    by_task = [result.samples for result in results if isinstance(result.samples, dict)]
    samples = next((counts[task] for counts in by_task if task in counts), None)
    return task, metric, "-" if samples is None else str(samples)


def _score(result: Result, name: str) -> str:
    """`.612±.034`, or a perplexity with three digits."""
    value, error = result.metrics.get(name), result.stderr.get(name)
    if lower_is_better(name):
        return number(value, ".3g") + ("" if error is None else f"±{error:.2g}")
    return number(value, ".3f") + ("" if error is None else f"±{error:.3f}".replace("±0.", "±."))
