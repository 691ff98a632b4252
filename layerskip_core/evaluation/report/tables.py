"""Records of sweeps and benchmarks as text tables."""

from collections.abc import Sequence
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
    own = result.strategy == "self-speculative"
    parts = [] if own else [result.strategy]
    if result.exit_layer is not None:
        parts.append(f"{result.draft_weights or ''} exit {result.exit_layer}".strip())
    parts += [plural(result.num_draft_tokens, "draft")] if result.num_draft_tokens else []
    return ", ".join(parts)


def sweep_table(record: RunRecord) -> TextTable:
    """A row per setting. Fits 80 columns with one metric. A dash marks what was not measured."""
    metrics = [name for name in record.results[0].metrics if name != "perplexity"]  # it has its own column
    decimals = 1 if len(metrics) == 1 else 0  # with two metrics there is no room for more
    ranked = str(record.config.get("quality_metric"))
    changes = ["change"] if is_share(ranked) and any(ranked in result.changes for result in record.results) else []
    figures = ("ppl", "accept", "mean", "tok/s", "speed", "pred", "same", "")
    headers = ("strategy", "exit", "spec", *map(_short, metrics), *changes, *figures)
    rows = [
        (
            strategy_name(result) if result.exit_confidence is None else f"exits at {result.exit_confidence:.6g}",
            _count(result.exit_layer) if result.mean_layers is None else f"{result.mean_layers:.1f}",
            _count(result.num_draft_tokens),
            *(_share(result, name, decimals) for name in metrics),
            *(_change(result, ranked, record.results[0].metrics) for _ in changes),
            _perplexity(result.perplexity),
            _percent(result.acceptance_rate, 1),
            number(result.mean_accepted_tokens, ".1f"),
            number(result.tokens_per_second, ".0f"),
            _with_half(result, "speedup"),
            number(result.predicted_speedup, ".2f"),
            _percent(result.identical_outputs),
            "*" if result.pareto else "",
        )
        for result in record.results
    ]
    note = PARETO_NOTE
    if any(result.exit_confidence is not None for result in record.results):
        note += "\nexits at P: each token leaves at the first exit with a probability above P; exit: its layers, on average."
    if any(result.intervals for result in record.results):
        note += f"\n{_HALF_NOTE}"
    note += f"\nchange: of {_short(ranked)} from full depth, on the same prompts." if changes else ""
    note += _settings_note(record.config) + _blocks_note(record.environment)
    note += "".join(f"\nLayers that drafts skip: --skip {skip}." for skip in _skips(record.results))
    error = record.prediction_error
    if error is not None:
        note += (
            f"\nPrediction error over {plural(error.settings, 'setting')}: median {error.median:.1%}, "
            f"largest {error.largest:.1%}, mean {error.mean:+.1%}."
        )
    advice = record.recommendation
    if advice is not None:
        note += f"\n{'Recommended' if advice.pays else 'Not recommended'}: {advice.reason}."
        note += f"\nPolicy {EXACT}: {policy_text(advice.policies[EXACT])}." if EXACT in advice.policies else ""
        note += f"\nPolicy {FAST}: {advice.fast_reason}." if advice.fast_reason else ""
    return TextTable(headers, tuple(rows), note, labels=3)


