"""Records of sweeps and benchmarks as JSON, CSV, tables and reports, and back; files appear whole or not at all."""

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LayerSkipError
from ...storage.locks import hold
from ...storage.writing import require_writable, write_file
from ..measure import journal
from ..measure.bench import BenchResult
from ..measure.sweep import ExitResult
from ..metrics import LOWER_IS_BETTER
from .record import RunRecord

FIGURES = ("pareto", "acceptance_by_exit", "acceptance_by_position", "perplexity", "prediction", "time_split")
REPORT_FILES = ("report.html", "results.json", "results.csv", *(f"{name}.png" for name in FIGURES))
_PROBE_BYTES = 1 << 20  # more than any report takes
_MARKS = "* on the Pareto frontier of quality against speed; pred: the speedup that was predicted."
_SHORT_NAMES = {"exact_match": "EM", "rouge1": "R1", "rouge2": "R2", "rougeL": "RL"}


@dataclass(frozen=True)
class TextTable:
    """Cells as people read them. The first `labels` columns say what a row is."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    labels: int = 1

    def column_blocks(self, width: int) -> list[list[int]]:
        """The columns as one table, or as several of at most `width` characters, a space between columns; labels in each."""
        sizes = [max(map(len, cells)) + 1 for cells in zip(self.headers, *self.rows, strict=True)]
        labels = list(range(self.labels))
        blocks = [labels]
        for place in range(self.labels, len(sizes)):
            if len(blocks[-1]) > self.labels and sum(sizes[one] for one in [*blocks[-1], place]) - 1 > width:
                blocks.append(labels)
            blocks[-1] = [*blocks[-1], place]
        return blocks

    def markdown(self) -> str:
        lines = [self.headers, tuple("---" for _ in self.headers), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{self.note}\n"


def to_json(record: RunRecord[Any]) -> str:
    return json.dumps(record.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(record: RunRecord[Any]) -> str:
    """A row for each result: metrics and times in columns of their own, differences and failures as their count."""
    rows = [_flat(result) for result in record.document()["results"]]
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)  # some lack parts of some
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sweep_table(record: RunRecord[ExitResult]) -> TextTable:
    """A line for each way of decoding; fits 80 columns with one metric or two. Empty cells were not measured."""
    metrics = [name for name in record.results[0].metrics if name != "perplexity"]  # it has a column of its own
    decimals = 1 if len(metrics) == 1 else 0  # two metrics leave no room for more
    names = [_SHORT_NAMES.get(name, name.replace("pass@", "p@")) for name in metrics]
    headers = ("strategy", "exit", "spec", *names, "ppl", "accept", "mean", "tok/s", "speed", "pred", "same", "")
    rows = [
        (
            result.strategy,
            _count(result.exit_layer),
            _count(result.num_draft_tokens),
            *(_percent(result.metrics.get(name), decimals) for name in metrics),
            _perplexity(result.perplexity),
            _percent(result.acceptance_rate, 1),
            _number(result.mean_accepted_tokens, ".1f"),
            _number(result.tokens_per_second, ".0f"),
            _number(result.speedup, ".2f"),
            _number(result.predicted_speedup, ".2f"),
            _percent(result.identical_outputs),
            "*" if result.pareto else "",
        )
        for result in record.results
    ]
    note = _MARKS
    error = record.prediction_error
    if error is not None:
        note += (
            f"\nPrediction error over {error.settings} settings: median {error.median:.1%}, largest {error.largest:.1%}, "
            f"mean {error.mean:+.1%}."
        )
    advice = record.recommendation
    if advice is not None:
        note += f"\n{'Not recommended' if advice.exit_layer is None else 'Recommended'}: {advice.reason}."
    return TextTable(headers, tuple(rows), note, labels=3)


def bench_table(record: RunRecord[BenchResult]) -> TextTable:
    """A column for each strategy, a line for each figure."""
    results = record.results
    versus = [result.speedup_over_transformers for result in results]
    lines: list[tuple[str, list[str]]] = [
        ("exit layer", [_count(result.exit_layer) for result in results]),
        ("draft tokens", [_count(result.num_draft_tokens) for result in results]),
        *((name.replace("_", " "), [_metric(result.metrics, name) for result in results]) for name in results[0].metrics),
        ("identical outputs", [_percent(result.identical_outputs, 1) for result in results]),
        ("acceptance rate", [_percent(result.acceptance_rate, 1) for result in results]),
        ("mean accepted tokens", [_number(result.mean_accepted_tokens, ".2f") for result in results]),
        ("tokens/s", [_number(result.tokens_per_second, ".1f") for result in results]),
        ("speedup", [_number(result.speedup, ".2f") for result in results]),
        *([("over transformers", [_number(over, ".2f") for over in versus])] if any(versus) else []),
        ("speedup behind prefill", [_number(result.decode_speedup, ".2f") for result in results]),
        ("first token (ms)", [_number(result.ttft_ms, ".1f") for result in results]),
        ("token p50 (ms)", [_number(result.time_per_token_ms.get("p50"), ".2f") for result in results]),
        ("token p95 (ms)", [_number(result.time_per_token_ms.get("p95"), ".2f") for result in results]),
        ("peak memory (MB)", [_number(result.peak_memory_mb, ".0f") for result in results]),
    ]
    lines = [(name, cells) for name, cells in lines if set(cells) != {"-"}]
    machine = record.environment
    where = f"{machine['dtype']} on {machine['device_name']}, {_plural(machine['threads'], 'thread')}"
    note = f"{_how(record.config)}; {where}."
    elsewhere = any(name != "no-reuse" for name in record.config.get("baselines", ()))
    if elsewhere and record.config.get("timed") != 0 and not str(machine.get("device")).startswith("cuda"):
        note += " Memory is the whole process's, which holds a copy of the model for transformers besides the engine's."
    return TextTable(("", *(result.strategy for result in results)), tuple((name, *cells) for name, cells in lines), note)


def _how(config: dict[str, Any]) -> str:
    """How the figures of a benchmark came about."""
    medians = f"medians of {_plural(config['repeats'], 'repeat')}"
    if config.get("batch_size", 1) == 1:
        return medians.capitalize()
    speed = f"speed: {_plural(config['timed'], 'prompt')} alone, {medians}" if config.get("timed") else "speed was not measured"
    return f"Quality: answers in batches of {config['batch_size']}; {speed}"


def report_files(record: RunRecord[Any], table: TextTable) -> dict[str, bytes]:
    """Everything that `output` writes: the report, the record as JSON and CSV, and a PNG for each figure."""
    from .html import html_report  # matplotlib takes a while to import
    from .plots import figures, to_png

    made = figures(record)
    notes = table.note.replace(_MARKS, "Green rows are on the Pareto frontier of quality against speed.").splitlines()
    files = {
        "report.html": html_report(record, made, notes[::-1]).encode(),
        "results.json": to_json(record).encode(),
        "results.csv": to_csv(record).encode(),
    }
    return files | {f"{name}.png": to_png(figure) for name, figure in made.items()}


@contextmanager
def output_folder(folder: str | None, doing: str) -> Iterator[Path | None]:
    """The folder of `output`, made, tried and locked; None where none was given. Raises as `prepare_output` and `hold` do."""
    if folder is None:
        yield None
        return
    path = prepare_output(folder)
    with hold(path, doing):
        yield path


def prepare_output(folder: str) -> Path:
    """Creates the folder and tries that it takes a report. Raises LayerSkipError, before a long run rather than after it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise LayerSkipError(f"`output` {folder} must be a folder that can be written, got: {error.strerror}") from error
    for name in REPORT_FILES:
        require_writable(path / name, LayerSkipError)
    for name in (journal.FILE_NAME, journal.OUTPUTS):
        require_writable(path / name, LayerSkipError, regular=True)
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes each file whole. Raises LayerSkipError when one cannot be written; it is then as it was before."""
    for name, content in files.items():
        write_file(folder / name, content, LayerSkipError)


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "metrics":
            flat |= value
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": part for name, part in value.items()}
        elif key == "acceptance_by_position":
            flat[key] = " ".join(map(str, value or ()))
        else:
            flat[key] = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return flat


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _metric(metrics: dict[str, float], name: str) -> str:
    return _number(metrics.get(name), ".4g") if name in LOWER_IS_BETTER else _percent(metrics.get(name), 1)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _perplexity(value: float | None) -> str:
    """Three figures, large ones short: 12.3, 1.2e4."""
    return _number(value, ".3g") if value is None or value < 1000 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _percent(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:.{decimals}%}"
