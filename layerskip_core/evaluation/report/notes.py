"""The sentences below a table: how it was measured, what its columns mean, and what was found."""

import math
from collections.abc import Iterator

import torch

from ...config.evaluation import with_transformers
from ...config.options import counts_text
from ...config.resolution import EXACT, FAST, policy_text
from ...errors import plural
from ..results import NEAR_TIE, Bounds, Result, RunRecord, bandwidth_text, result_name

PARETO_NOTE = "* on the Pareto frontier of quality and speed; pred: predicted speedup."
_DISTURBING = 0.2  # cores that other processes keep busy during a measurement


def notes_of(
    record: RunRecord, legend: str, has_few_rows: bool, change_of: str
) -> tuple[str, tuple[str, ...]]:
    """The note of a table, and the findings below it. `change_of`: the metric whose change is
    shown, if any.
    """
    results = record.results
    lines = []
    if any(result.pareto for result in results):
        lines.append(PARETO_NOTE)
    if any(result.exit_confidence is not None for result in results):
        lines.append(
            "exits at P: each token leaves at the first exit with a probability above P; "
            "exit: its layers, on average."
        )
    if any(result.intervals for result in results):
        repeats = " and repeats" if record.config.get("repeats", 1) > 1 else ""
        lines.append(f"±: half-width of the 95% interval over prompts{repeats}.")
    if has_few_rows:
        lines.append("±?: too few rows for an interval.")
    if change_of:
        lines.append(f"change: of {change_of} from full depth, on the same prompts.")
    if legend:
        lines.append(f"{legend}.")
    lines += _measurement_notes(record)
    return "\n".join(lines), tuple(findings(record))


def findings(record: RunRecord) -> Iterator[str]:
    """The findings, the recommendation or the verdict last."""
    skipped = dict.fromkeys(counts_text(result.skip) for result in record.results if result.skip)
    for skip in skipped:
        yield f"Layers that drafts skip: --skip {skip}."
    if record.is_bench:
        for result in record.results:
            if result.strategy == "adaptive" and len(result.steps_by_drafter) > 1:
                yield f"Steps of adaptive decoding: {_shares(result.steps_by_drafter)}."
        yield from verdict_lines(record)
    advice = record.recommendation
    if advice is not None:
        yield f"Policy {FAST}: {advice.fast_reason}."
        yield f"Policy {EXACT}: {policy_text(advice.policies[EXACT])}."
        yield f"{'Recommended' if advice.pays else 'Not recommended'}: {advice.reason}."


def _shares(steps: dict[str, int]) -> str:
    """`int8 75%, lookup 20%, plain 5%`: the most frequent drafter first, steps without drafts
    last.
    """
    total = sum(steps.values())
    ordered = sorted(steps, key=lambda name: (name == "plain", -steps[name]))
    return ", ".join(f"{name} {steps[name] / total:.0%}" for name in ordered)


def verdict_lines(record: RunRecord) -> Iterator[str]:
    """The fastest strategy of a benchmark with the outputs of autoregressive decoding, up to
    near-ties; none if nothing was timed.
    """
    plain, *others = record.results
    is_sampled = bool(record.config.get("generation", {}).get("temperature"))
    same_outputs = "the same outputs"
    near_tie = NEAR_TIE[getattr(torch, record.environment["dtype"])]
    if is_sampled:
        # Samples may differ: drafting keeps their distribution
        same_outputs = "outputs of the same distribution"
        near_tie = math.inf
    usable = []
    for result in others:
        if result.strategy != "early-exit" and result.keeps_outputs(plain, near_tie):
            usable.append(result)
    if others and not usable:
        yield f"No other strategy had {same_outputs} as autoregressive decoding."
    timed = [result for result in usable if result.speedup is not None]
    if not timed:
        return
    best = max(timed, key=lambda result: result.speedup or 0.0)
    bounds = best.intervals.get("speedup")
    summary = f"{result_name(best)}, {best.speedup:.2f}x autoregressive"
    summary += _interval_text(best, bounds)
    if best.differences and not is_sampled:
        summary += f"; {plural(len(best.differences), 'output')} differed at a near-tie"
    if bounds is not None and bounds.low > 1:
        yield f"Fastest with {same_outputs}: {summary}."
    else:
        yield f"Nothing was certainly faster with {same_outputs}; best: {summary}."


def _interval_text(best: Result, bounds: Bounds | None) -> str:
    if bounds is None:
        return ""
    if bounds.high - bounds.low >= 2 * (best.speedup or 0.0):
        return " (too few rows for an interval)"
    rows = best.rows_to_halve
    halved = ""
    if rows:
        halved = f"; about {plural(rows, 'row')} would halve it"
    elif rows == 0:
        halved = "; more repeats would halve it"
    return f" (95% interval {bounds.low:.2f} to {bounds.high:.2f}{halved})"


def _measurement_notes(record: RunRecord) -> Iterator[str]:
    """Notes on measurement, prompts and decoding that differ from the defaults, and on exits with a
    block.
    """
    config = record.config
    machine = record.environment
    generation = config.get("generation", {})
    if record.is_bench:
        threads = plural(machine["threads"], "thread")
        yield f"{_method(record)}; {machine['dtype']} on {machine['device_name']}, {threads}."
    busy = machine.get("busy_cores", 0.0)
    if busy >= _DISTURBING:
        yield (
            f"Other processes kept {busy:.1f} cores busy: speeds are lower than on a quiet "
            "machine, and intervals wider."
        )
    if machine.get("bandwidth"):
        yield f"P{bandwidth_text(machine['bandwidth'])[1:]}."
    if "prompt_template" in config:
        yield f"Prompt template: {config['prompt_template']}."
    temperature = generation.get("temperature")
    if temperature:
        top = f"top-k {generation.get('top_k', 0)}, top-p {generation.get('top_p', 1):g}"
        yield f"Sampled at temperature {temperature:g}, {top}."
    cuts_drafts = generation.get("lookup")
    if "specs" in config and (cuts_drafts or temperature):
        yield "Predictions are for greedy decoding with whole drafts."
    if "llama_cpp" in machine:
        yield f"llama.cpp: {machine['llama_cpp']}, on {config.get('gguf')}."
    on_gpu = str(machine.get("device")).startswith("cuda")
    if with_transformers(config.get("baselines", ())) and config.get("timed") != 0 and not on_gpu:
        yield "MB: of the whole process, which also holds transformers' copy of the model."
    if machine.get("exit_blocks"):
        yield f"Exits with a block: {', '.join(map(str, machine['exit_blocks']))}."


def _method(record: RunRecord) -> str:
    """How a benchmark measured."""
    config = record.config
    medians = f"medians of {plural(config['repeats'], 'repeat')}"
    batch_size = config.get("batch_size", 1)
    if batch_size == 1:
        return medians.capitalize()
    speed = "not measured"
    if config.get("timed"):
        speed = f"{plural(config['timed'], 'prompt')} at batch size 1, {medians}"
    return f"Quality: answers in batches of {batch_size}; speed: {speed}"
