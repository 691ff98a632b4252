"""Exact match of several models on the same rows, and paired differences between the first and each
of the others.

    python examples/parsing_tables.py ROWS RUN ...

ROWS: JSON lines with the `completion` of each row (`layerskip data`). RUN: the answers to them
(`layerskip generate --jsonl`).
"""

import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from measuring import head, line

Z = 1.96  # of a 95% interval


def texts(path: str, key: str) -> list[str]:
    return [
        json.loads(row)[key].strip() for row in Path(path).read_text(encoding="utf-8").splitlines()
    ]


def main(rows: str, *runs: str) -> None:
    references = texts(rows, "completion")
    right = [
        [text == wanted for text, wanted in zip(texts(run, "text"), references, strict=True)]
        for run in runs
    ]
    head(
        f"{len(references)} rows",
        "exact match",
        f"{Path(runs[0]).stem} minus this run, points (95% interval)",
    )
    for run, hits in zip(runs, right, strict=True):
        differences = [100 * (first - other) for first, other in zip(right[0], hits, strict=True)]
        error = Z * stdev(differences) / sqrt(len(differences))
        cell = f"{mean(differences):+.2f} ({mean(differences) - error:+.2f} to {mean(differences) + error:+.2f})"
        line(Path(run).stem, f"{mean(hits):.2%}", "" if run == runs[0] else cell)


if __name__ == "__main__":
    main(*sys.argv[1:])
