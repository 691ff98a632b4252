"""The tables of RESULTS.md, from the measurements of smollm2.sh. Missing measurements are left out.

Usage: python tables.py RESULTS           RESULTS holds {recipe,control,untouched}-TASK[-WHAT]/results.json
       python tables.py best RESULTS/NAME  the exit and draft length of a sweep's best setting
"""

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

MODELS = ("recipe", "control", "untouched")
TASKS = {"topv2": "TOPv2", "scitldr": "SciTLDR", "mbpp": "MBPP", "humaneval": "HumanEval", "xsum": "XSUM"}
METRICS = {"exact_match": "exact match", "rouge2": "ROUGE-2", "pass@1": "pass@1"}
SPLIT = ("prefill", "draft", "verify", "other")
Result = dict[str, Any]  # an entry of `results`
Record = dict[str, Any]  # a results.json
Records = dict[str, Record]  # by the name of their folder
Setting = tuple[int | None, int | None]  # exit and draft length


def read(folder: Path) -> Records:
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/results.json"))}


def entry(record: Record | None, strategy: str, setting: Setting | None = None, weights: str | None = None) -> Result | None:
    """The measured result of a strategy with the setting, or its first. None if there is none, or only a prediction.

    `weights`: those of the low-bit copy that drafts; records that were made when there was one copy name it in their config.
    """
    for result in record["results"] if record else ():
        found = setting is None or (setting_of(result) == setting and result.get("draft_weights") == weights)
        if found and result["strategy"] == strategy and result["metrics"]:
            return dict(result)
    return None


def setting_of(result: Result) -> Setting:
    return result["exit_layer"], result["num_draft_tokens"]


def best(record: Record | None) -> Result | None:
    """The recommended self-speculative result. Without a recommendation, and in a bench, the fastest one."""
    advice = (record or {}).get("recommendation") or {}
    if advice.get("exit_layer") is not None:
        exact = advice.get("policies", {}).get("exact", {})
        return entry(record, "self-speculative", setting_of(advice), exact.get("draft_weights"))
    drafting = [result for result in record["results"] if result["strategy"] == "self-speculative"] if record else []
    return max(
        (result for result in drafting if result["tokens_per_second"]),
        key=lambda result: float(result["speedup"]),
        default=None,
    )


def machine(records: Records) -> None:
    """The machine, and the load before the runs: a high load means that other processes disturbed the speeds."""
    places = [record["environment"] for record in records.values()]
    if places:
        threads = places[0]["threads"]
        where = f"{places[0]['cpu']}, {threads} thread{'' if threads == 1 else 's'}, torch {places[0]['versions']['torch']}"
        loads = [place["load_average"][0] for place in places if place["load_average"]]
        load = f"; load average before a run: median {median(loads):.1f}, at most {max(loads):.1f}" if loads else ""
        print(f"{where}{load}.\n")


def headline(records: Records) -> None:
    """Speed from the bench; quality, acceptance and outputs from the batched answers, if these have the setting."""
    rows = []
    for task, title in TASKS.items():
        many, grid = records.get(f"recipe-{task}"), records.get(f"recipe-{task}-grid")
        timed = records.get(f"recipe-{task}-bench") or grid or many
        fastest = best(timed)
        for strategy, fast in (("autoregressive", entry(timed, "autoregressive")), ("self-speculative", fastest)):
            setting = None if fast is None else setting_of(fast)
            source = next((record for record in (many, timed) if entry(record, strategy, setting)), None)
            result = entry(source, strategy, setting)
            if source is None or result is None:
                continue
            fast = fast or result
            name = strategy if setting is None or setting[0] is None else f"{strategy}, exit {setting[0]}, {setting[1]} drafts"
            over = number(fast.get("speedup_over_transformers"), ".2f", "x")
            rows.append([
                title, name, quality(source, result, named=True), rows_of(source), percent(result["acceptance_rate"]),
                outputs(source, result), number(fast["tokens_per_second"], ".0f"), number(fast["speedup"], ".2f", "x"), over,
                prompts_timed(timed),
            ])  # fmt: skip
    head = ["task", "strategy", "quality", "rows", "acceptance", "identical outputs"]
    head += ["tokens/s", "speedup", "over transformers", "prompts timed"]
    table("The recipe, bf16", head, rows)


def alternatives(records: Records) -> None:
    for task, title in TASKS.items():
        record = records.get(f"recipe-{task}-bench")
        rows = [
            [
                result["strategy"], text(result["exit_layer"]), text(result["num_draft_tokens"]),
                percent(result["acceptance_rate"]),
                number(result["tokens_per_second"], ".1f"), number(result["speedup"], ".2f", "x"),
                number(result["decode_speedup"], ".2f", "x"), number(result["speedup_over_transformers"], ".2f", "x"),
                outputs(record, result),
            ]
            for result in (record["results"] if record else ())
        ]  # fmt: skip
        head = ["method", "exit", "drafts", "acceptance", "tokens/s", "speedup", "decode speedup", "over transformers"]
        head += ["identical outputs"]
        table(f"{title}: the alternatives on the same {rows_of(record)} prompts", head, rows)


