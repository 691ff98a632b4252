"""The tables of SmolLM2-135M under the recipe, from what smollm2.sh measured; what is not there yet is left out.

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


def entry(record: Record | None, strategy: str, setting: Setting | None = None) -> Result | None:
    """The measured result of a strategy, the first unless the setting is given; what a quick sweep only predicted is none."""
    for one in record["results"] if record else ():
        if one["strategy"] == strategy and one["metrics"] and setting in (None, setting_of(one)):
            return dict(one)
    return None


def setting_of(result: Result) -> Setting:
    return result["exit_layer"], result["num_draft_tokens"]


def best(record: Record | None) -> Result | None:
    """The recommended self-speculative result, which kept the outputs; where none pays, or in a bench, the fastest."""
    advice = (record or {}).get("recommendation") or {}
    if advice.get("exit_layer") is not None:
        return entry(record, "self-speculative", setting_of(advice))
    drafting = [one for one in record["results"] if one["strategy"] == "self-speculative"] if record else []
    return max((one for one in drafting if one["tokens_per_second"]), key=lambda one: float(one["speedup"]), default=None)


def machine(records: Records) -> None:
    """Where it was measured. Every run notes the load before it: much of it is another process, which spoils speeds."""
    places = [record["environment"] for record in records.values()]
    if places:
        where = f"{places[0]['cpu']}, {places[0]['threads']} threads, torch {places[0]['versions']['torch']}"
        loads = [place["load_average"][0] for place in places if place["load_average"]]
        load = f"; load average before a run: median {median(loads):.1f}, at most {max(loads):.1f}" if loads else ""
        print(f"{where}{load}.\n")


def headline(records: Records) -> None:
    """Quality, acceptance and outputs are of the rows answered in batches where they hold the setting, speed of the bench."""
    rows = []
    for task, title in TASKS.items():
        many, grid = records.get(f"recipe-{task}"), records.get(f"recipe-{task}-grid")
        timed = records.get(f"recipe-{task}-bench") or grid or many
        fastest = best(timed)
        for way, fast in (("autoregressive", entry(timed, "autoregressive")), ("self-speculative", fastest)):
            setting = None if fast is None else setting_of(fast)
            source = next((one for one in (many, timed) if entry(one, way, setting)), None)
            found = entry(source, way, setting)
            if source is None or found is None:
                continue
            fast = fast or found
            name = way if setting is None or setting[0] is None else f"{way}, exit {setting[0]}, {setting[1]} drafts"
            over = number(fast.get("speedup_over_transformers"), ".2f", "x")
            rows.append([
                title, name, quality(source, found, named=True), rows_of(source), percent(found["acceptance_rate"]),
                outputs(source, found), number(fast["tokens_per_second"], ".0f"), number(fast["speedup"], ".2f", "x"), over,
                prompts_timed(timed),
            ])  # fmt: skip
    head = ["task", "decoding", "quality", "rows", "acceptance", "identical outputs"]
    head += ["tokens/s", "speedup", "over transformers", "prompts timed"]
    table("The recipe, bf16", head, rows)


def alternatives(records: Records) -> None:
    for task, title in TASKS.items():
        record = records.get(f"recipe-{task}-bench")
        rows = [
            [
                one["strategy"], text(one["exit_layer"]), text(one["num_draft_tokens"]), percent(one["acceptance_rate"]),
                number(one["tokens_per_second"], ".1f"), number(one["speedup"], ".2f", "x"),
                number(one["decode_speedup"], ".2f", "x"), number(one["speedup_over_transformers"], ".2f", "x"),
                outputs(record, one),
            ]
            for one in (record["results"] if record else ())
        ]  # fmt: skip
        head = ["way", "exit", "drafts", "acceptance", "tokens/s", "speedup", "behind the prefill", "over transformers"]
        head += ["identical outputs"]
        table(f"{title}: the alternatives on the same {rows_of(record)} prompts", head, rows)


def by_exit(records: Records) -> None:
    """Quality of an exit alone, how its drafts fare, and the share of full depth's tokens that it would have chosen."""
    rows = []
    for task, title in TASKS.items():
        names = {model: (f"{model}-{task}", f"{model}-{task}-grid") for model in MODELS}
        sources = {model: [records[name] for name in names[model] if name in records] for model in MODELS}
        known = [one for both in sources.values() for record in both for one in record["results"]]
        exits = sorted({one["exit_layer"] for one in known if one["exit_layer"]})
        for exit_layer in [*exits, None]:
            cells = [[exit_figures(sources[model], exit_layer)[place] for model in MODELS] for place in range(3)]
            flat = [cell for of_figure in cells for cell in of_figure]
            if any(flat):
                rows.append([title, text(exit_layer) or "all", *flat])
    heads = [f"{figure}, {model}" for figure in ("quality", "acceptance and speedup", "agreement") for model in MODELS]
    table("By exit: the recipe, the control and the untouched model", ["task", "exit", *heads], rows)


