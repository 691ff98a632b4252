"""Records as JSON and CSV text."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Protocol

from ...config.ranges import counts_text
from ..results import RunRecord


class Record(Protocol):
    def document(self) -> dict[str, Any]:
        """The record as plain values."""


def to_json(record: Record) -> str:
    return json.dumps(record.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(record: RunRecord) -> str:
    """A row per result, and below it one per category.

    Metrics, times and the ends of intervals have a column each; differences and failures are counted.
    """
    rows = []
    for result in record.document()["results"]:
        categories = result.pop("categories")
        setting = {name: result[name] for name in ("strategy", "exit_layer", "num_draft_tokens", "draft_weights")}
        rows.append(_flat(result))
        rows += [_flat({**figures, **setting, "category": name}) for name, figures in categories.items()]
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)  # rows can lack columns
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "metrics":
            flat |= value
        elif key in flat and value is None:
            continue  # a metric of that name: the answers' perplexity, where none is measured through an exit
        elif key in ("intervals", "changes"):
            part = "_change" if key == "changes" else ""
            flat |= {f"{name}{part}_{end}": ends[end == "high"] for name, ends in value.items() for end in ("low", "high")}
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": part for name, part in value.items()}
        elif key == "skip":
            flat[key] = counts_text(value)
        elif key == "acceptance_by_position":
            flat[key] = " ".join(map(str, value or ()))
        else:
            flat[key] = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return flat