def by_exit(records: Records) -> None:
    """Quality of each exit alone, acceptance and speedup of its drafts, and its agreement with full depth."""
    rows = []
    for task, title in TASKS.items():
        names = {model: (f"{model}-{task}", f"{model}-{task}-grid") for model in MODELS}
        sources = {model: [records[name] for name in names[model] if name in records] for model in MODELS}
        known = [result for both in sources.values() for record in both for result in record["results"]]
        exits = sorted({result["exit_layer"] for result in known if result["exit_layer"]})
        for exit_layer in [*exits, None]:
            cells = [[exit_figures(sources[model], exit_layer)[place] for model in MODELS] for place in range(3)]
            flat = [cell for of_figure in cells for cell in of_figure]
            if any(flat):
                rows.append([title, text(exit_layer) or "all", *flat])
    heads = [f"{figure}, {model}" for figure in ("quality", "acceptance and speedup", "agreement") for model in MODELS]
    table("By exit: the recipe, the control and the untouched model", ["task", "exit", *heads], rows)


def exit_figures(records: Sequence[Record], exit_layer: int | None) -> tuple[str, str, str]:
    """Quality (from the first record, which has the most rows), acceptance and speedup with the draft length, agreement.

    For exits that a quick sweep did not measure, the predicted acceptance.
    """
    at_exit = [(record, result) for record in records for result in record["results"] if result["exit_layer"] == exit_layer]
    alone = [(record, result) for record, result in at_exit if result["strategy"] in ("early-exit", "autoregressive")]
    good = next((quality(record, result) for record, result in alone if record is records[0] and result["metrics"]), "")
    agreed = next((percent(result["agreement"]) for _, result in alone if result.get("agreement") is not None), "")
    drafting = [result for _, result in at_exit if is_own(result)]
    if not drafting:
        return good, "", agreed
    result = max(drafting, key=lambda result: result["tokens_per_second"] is not None)
    share = result["acceptance_rate"] if result["metrics"] else result["predicted_acceptance_rate"]
    return (
        good,
        f"{percent(share)} of {result['num_draft_tokens']}, {number(result['speedup'], '.2f', 'x') or 'not timed'}",
        agreed,
    )


def grids(records: Records) -> None:
    for task, title in TASKS.items():
        record = records.get(f"recipe-{task}-grid")
        results = sweep_results(record)
        lengths = sorted({result["num_draft_tokens"] for result in results})
        by_setting = {setting_of(result): result for result in results}
        rows = [
            [
                text(exit_layer),
                number((entry(record, "early-exit", (exit_layer, None)) or {}).get("speedup"), ".2f", "x"),
                *(grid_cell(by_setting.get((exit_layer, drafts))) for drafts in lengths),
            ]
            for exit_layer in sorted({result["exit_layer"] for result in results})
        ]
        table(f"{title}: speedup (acceptance) by exit and draft length", ["exit", "alone", *map(str, lengths)], rows)


def grid_cell(result: Result | None) -> str:
    return f"{result['speedup']:.2f}x ({percent(result['acceptance_rate'])})" if result else ""


def positions(records: Records) -> None:
    """The share of drafts accepted at each position, if all before them were; for the longest drafts of each exit."""
    for task, title in TASKS.items():
        results = sweep_results(records.get(f"recipe-{task}-grid"))
        longest = {
            result["exit_layer"]: result for result in sorted(results, key=lambda result: int(result["num_draft_tokens"]))
        }
        rows = [[text(layer), *map(percent, longest[layer]["acceptance_by_position"])] for layer in sorted(longest)]
        count = max(map(len, rows), default=1)
        rows = [row + [""] * (count - len(row)) for row in rows]
        table(f"{title}: acceptance by draft position", ["exit", *map(str, range(1, count))], rows)


def sweep_results(record: Record | None) -> list[Result]:
    """The measured self-speculative results, without those of low-bit copies beside the model's own layers."""
    every = record["results"] if record else ()
    return [result for result in every if is_own(result) and result["tokens_per_second"]]


def is_own(result: Result) -> bool:
    return result["strategy"] == "self-speculative" and not result.get("draft_weights")


