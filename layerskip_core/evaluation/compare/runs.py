"""What a run measured: the results.json of a sweep or a benchmark, and the held-out losses of a training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint.info import INFO_FILE, read_info
from ...errors import LayerSkipError
from ...files import SchemaError, build, parse_json, read_bytes
from ..report.tables import label
from ..results import Result, RunRecord, read_record

RESULTS, LOSSES = "results.json", "losses.jsonl"
HELD_OUT = "held_out_perplexity"
_LARGEST_LOSS = 700.0  # nats; the perplexity of a larger one is no float
_OF_DECODING = ("acceptance_rate", "mean_accepted_tokens", "speedup", "tokens_per_second", "identical_outputs")


class Setting(NamedTuple):
    """How the figures were decoded: the name that reports give it, and what plots need of it."""

    name: str
    exit_layer: int | None = None
    drafts: str = ""  # `6 drafts`, `6 int8 drafts`; empty where nothing drafts


@dataclass(frozen=True)
class Run:
    """The figures of one run by name and setting, and the held-out losses of its training.

    `held_out`: step -> exit layer -> nats per token. `rows` say what the figures were measured on, the metrics' under
    `results.json` and the losses' under `losses.jsonl`; figures on different rows cannot be paired.
    """

    path: str
    figures: dict[str, dict[Setting, float]]
    held_out: dict[int, dict[int, float]] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)


def read_run(path: str) -> Run:
    """A results.json, a losses.jsonl, or a folder with one or both. Raises LayerSkipError for anything else."""
    place = Path(path)
    files = [place / name for name in (RESULTS, LOSSES) if (place / name).is_file()] if place.is_dir() else [place]
    if not files:
        raise LayerSkipError(f"RUNS {path} must be a folder with {RESULTS} (of sweep-exits or bench --output) or {LOSSES}")
    run = Run(path, {})
    for file in files:
        if file.suffix == ".jsonl":
            _add_losses(run, file)
        else:
            _add_results(run, file)
    if not run.figures:
        raise LayerSkipError(f"RUNS {path} has no held-out losses: `finetune` measures them with `validation`")
    return run


def run_of(name: str, record: RunRecord) -> Run:
    """What a sweep has just measured."""
    run = Run(name, {})
    _add_record(run, record)
    return run


def _add_results(run: Run, file: Path) -> None:
    _add_record(run, read_record(str(file), named="RUNS"))


def _add_record(run: Run, record: RunRecord) -> None:
    for result in record.results:
        setting = _setting_of(result)
        for name, value in _figures_of(result):
            run.figures.setdefault(name, {}).setdefault(setting, value)
    run.rows[RESULTS] = record.config["task"]


def _setting_of(result: Result) -> Setting:
    drafts = ""
    if result.strategy == "self-speculative":
        drafts = f"{result.num_draft_tokens} {result.draft_weights or ''} drafts".replace("  ", " ")
    fixed = result.strategy in ("early-exit", "self-speculative") and result.exit_confidence is None
    return Setting(label(result), result.exit_layer if fixed else None, drafts)


def _figures_of(result: Result) -> Iterator[tuple[str, float]]:
    """Quality is left out where something drafts: drafts leave the output as it is, so it is that of plain decoding."""
    drafts = result.acceptance_rate is not None
    quality = {} if drafts else dict(result.metrics)
    if not drafts:
        measured = {"perplexity": result.perplexity, "agreement": result.agreement}
        quality |= {name: value for name, value in measured.items() if value is not None}
    yield from quality.items()
    for name in _OF_DECODING:
        value = getattr(result, name)
        if value is not None:
            yield name, value


def _add_losses(run: Run, file: Path) -> None:
    """The losses that `finetune` writes, a line per step; those of the last validation are figures too."""
    agreement: dict[int, float] = {}
    for number, line in enumerate(read_bytes(file, f"RUNS {file}", LayerSkipError).splitlines(), start=1):
        where = f"RUNS {file}:{number}"
        try:
            step = build(dict[str, Any], parse_json(line, where, LayerSkipError), "the line")
            losses = _by_exit(step, "validation", _LARGEST_LOSS)
            if losses:
                run.held_out[build(int, step.get("step"), "step")] = losses
                agreement = _by_exit(step, "agreement", 1.0)
        except SchemaError as error:
            raise LayerSkipError(f"{where} must be a line that finetune wrote: {error}") from None
    if not run.held_out:
        return
    last = run.held_out[max(run.held_out)]
    run.figures[HELD_OUT] = {_alone(layer): math.exp(loss) for layer, loss in last.items()}
    if agreement:
        run.figures["agreement"] = {_alone(layer): share for layer, share in agreement.items()}
    if (file.parent / INFO_FILE).is_file():
        details = read_info(file.parent).details
        config = details.get("config")
        if "validation_rows" in details:
            run.rows[LOSSES] = details["validation_rows"]
        elif isinstance(config, dict):  # of an older version
            run.rows[LOSSES] = [config.get("validation"), config.get("validation_samples"), config.get("data")]


def _alone(exit_layer: int) -> Setting:
    return Setting(f"exit {exit_layer} alone", exit_layer)


def _by_exit(step: dict[str, Any], name: str, largest: float) -> dict[int, float]:
    """Exit layer -> number in 0..largest."""
    found = build(dict[str, float], step.get(name, {}), name)
    for layer, value in found.items():
        if not (layer.isascii() and layer.isdigit()):
            raise SchemaError(f"{name}: needed an exit layer, found {layer!r:.60}")
        if not 0 <= value <= largest:
            raise SchemaError(f"{name}.{layer}: needed a number in 0..{largest:g}, found {value:g}")
    return {int(layer): value for layer, value in found.items()}
