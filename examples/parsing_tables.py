"""Prints the tables of parsers, from the measurements of topv2.sh or embedded.sh: each sweep, then exact match side by side.

Usage: python parsing_tables.py ROWS RUN ...

ROWS  JSON lines with the reference of each row (`layerskip data`)
RUN   RUN.jsonl holds the autoregressive answers to ROWS (`generate --jsonl`); RUN/results.json, if it exists, holds a sweep.
      The exact match of the first run is compared with that of every other one, row by row.
"""

import json
import sys
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Z = 1.96  # of a 95% interval


def lines(path: Path, key: str) -> list[str]:
    return [json.loads(line)[key].strip() for line in path.read_text(encoding="utf-8").splitlines()]


def answers(run: Path) -> Path:
    return run.with_name(f"{run.name}.jsonl")


def exits_table(results: list[dict[str, Any]]) -> None:
    """By exit: quality alone, and quality, acceptance and speed as a draft; then the accepted drafts by position."""
    by_setting = {(result["strategy"], result["exit_layer"], result["num_draft_tokens"]): result for result in results}
    specs = sorted({spec for strategy, _, spec in by_setting if strategy == "self-speculative"})
    exits = sorted({exit_layer for strategy, exit_layer, _ in by_setting if strategy == "early-exit"})
    heads = [f"{what}, {spec} drafts" for spec in specs for what in ("exact match", "identical", "accepted", "speedup")]
    print("| exit | early exit, exact match | " + " | ".join(heads) + " |")
    print("|---" * (2 + len(heads)) + "|")
    for exit_layer in exits:
        cells = [str(exit_layer), f"{by_setting['early-exit', exit_layer, None]['metrics']['exact_match']:.1%}"]
        for result in (by_setting["self-speculative", exit_layer, spec] for spec in specs):
            shares = (result["metrics"]["exact_match"], result["identical_outputs"], result["acceptance_rate"])
            cells += [*(f"{share:.1%}" for share in shares), f"{result['speedup']:.2f}x"]
        print("| " + " | ".join(cells) + " |")
    plain = by_setting["autoregressive", None, None]
    print(f"\nautoregressive: exact match {plain['metrics']['exact_match']:.2%}, {plain['tokens_per_second']:.0f} tokens/s\n")
    print("| exit | drafts | accepted at each position, if all before it were accepted |\n|---|---|---|")
    for exit_layer, spec in product(exits, specs):
        shares = by_setting["self-speculative", exit_layer, spec]["acceptance_by_position"]
        print(f"| {exit_layer} | {spec} | {', '.join(f'{share:.1%}' for share in shares)} |")


def main() -> None:
    rows, *runs = map(Path, sys.argv[1:])
    for sweep in (run / "results.json" for run in runs):
        if sweep.exists():
            print(f"\n{sweep.parent.name}\n")
            exits_table(json.loads(sweep.read_text(encoding="utf-8"))["results"])
    references = lines(rows, "completion")
    right = [[text == wanted for text, wanted in zip(lines(answers(run), "text"), references, strict=True)] for run in runs]
    print(f"\n| autoregressive, {len(references)} rows | exact match | {runs[0].name} minus this run, points (95% interval) |")
    print("|---|---|---|")
    for run, hits in zip(runs, right, strict=True):
        differences = [100 * (first - other) for first, other in zip(right[0], hits, strict=True)]
        error = Z * stdev(differences) / sqrt(len(differences))
        cell = f"{mean(differences):+.2f} ({mean(differences) - error:+.2f} to {mean(differences) + error:+.2f})"
        print(f"| {run.name} | {mean(hits):.2%} | {cell if run != runs[0] else ''} |")


if __name__ == "__main__":
    main()