def bench_table(record: RunRecord) -> TextTable:
    """A column per strategy, a row per figure."""
    results = record.results
    over_transformers = [result.speedup_over_transformers for result in results]
    rows: list[tuple[str, list[str]]] = [
        ("exit layer", [_count(result.exit_layer) for result in results]),
        ("exit confidence", [number(result.exit_confidence, ".3g") for result in results]),
        ("mean layers", [number(result.mean_layers, ".1f") for result in results]),
        ("draft tokens", [_count(result.num_draft_tokens) for result in results]),
        ("draft weights", [result.draft_weights or "-" for result in results]),
        ("skipped layers", [counts_text(result.skip) or "-" for result in results]),
        ("drafted by", [_shares(result.steps_by_drafter) for result in results]),
        *(row for name in results[0].metrics for row in _metric_rows(results, name)),
        ("identical outputs", [_percent(result.identical_outputs, 1) for result in results]),
        ("acceptance rate", [_percent(result.acceptance_rate, 1) for result in results]),
        ("mean accepted tokens", [number(result.mean_accepted_tokens, ".2f") for result in results]),
        ("tokens/s", [number(result.tokens_per_second, ".1f") for result in results]),
        ("speedup", [_with_bounds(result.speedup, result.intervals.get("speedup")) for result in results]),
        *(
            [("over transformers", [_with_bounds(*_over_transformers(result)) for result in results])]
            if any(over_transformers)
            else []
        ),
        ("decode speedup", [_with_bounds(result.decode_speedup, result.intervals.get("decode_speedup")) for result in results]),
        ("first token (ms)", [number(result.ttft_ms, ".1f") for result in results]),
        ("token p50 (ms)", [number(result.time_per_token_ms.get("p50"), ".2f") for result in results]),
        ("token p95 (ms)", [number(result.time_per_token_ms.get("p95"), ".2f") for result in results]),
        ("peak memory (MB)", [number(result.peak_memory_mb, ".0f") for result in results]),
    ]
    rows = [(name, cells) for name, cells in rows if set(cells) != {"-"}]
    machine = record.environment
    where = f"{machine['dtype']} on {machine['device_name']}, {plural(machine['threads'], 'thread')}"
    note = f"{_method(record.config)}; {where}."
    if any(result.intervals for result in results):
        note += "\nIn brackets: 95% bootstrap intervals over prompts."
    note += _settings_note(record.config) + _blocks_note(machine)
    if "llama_cpp" in machine:
        note += f"\nllama.cpp: {machine['llama_cpp']}, on {record.config.get('gguf')}."
    with_transformers = any(name in TRANSFORMERS_BASELINES for name in record.config.get("baselines", ()))
    if with_transformers and record.config.get("timed") != 0 and not str(machine.get("device")).startswith("cuda"):
        note += " Memory is that of the whole process, which also holds transformers' copy of the model."
    return TextTable(("", *map(strategy_name, results)), tuple((name, *cells) for name, cells in rows), note)


def category_tables(record: RunRecord) -> list[TextTable]:
    """A row per strategy and category of the data; no table if it has none."""
    parts = [(result, name, figures) for result in record.results for name, figures in result.categories.items()]
    if not parts:
        return []
    metrics = list(parts[0][2].metrics)
    headers = ("strategy", "category", "n", *map(_short, metrics), "same", "accept", "mean", "tok/s", "speed")
    rows = [
        (
            strategy_name(result),
            name,
            str(figures.samples),
            *(_share(figures, metric, 1) for metric in metrics),
            _percent(figures.identical_outputs),
            _percent(figures.acceptance_rate, 1, figures.intervals.get("acceptance_rate")),
            _with_half(figures, "mean_accepted_tokens", 1),
            number(figures.tokens_per_second, ".0f"),
            _with_half(figures, "speedup"),
        )
        for result, name, figures in parts
    ]
    return [TextTable(headers, tuple(rows), _HALF_NOTE, labels=2)]


def has_scores(record: RunRecord) -> bool:
    """Whether the record's metrics are scores of lm-evaluation-harness, named `TASK METRIC`."""
    return str(record.config["task"].get("task")).startswith(HARNESS)


def score_table(record: RunRecord) -> TextTable:
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


def _setting_name(result: Result) -> str:
    if result.strategy == "autoregressive":
        return "full depth"
    return f"exit {result.exit_layer}" if result_name(result).endswith("alone") else strategy_name(result)


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


def _method(config: dict[str, Any]) -> str:
    """How the figures of a benchmark were measured."""
    medians = f"medians of {plural(config['repeats'], 'repeat')}"
    if config.get("batch_size", 1) == 1:
        return medians.capitalize()
    speed = f"{plural(config['timed'], 'prompt')} at batch size 1, {medians}" if config.get("timed") else "not measured"
    return f"Quality: answers in batches of {config['batch_size']}; speed: {speed}"


def _settings_note(config: dict[str, Any]) -> str:
    """How prompts and answers were made, as far as it is not the default. Older records do not say."""
    generation = config.get("generation", {})
    sampling = generation.get("sampling", generation)  # an object of its own in older records
    notes = []
    if "prompt_template" in config:
        notes.append(f"Prompt template: {config['prompt_template']}.")
    if sampling.get("temperature"):
        notes.append(
            f"Sampled at temperature {sampling['temperature']:g}, top-k {sampling.get('top_k', 0)}, "
            f"top-p {sampling.get('top_p', 1):g}."
        )
    if confidence := generation.get("draft_confidence"):
        notes.append(f"Drafts stop below a confidence of {confidence:g}.")
    if lookup := generation.get("lookup"):
        notes.append(f"Matches of {lookup} tokens or more are drafts, before anything else drafts.")
    if "specs" in config and (confidence or lookup or sampling.get("temperature")):
        notes.append("Predictions are for greedy decoding with whole drafts.")
    return "".join(f"\n{note}" for note in notes)