def exit_figures(records: Sequence[Record], exit_layer: int | None) -> tuple[str, str, str]:
    """Quality (by the first of the records, which has most rows), acceptance and speedup with the draft length, agreement.

    Of exits that a quick sweep did not measure, the acceptance that it predicted.
    """
    mine = [(record, one) for record in records for one in record["results"] if one["exit_layer"] == exit_layer]
    alone = [(record, one) for record, one in mine if one["strategy"] in ("early-exit", "autoregressive")]
    good = next((quality(record, one) for record, one in alone if record is records[0] and one["metrics"]), "")
    agreed = next((percent(one["agreement"]) for _, one in alone if one.get("agreement") is not None), "")
    drafting = [one for _, one in mine if one["strategy"] == "self-speculative"]
    if not drafting:
        return good, "", agreed
    one = max(drafting, key=lambda one: one["tokens_per_second"] is not None)
    share = one["acceptance_rate"] if one["metrics"] else one["predicted_acceptance_rate"]
    return good, f"{percent(share)} of {one['num_draft_tokens']}, {number(one['speedup'], '.2f', 'x') or 'not timed'}", agreed


def grids(records: Records) -> None:
    for task, title in TASKS.items():
        record = records.get(f"recipe-{task}-grid")
        results = sweep_results(record)
        lengths = sorted({one["num_draft_tokens"] for one in results})
        found = {setting_of(one): one for one in results}
        rows = [
            [
                text(exit_layer),
                number((entry(record, "early-exit", (exit_layer, None)) or {}).get("speedup"), ".2f", "x"),
                *(grid_cell(found.get((exit_layer, drafts))) for drafts in lengths),
            ]
            for exit_layer in sorted({one["exit_layer"] for one in results})
        ]
        table(f"{title}: speedup (acceptance) by exit and draft length", ["exit", "alone", *map(str, lengths)], rows)


def grid_cell(result: Result | None) -> str:
    return f"{result['speedup']:.2f}x ({percent(result['acceptance_rate'])})" if result else ""


def positions(records: Records) -> None:
    """Of the drafts compared at each position, all before them being accepted; of each exit's longest drafts."""
    for task, title in TASKS.items():
        results = sweep_results(records.get(f"recipe-{task}-grid"))
        longest = {one["exit_layer"]: one for one in sorted(results, key=lambda one: int(one["num_draft_tokens"]))}
        rows = [[text(layer), *map(percent, longest[layer]["acceptance_by_position"])] for layer in sorted(longest)]
        count = max(map(len, rows), default=1)
        rows = [row + [""] * (count - len(row)) for row in rows]
        table(f"{title}: acceptance by draft position", ["exit", *map(str, range(1, count))], rows)


