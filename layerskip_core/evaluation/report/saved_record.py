"""Reads a results.json back, and checks every part of it against what sweeps and benchmarks write."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...config.decoding import DraftProfile, strategies
from ...config.evaluation import BASELINES, BenchConfig, SweepConfig
from ...config.ranges import MAX_COUNT
from ...errors import LayerSkipError
from ...files import SchemaError, build, parse_json, read_bytes, require_fields
from ..record import Environment, PredictionError, Recommendation, RunRecord
from ..results import ExitResult

_LARGEST = 1e12  # of any figure but a perplexity: plots and tables cannot show more
_REQUIRED = {"config": ("model", "task"), "environment": ("dtype", "device_name", "threads")}  # by every rendering


def read_record(file: str, result: type[Any], named: str = "`saved`") -> RunRecord[Any]:
    """Reads a results.json of ExitResults or BenchResults that can be rendered. Raises LayerSkipError for anything else.

    `named`: what gave the file, for errors.
    """
    kind, config = ("sweep-exits", SweepConfig) if result is ExitResult else ("bench", BenchConfig)
    document = parse_json(read_bytes(Path(file), f"{named} {file}", LayerSkipError), f"{named} {file}", LayerSkipError)
    try:
        record = _record(document, result, config)
        for index, figures in enumerate(record.results):
            _require_valid(figures, f"results[{index}]")
            for name, part in getattr(figures, "categories", {}).items():
                _require_figures(part, f"results[{index}].categories.{name:.60}")
    except SchemaError as error:
        raise LayerSkipError(f"{named} {file} must be a results.json that {kind} wrote: {error}") from None
    return record


def _record(document: Any, result: type[Any], config: type[Any]) -> RunRecord[Any]:
    document = build(dict[str, Any], document, "the document")
    for part, names in _REQUIRED.items():
        values = build(dict[str, Any], document.get(part), part)
        for name in (*names, *(["repeats"] if part == "config" and config is BenchConfig else [])):
            if name not in values:
                raise SchemaError(f"{part}.{name} is missing")
    document["config"] = _current(document["config"])
    require_fields(config, document["config"], "config")
    build(str | None, document["config"].get("quality_metric"), "config.quality_metric")
    build(Environment, document["environment"], "environment")
    results = build(tuple[result, ...], document.get("results"), "results")  # type: ignore[valid-type]
    if not results:
        raise SchemaError("results: needed at least one, found none")
    return RunRecord(
        document["config"],
        document["environment"],
        results,
        build(Recommendation | None, document.get("recommendation"), "recommendation"),
        build(PredictionError | None, document.get("prediction_error"), "prediction_error"),
        build(DraftProfile | None, document.get("profile"), "profile"),
    )


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the low-bit copies as a list: they were one name or null in older records."""
    packing = config.get("packing")
    if not isinstance(packing, dict) or not isinstance(packing.get("draft_weights", []), str | None):
        return config
    return config | {"packing": packing | {"draft_weights": [packing["draft_weights"]] if packing["draft_weights"] else []}}


def _require_valid(result: Any, where: str) -> None:
    """Raises SchemaError for figures that no run gives: unknown strategies, layers below 1, numbers out of range."""
    known = (*strategies(), *BASELINES)
    if result.strategy not in known:
        raise SchemaError(f"{where}.strategy: needed one of {', '.join(known)}, found {result.strategy!r:.60}")
    drafting = result.strategy == "self-speculative"
    exits = drafting or (result.strategy == "early-exit" and result.exit_confidence is None)
    for name, needed in (("exit_layer", exits), ("num_draft_tokens", drafting)):
        value = getattr(result, name)
        if value is None and needed:
            raise SchemaError(f"{where}.{name}: needed a whole number for {result.strategy}, found null")
        if value is not None and value < 1:
            raise SchemaError(f"{where}.{name}: needed at least 1, found {value}")
    if any(not 1 <= layer <= MAX_COUNT for layer in result.skip):
        raise SchemaError(f"{where}.skip: needed layers of at least 1, found {list(result.skip)!s:.60}")
    for name, count in result.steps_by_drafter.items():
        if count < 1:
            raise SchemaError(f"{where}.steps_by_drafter.{name:.60}: needed at least 1, found {count}")
    for number, step in enumerate(getattr(result, "longest_answer", ())):
        if step.tokens < 0 or not 0 < step.seconds < _LARGEST:
            raise SchemaError(f"{where}.longest_answer[{number}]: needed a count of tokens and a time, found {step[:2]}")
    _require_figures(result, where)


def _require_figures(result: Any, where: str) -> None:
    """Raises SchemaError for figures and intervals out of range."""
    for name, ends in result.intervals.items():
        if not 0 <= ends.low <= ends.high <= _LARGEST:
            raise SchemaError(f"{where}.intervals.{name:.60}: needed two numbers in order, found {list(ends)!s:.60}")
    for name, figure in _figures(result):
        if abs(figure) > _LARGEST and not name.endswith("perplexity"):
            raise SchemaError(f"{where}.{name}: needed a number up to {_LARGEST:g}, found {figure:g}")
        # The remainder of a time can be below 0 by rounding, and lm-eval has correlations.
        if figure < 0 and not name.startswith("time_split_ms") and not (name.startswith("metrics.") and " " in name):
            raise SchemaError(f"{where}.{name}: needed at least 0, found {figure:g}")


def _figures(result: Any) -> Iterator[tuple[str, float]]:
    """The name and value of every float in a result."""
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, dict):
            yield from ((f"{field.name}.{name}", part) for name, part in value.items() if isinstance(part, float))
        elif isinstance(value, tuple):
            yield from ((field.name, part) for part in value if isinstance(part, float))
        elif isinstance(value, float):
            yield field.name, value
