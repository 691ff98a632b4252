"""Prints a Markdown table per measurement: what each drafter accepts, and where its time goes.

Usage: python drafter_tables.py RESULTS ...    each a results.json of bench or sweep-exits --output, or its folder

Of a sweep only the fastest setting of each drafter is shown. Acceptance at position j: of the drafts at j that were compared,
because all before them in their round were accepted.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POSITIONS = (1, 2, 3, 4, 6, 8)
PHASES = ("prefill", "draft", "verify", "other")
Result = dict[str, Any]


def name_of(result: Result) -> str:
    """`int8, exit 30, 4 drafts`; what adaptive decoding chose is a column of its own."""
    confidence, exit_layer, drafts = (result.get(key) for key in ("exit_confidence", "exit_layer", "num_draft_tokens"))
    name = {"self-speculative": result.get("draft_weights") or "own layers"}.get(result["strategy"], result["strategy"])
    if confidence:
        return f"{name}, confidence {confidence:g}, {result['mean_layers']:.1f} layers"
    return name + (f", exit {exit_layer}" if exit_layer else "") + (f", {drafts} drafts" if drafts else "")


def fastest_of_each(results: Sequence[Result]) -> list[Result]:
    """By drafter, in the order of the results."""
    best: dict[tuple[str, str | None, bool], Result] = {}
    for result in results:
        key = (result["strategy"], result.get("draft_weights"), bool(result.get("exit_confidence")))
        if result["tokens_per_second"] and (key not in best or result["speedup"] > best[key]["speedup"]):
            best[key] = result
    return list(best.values())


def cells(result: Result, quality: str) -> list[str]:
    accepted, shares, split = (result[key] for key in ("mean_accepted_tokens", "acceptance_by_position", "time_split_ms"))
    steps = result.get("steps_by_drafter", {})
    total = sum(steps.values())
    by_share = sorted(steps.items(), key=lambda item: (item[0] == "plain", -item[1]))
    return [
        name_of(result),
        f"{accepted + 1:.2f}" if accepted is not None else "",
        *(f"{shares[place - 1]:.0%}" if shares and place <= len(shares) else "" for place in POSITIONS),
        *(f"{split[phase]:.2f}" if phase in split else "" for phase in PHASES),
        f"{result['tokens_per_second']:.0f}" if result["tokens_per_second"] else "",
        f"{result['speedup']:.2f}x" if result["speedup"] else "",
        f"{result['identical_outputs']:.1%}",
        f"{result['metrics'].get(quality, 0.0):.4g}",
        ", ".join(f"{name} {count / total:.0%}" for name, count in by_share) if len(steps) > 1 else "",
    ]


def main(arguments: Sequence[str]) -> None:
    for argument in arguments:
        path = Path(argument)
        record = json.loads((path / "results.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        config, machine, results = record["config"], record["environment"], record["results"]
        task, threads, quality = config["task"], machine["threads"], str(config.get("quality_metric"))
        count = f"{task['samples']} rows, {threads} thread{'' if threads == 1 else 's'}"
        print(f"### {Path(config['model']).name} on {task['task']}: {machine['dtype']}, {count}\n")
        head = ["drafter", "tokens per round", *(f"accepted at {place}" for place in POSITIONS)]
        head += [*(f"{phase}, ms/token" for phase in PHASES), "tokens/s", "speedup", "identical", quality, "steps drafted by"]
        shown = fastest_of_each(results) if "specs" in config else results
        for line in [head, ["---"] * len(head), *(cells(result, quality) for result in shown)]:
            print(f"| {' | '.join(line)} |")
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