def sweep_results(record: Record | None) -> list[Result]:
    """The self-speculative ones that were measured."""
    every = record["results"] if record else ()
    return [one for one in every if one["strategy"] == "self-speculative" and one["tokens_per_second"]]


def weights(records: Records) -> None:
    """The grid in bf16 and everything measured with other weights, at its own best setting, on the same prompts.

    Runs at different times are compared by the median speed of plain bf16 decoding in all of them that have it.
    """
    rows = []
    for model, (task, title) in product(MODELS, TASKS.items()):
        names = [name for name in records if name.startswith(f"{model}-{task}-") and is_packed(records[name])]
        first = f"{model}-{task}-grid"
        plains = [entry(records.get(name), "autoregressive") for name in [first, *names] if not is_low(records.get(name))]
        base = median(one["tokens_per_second"] for one in plains if one) if any(plains) else None
        for name in [first, *names] if names else []:
            record, many = records.get(name), records.get(f"{model}-{task}" if name == first else f"{name}-rows")
            plain, fast = entry(record, "autoregressive"), best(record)
            if record is None or plain is None or fast is None:
                continue
            packing, full = record["config"]["packing"], entry(many, "autoregressive")
            target, head = packing["quantize"] or "bf16", packing["draft_vocab"] or "all"
            over = fast["tokens_per_second"] / base if base else None
            rows.append([
                title, model, target, packing["draft_weights"] or target, text(head),
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
    """Milliseconds a token; and those of one draft, one verification and one plain step, with the tokens that a round gives."""
    rows = []
    for task, title in TASKS.items():
        grid = records.get(f"recipe-{task}-grid")
        record = records.get(f"recipe-{task}-bench") or grid
        fast = best(record)
        for name, one in (("autoregressive", entry(record, "autoregressive")), ("self-speculative", fast)):
            if one is None or not one["time_split_ms"]:
                continue
            passes = (entry(grid, name, setting_of(one)) or {}).get("pass_times_ms") or {}
            parts = [one["time_split_ms"][part] for part in SPLIT]
            accepted = one["mean_accepted_tokens"]
            rows.append([
                title, name, *(number(part, ".2f") for part in [*parts, sum(parts)]), number(accepted and accepted + 1, ".1f"),
                *(number(passes.get(part), ".2f") for part in ("draft", "verify", "other", "plain")),
            ])  # fmt: skip
    head = ["task", "decoding", *(f"{part}, ms a token" for part in (*SPLIT, "all")), "tokens a round"]
    head += ["a draft, ms", "a verification, ms", "rest of a round, ms", "a plain step, ms"]
    table("Where the time goes", head, rows)


def perplexity(records: Records) -> None:
    rows = []
    for model in MODELS[::-1]:
        record = records.get(f"{model}-wikitext2")
        found = entry(record, "autoregressive")
        if record is not None and found is not None:
            rows.append([model, number(found["metrics"]["perplexity"], ".2f"), rows_of(record)])
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
    """The share of outputs that are those of autoregressive decoding; in bf16 others part where two tokens are as likely."""
    gap = max((place["top2_gap"] for place in result["differences"]), default=None)
    return percent(result["identical_outputs"]) + (f", gaps up to {gap:.2f}" if gap is not None else "")


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def text(value: object) -> str:
    return "" if value is None else str(value)


def table(title: str, head: Iterable[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown on stdout; nothing without rows."""
    if rows:
        lines = [list(head), ["---"] * len(rows[0]), *rows]
        print(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "best":
        found = best(json.loads((Path(arguments[1]) / "results.json").read_text(encoding="utf-8")))
        if found is None:
            sys.exit(f"error: {arguments[1]} has no self-speculative setting that was measured")
        print(*setting_of(found))
        return
    records = read(Path(arguments[0]))
    machine(records)
    for part in (headline, alternatives, by_exit, grids, positions, weights, time_split, perplexity):
        part(records)


if __name__ == "__main__":
    main(sys.argv[1:])