def weights(records: Records) -> None:
    """The bf16 grid and all runs with other weights, each at its best setting, on the same prompts.

    Runs at different times are compared through the median speed of autoregressive bf16 decoding in these runs.
    """
    rows = []
    for model, (task, title) in product(MODELS, TASKS.items()):
        names = [name for name in records if name.startswith(f"{model}-{task}-") and is_packed(records[name])]
        first = f"{model}-{task}-grid"
        plains = [entry(records.get(name), "autoregressive") for name in [first, *names] if not is_low(records.get(name))]
        base = median(result["tokens_per_second"] for result in plains if result) if any(plains) else None
        for name in [first, *names] if names else []:
            record, many = records.get(name), records.get(f"{model}-{task}" if name == first else f"{name}-rows")
            plain, fast = entry(record, "autoregressive"), best(record)
            if record is None or plain is None or fast is None:
                continue
            packing, full = record["config"]["packing"], entry(many, "autoregressive")
            target, head = packing["quantize"] or "bf16", packing["draft_vocab"] or "all"
            older = packing["draft_weights"]  # one name or null; now a list, and each result says which of them drafted
            drafts = older if isinstance(older, str) else fast.get("draft_weights")
            over = fast["tokens_per_second"] / base if base else None
            rows.append([
                title, model, target, drafts or target, text(head),
                f"{quality(many, full)} of {rows_of(many)}" if many and full else "", number(plain["tokens_per_second"], ".0f"),
                f"{fast['exit_layer']}, {fast['num_draft_tokens']}", percent(fast["acceptance_rate"]),
                number(fast["tokens_per_second"], ".0f"), number(fast["speedup"], ".2f", "x"), number(over, ".2f", "x"),
                outputs(record, fast),
            ])  # fmt: skip
    head_cells = ["task", "model", "target", "drafts", "draft head", "quality", "autoregressive, tokens/s", "best exit, drafts"]
    head_cells += ["acceptance", "tokens/s", "speedup", "over autoregressive bf16", "identical outputs"]
    table("Low-bit targets and drafts, trimmed draft heads", head_cells, rows)


def is_low(record: Record | None) -> bool:
    """Whether the target's weights are low-bit."""
    return record is not None and record["config"]["packing"]["quantize"] is not None


def is_packed(record: Record) -> bool:
    packing = record["config"]["packing"]
    return any(packing[part] for part in ("quantize", "draft_weights", "draft_vocab"))


def time_split(records: Records) -> None:
    """Milliseconds per token by phase; tokens per round; milliseconds per draft, verification and autoregressive step."""
    rows = []
    for task, title in TASKS.items():
        grid = records.get(f"recipe-{task}-grid")
        record = records.get(f"recipe-{task}-bench") or grid
        fast = best(record)
        for name, result in (("autoregressive", entry(record, "autoregressive")), ("self-speculative", fast)):
            if result is None or not result["time_split_ms"]:
                continue
            passes = (entry(grid, name, setting_of(result)) or {}).get("pass_times_ms") or {}
            parts = [result["time_split_ms"][part] for part in SPLIT]
            accepted = result["mean_accepted_tokens"]
            rows.append([
                title, name, *(number(part, ".2f") for part in [*parts, sum(parts)]), number(accepted and accepted + 1, ".1f"),
                *(number(passes.get(part), ".2f") for part in ("draft", "verify", "other", "plain")),
            ])  # fmt: skip
    head = ["task", "strategy", *(f"{part}, ms/token" for part in (*SPLIT, "total")), "tokens per round"]
    head += ["one draft, ms", "one verification, ms", "rest of a round, ms", "autoregressive step, ms"]
    table("Where the time goes", head, rows)


def perplexity(records: Records) -> None:
    rows = []
    for model in MODELS[::-1]:
        record = records.get(f"{model}-wikitext2")
        result = entry(record, "autoregressive")
        if record is not None and result is not None:
            rows.append([model, number(result["metrics"]["perplexity"], ".2f"), rows_of(record)])
    table("WikiText-2, full depth", ["model", "perplexity", "windows of 512 tokens"], rows)


def quality(record: Record, result: Result, named: bool = False) -> str:
    metric = record["config"]["quality_metric"]
    return percent(result["metrics"].get(metric)) + (f" {METRICS.get(metric, metric)}" if named else "")


def rows_of(record: Record | None) -> str:
    samples = record["config"]["task"]["samples"] if record else ""
    return str(samples or "all") if record else ""


def prompts_timed(record: Record | None) -> str:
    timed = record["config"]["timed"] if record else None
    return rows_of(record) if timed is None else str(timed or "")


def outputs(record: Record | None, result: Result) -> str:
    """The share of outputs equal to the autoregressive ones, and the largest top-2 gap at which others differ."""
    gap = max((place["top2_gap"] for place in result["differences"]), default=None)
    return percent(result["identical_outputs"]) + (f", gaps up to {gap:.2f}" if gap is not None else "")


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def text(value: object) -> str:
    return "" if value is None else str(value)


def table(title: str, head: Iterable[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table, or nothing if there are no rows."""
    if rows:
        lines = [list(head), ["---"] * len(rows[0]), *rows]
        print(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "best":
        result = best(json.loads((Path(arguments[1]) / "results.json").read_text(encoding="utf-8")))
        if result is None:
            sys.exit(f"error: {arguments[1]} has no self-speculative setting that was measured")
        print(*setting_of(result))
        return
    records = read(Path(arguments[0]))
    machine(records)
    for part in (headline, alternatives, by_exit, grids, positions, weights, time_split, perplexity):
        part(records)


if __name__ == "__main__":
    main(sys.argv[1:])