def _blocks_note(environment: dict[str, Any]) -> str:
    """Which exits have a block."""
    blocks = environment.get("exit_blocks", {})
    named = ", ".join(f"{exit_layer} (feature {feature})" for exit_layer, feature in blocks.items())
    return f"\nExits with a block: {named}." if named else ""


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _shares(steps_by_drafter: dict[str, int]) -> str:
    """`lookup 21%, int8 72%, plain 7%`: the share of steps by what drafted. A dash if one drafter made all drafts."""
    total = sum(steps_by_drafter.values())
    if len(steps_by_drafter) < 2:
        return "-"
    ordered = sorted(steps_by_drafter.items(), key=lambda item: (item[0] == "plain", -item[1]))
    return ", ".join(f"{name} {count / total:.0%}" for name, count in ordered)


def _skips(results: Sequence[Result]) -> list[str]:
    """The layers that drafts skip, as flags give them."""
    return list(dict.fromkeys(counts_text(result.skip) for result in results if result.skip))


def _metric_rows(results: Sequence[Result], name: str) -> list[tuple[str, list[str]]]:
    """A metric with its intervals; below it by how much it differs from full depth, where any answer does."""
    label, rows = name.replace("_", " "), []
    shown = ".4g" if lower_is_better(name) else ".1%"
    rows.append((label, [_with_bounds(result.metrics.get(name), result.intervals.get(name), shown) for result in results]))
    if any(name in result.changes for result in results):
        full = results[0].metrics[name]
        cells = [
            _with_bounds(result.metrics[name] - full, ends, f"+{shown}") if (ends := result.changes.get(name)) else "-"
            for result in results
        ]
        rows.append((f"{label}, change", cells))
    return rows


def _with_bounds(value: float | None, ends: Bounds | None, shown: str = ".2f") -> str:
    """`2.31 (2.20-2.44)`, `-8.3% (-25 to +8)`: a figure and its 95% interval."""
    if ends is None:
        return number(value, shown)
    form = shown.replace(".1%", ".0f")  # without the sign, which the figure has
    low, high = (end * (100 if form != shown else 1) for end in ends)
    return number(value, shown) + f" ({low:{form}}{' to ' if shown.startswith('+') else '-'}{high:{form}})"


def _with_half(result: Result, name: str, decimals: int = 2) -> str:
    """`2.31±.12`: a ratio and half the width of its 95% interval."""
    ends = result.intervals.get(name)
    half = f"±{(ends.high - ends.low) / 2:.{decimals}f}".replace("±0.", "±.") if ends else ""
    return number(getattr(result, name), f".{decimals}f") + half


def _over_transformers(result: Result) -> tuple[float | None, Bounds | None]:
    return result.speedup_over_transformers, result.intervals.get("speedup_over_transformers")


def _share(result: Result, name: str, decimals: int) -> str:
    """A metric in 0..1, or a perplexity."""
    if lower_is_better(name):
        return number(result.metrics.get(name), ".4g")
    return _percent(result.metrics.get(name), decimals, result.intervals.get(name))


def _change(result: Result, name: str, full_depth: dict[str, float]) -> str:
    """`-8±17%`: by how much a metric differs from full depth; a dash where no prompt differs."""
    ends = result.changes.get(name)
    return "-" if ends is None else _percent(result.metrics[name] - full_depth[name], 0, ends)


def _short(metric: str) -> str:
    return _SHORT_NAMES.get(metric, metric.replace("pass@", "p@"))


def _perplexity(value: float | None) -> str:
    """Three significant digits, with short exponents: 12.3, 1.2e4."""
    return number(value, ".3g") if value is None or value < 1000 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _percent(value: float | None, decimals: int = 0, ends: Bounds | None = None) -> str:
    """`81.3%`, or `81±2%` with half of its interval."""
    if value is None:
        return "-"
    return f"{value:.{decimals}%}" if ends is None else f"{100 * value:.0f}±{50 * (ends.high - ends.low):.0f}%"
