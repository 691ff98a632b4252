"""What a measurement says: the figures of each way of decoding, the machine, and a sweep's advice.

The advice is made of the Pareto frontier, the cost model's error, the recommended setting, and the policies to store.
"""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import zip_longest
from operator import truediv
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import DRAFTERS, STRATEGIES, DecodingConfig, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...config.resolution import EXACT, FAST, Policy, policy_text
from ...decoding import DecodeStats
from ...errors import plural
from ..metrics import Estimate, Margin, change, estimate, finite, frontier, margin, metric, speed_ratio
from ..results import Bounds, Failure, PredictionError, Recommendation, Result
from . import Measured, drafts_tokens

_WITH_EXIT = ("early-exit", "self-speculative", "no-reuse", "assistant-early-exit")
_WORTHWHILE = 1.05  # smaller speedups of a fixed setting are not recommended
_CLOSE = 1.05  # adaptive drafting is preferred to a fixed setting that is faster by less: it suits other prompts too
_NAMED = 3  # settings that a sentence lists
_NOISY = 0.1  # a baseline that drifts by more makes small differences meaningless
# The settings that are columns of a sweep.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


def setting_of(setting: DecodingConfig) -> Result:
    """A way of decoding without any figure."""
    chooses, own = setting.exit_confidence > 0, setting.strategy in STRATEGIES
    drafts = drafts_tokens(setting) and setting.strategy != "adaptive"
    return Result(
        setting.strategy,
        setting.exit_layer if setting.strategy in _WITH_EXIT and not chooses else None,
        setting.num_draft_tokens if drafts else None,
        draft_weights=setting.draft_weights if own else None,
        exit_confidence=setting.exit_confidence if chooses else None,
        exits=setting.exits if chooses else (),
        skip=setting.skip,
    )


def result_of(measured: Measured, full: Measured, transformers: Measured | None = None, base: Tensor | None = None) -> Result:
    """The figures of one way of decoding, compared with those of full depth, and of transformers if that ran.

    `base`: the times (4, repeats, prompts) that speedups are relative to; None: those of `full`.
    """
    answers, scores, drafts = measured.answers, measured.scores, drafts_tokens(measured.setting)
    result, stats = setting_of(measured.setting), sum((output.stats for output in answers), DecodeStats())
    figures: dict[str, Estimate] = {}
    if measured.repeats:
        times, base = measured.times, full.times if base is None else base
        figures |= {"speedup": speed_ratio(base[:2], times[:2]), "decode_speedup": speed_ratio(base[2:], times[2:])}
        if transformers is not None:
            figures["speedup_over_transformers"] = speed_ratio(transformers.times[:2], times[:2])
        result = replace(result, **_speeds(measured), tokens_per_second=estimate(torch.div, times[[1, 0]]).value)
    known = [output.error is None for output in full.answers]
    same = [there and mine.ids == other.ids for there, mine, other in zip(known, answers, full.answers, strict=True)]
    figures["identical_outputs"] = estimate(torch.div, [same, known], measured.answers_per_prompt)
    for name, count in (("acceptance_rate", "drafted"), ("mean_accepted_tokens", "rounds")) if drafts else ():
        counts = [[getattr(output.stats, part) for output in answers] for part in ("accepted", count)]
        found = estimate(torch.div, counts, measured.answers_per_prompt)
        figures[name] = found._replace(value=getattr(stats, name))  # 0 without drafts
    metrics = {name: metric(each) for name, each in scores.items()}
    changes = {name: change(each, full.scores[name]).bounds for name, each in scores.items() if name in full.scores}
    accepted_at = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
    values: dict[str, Any] = {name: found.value for name, found in figures.items()}
    return replace(
        result,
        **values,
        metrics={name: found.value for name, found in metrics.items() if found.value is not None},
        # A draft is compared if all drafts before it in the round were accepted.
        acceptance_by_position=tuple(map(truediv, accepted_at, stats.tested_by_position)) if drafts else None,
        differences=measured.differences,
        failures=tuple(Failure(sample, each.error) for sample, each in enumerate(answers) if each.error is not None),
        steps_by_drafter=stats.steps_by_drafter,
        mean_layers=stats.mean_layers if result.exit_confidence else None,
        intervals={name: found.bounds for name, found in (figures | metrics).items() if found.bounds is not None},
        changes={name: ends for name, ends in changes.items() if ends is not None},
    )


def _speeds(measured: Measured) -> dict[str, Any]:
    """The figures of steps: medians over the repeats; the phases and the longest answer are the first one's."""
    firsts, per_token = [], []
    for outputs in measured.repeats:
        firsts.append(median([output.steps[0].seconds for output in outputs if output.steps] or [math.nan]))
        # The tokens of a step share its time equally.
        steps = [step for output in outputs for step in output.steps[1:]]
        per_token.append(sorted(step.seconds / step.tokens for step in steps for _ in range(step.tokens)) or [math.nan])
    quantiles = {
        name: finite(1000 * median(times[math.ceil(share * len(times)) - 1] for times in per_token))
        for name, share in (("p50", 0.50), ("p95", 0.95))
    }
    # Per new token: prefill, drafting, verifying (or plain steps) and everything else.
    outputs = measured.repeats[0]
    stats = sum((output.stats for output in outputs), DecodeStats())
    parts = {"prefill": stats.prefill_seconds, "draft": stats.draft_seconds, "verify": stats.verify_seconds}
    parts["other"] = sum(step.seconds for output in outputs for step in output.steps) - sum(parts.values())
    peaks = [each.peak_memory_mb for outputs in measured.repeats for each in outputs if each.peak_memory_mb is not None]
    longest = max(outputs, key=lambda output: len(output.ids)).steps
    return {
        "time_per_token_ms": quantiles,
        "ttft_ms": finite(1000 * median(firsts)),
        "peak_memory_mb": max(peaks, default=None),
        "time_split_ms": {name: 1000 * part / stats.new_tokens for name, part in parts.items()} if stats.new_tokens else {},
        "longest_answer": longest if measured.setting.strategy == "adaptive" else (),
    }


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine, and how the model runs. The load average is the one before the run."""
    device, blocks, cpu = loaded.backend.device, loaded.backend.exit_blocks, platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), cpu)
    return {
        "versions": {
            "layerskip": version("layerskip"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.backend.dtype).removeprefix("torch."),
        "implementation": loaded.backend.implementation + ", CUDA graphs" * loaded.backend.recordable,
        "notes": list(loaded.notes),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **({"exit_blocks": {str(exit_layer): placed.block.feature for exit_layer, placed in blocks.items()}} if blocks else {}),
    }


class Row(NamedTuple):
    """A setting: its figures, what they were computed from (None: only predicted), and its policy."""

    result: Result
    measured: Measured | None
    policy: Policy

    @property
    def speed(self) -> float:
        return self.result.speedup or 0.0

    def lead(self, other: "Row") -> Bounds | None:
        """The interval of its speed over another's, on the same prompts."""
        one, slower = self.measured, other.measured
        return speed_ratio(slower.times[:2], one.times[:2]).bounds if one and slower else None


def recommend(
    results: Sequence[Result],
    near_tie: float,
    drift: float,
    quality_metric: str,
    config: SweepConfig,
    measured: Sequence[Measured | None] = (),
) -> Recommendation:
    """The fastest drafting setting with the autoregressive outputs, up to differences at near-ties, and the policies.

    Adaptive drafting is preferred to a fixed setting that is hardly faster, and not certainly, and to plain decoding unless
    that is faster.

    Args:
        results: the first is full depth.
        drift: by how much the time of full depth changed, see `Recommendation`.
        measured: what was measured of each result, on the same prompts, None of one that was only predicted. If given, it tells
            which settings may be as fast, and which early exits keep their quality.
    """
    rows = [
        Row(result, found, policy_of(result, results[0], quality_metric, config))
        for result, found in zip_longest(results, measured)
    ]
    plain, tried = rows[0], [row for row in rows if row.result.strategy in DRAFTERS and row.result.metrics]
    faithful = [row for row in tried if row.result.keeps_outputs(plain.result, near_tie)]
    fastest = best = max(faithful, key=lambda row: row.speed, default=plain)
    pays = best.speed >= _WORTHWHILE
    adaptive = next((row for row in faithful if row.result.strategy == "adaptive"), plain)
    if adaptive is not plain and adaptive.speed >= max(1.0, best.speed / _CLOSE):
        lead = best.lead(adaptive)
        if lead is None or lead.low <= 1:
            best, pays = adaptive, True
    alike = [row for row in faithful if row is not best and (lead := best.lead(row)) and lead.low <= 1 <= lead.high]
    alike.sort(key=lambda row: -row.speed)
    names = ", ".join(policy_text(row.policy) for row in alike[:_NAMED])
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    changed = len(tried) - len(faithful)
    skipped = sum(1 for result in results if result.predicted_speedup and not result.metrics)
    noise = f"the autoregressive baseline itself varied by {drift:.0%}, so measure again on a quieter machine"
    reason = (
        _verdict(plain.result, best, fastest.speed, len(faithful), pays),
        f"on these prompts it cannot be told from {names}{more}" if pays and alike else "",
        f"{changed} of {len(tried)} settings changed the output and were excluded" if changed else "",
        f"not measured because of a lower predicted speed: {skipped}" if skipped else "",
        noise if drift > _NOISY else "",
    )
    chosen = best if pays else plain
    full = plain.measured.scores.get(quality_metric) if plain.measured else None
    exits = [
        (row.policy, margin(row.measured.scores[quality_metric], full, config.keep, quality_metric))
        for row in rows
        if full and row.measured and row.result.strategy == "early-exit" and quality_metric in row.measured.scores
    ]
    fast, fast_reason = fast_policy(exits, chosen.policy, quality_metric, config.keep)
    return Recommendation(
        chosen.result.exit_layer,
        chosen.result.num_draft_tokens,
        best.result.speedup if faithful else None,
        drift,
        "; ".join(filter(None, reason)),
        fast_reason,
        {EXACT: chosen.policy} | ({} if fast is None else {FAST: fast}),
    )


def _verdict(plain: Result, best: Row, fastest: float, settings: int, pays: bool) -> str:
    """Why the best of the faithful settings is recommended, or none."""
    found, name, ties = best.result, policy_text(best.policy), len(best.result.differences)
    if not settings:
        return "no setting that drafts kept the autoregressive outputs"
    if not pays:
        return f"speculation does not pay on this model and machine: {name}, the best setting, reaches {found.speedup:.2f}x"
    rank = "the fastest" if fastest == found.speedup else f"close to the fastest ({fastest:.2f}x)"
    return (
        f"{name} is {rank} of {settings} settings: {found.speedup:.2f}x the speed of autoregressive decoding "
        f"({found.tokens_per_second:.0f} vs. {plain.tokens_per_second:.0f} tokens/s), "
        f"{found.acceptance_rate or 0.0:.0%} of drafts accepted, {found.identical_outputs or 0.0:.0%} of outputs identical"
        + (f" ({ties} {'differs at a near-tie' if ties == 1 else 'differ at near-ties'})" if ties else "")
    )


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy, with how its drafts were stored; `plain` is the row of full depth."""
    settings = {name: getattr(result, name) for name in _COLUMNS}
    for name in ("draft_confidence", "lookup"):
        if result.strategy in used_by(name):
            settings[name] = config.generation.get(name)
    # Exits that are chosen by confidence are tested with the head of drafts too.
    if result.exit_confidence or result.strategy not in ("autoregressive", "lookup", "early-exit"):
        copies = config.packing.draft_weights if result.strategy == "adaptive" else ()
        settings |= {"draft_copies": copies, "draft_vocab": config.packing.draft_vocab}
        settings["draft_head"] = config.packing.draft_head if copies or result.draft_weights else None
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if value}
    said["measured"] = {
        "task": str(config.task.task),
        "metric": quality_metric,
        "value": result.metrics.get(quality_metric, 0.0),
        "full_depth": plain.metrics.get(quality_metric, 0.0),
        "speedup": result.speedup or 0.0,
    }
    return cast(Policy, said)


def fast_policy(
    exits: Sequence[tuple[Policy, Margin]], exact: Policy, quality_metric: str, keep: float
) -> tuple[Policy | None, str]:
    """The fastest early exit that certainly keeps this share of full depth's quality, and why; None if there is none.

    `exits`: with the margins by which they keep it. Certainly: by the lower end of the margin's interval. An exit must also be
    faster than `exact`.
    """
    full, to_beat = exact["measured"]["full_depth"], exact["measured"]["speedup"]
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    if not exits:
        return None, "none, because no early exit was measured"

    def described(policy: Policy) -> str:
        speed, value = policy["measured"]["speedup"], policy["measured"]["value"]
        return f"{speed:.2f}x the speed of plain decoding, {quality_metric} {value:.3g} ({full:.3g} at full depth)"

    exits = sorted(exits, key=lambda exit: -exit[0]["measured"]["speedup"])
    good = [exit for exit in exits if exit[1].needed is not None]
    if not good:
        best, _ = max(exits, key=lambda exit: exit[1].mean)
        missed = f"no early exit keeps more than {keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        return None, f"none, because {missed}; the best, {policy_text(best)}, has {best['measured']['value']:.3g}"
    faster = [exit for exit in good if exit[0]["measured"]["speedup"] > to_beat]
    if not faster:
        best, _ = good[0]
        not_faster = f"is not faster than the policy exact ({to_beat:.2f}x)"
        return None, f"none, because {policy_text(best)} ({described(best)}) {not_faster}"
    for best, found in faster:
        if found.low >= 0:
            return best, f"{policy_text(best)}: {described(best)}"
    best, found = min(faster, key=lambda exit: exit[1].needed or 0)
    return None, (
        f"none, because {plural(found.prompts, 'prompt')} cannot show that an early exit keeps {keep:.4g} of "
        f"{quality_metric}; for {policy_text(best)} ({described(best)}) it would take about {found.needed} (`samples`)"
    )


def mark_pareto(results: Sequence[Result], quality_metric: str) -> list[Result]:
    """The results, with `pareto` set among measured ones by the quality metric and tokens per second."""
    optimal = frontier(results, quality_metric)
    return [replace(result, pareto=index in optimal) for index, result in enumerate(results)]


def prediction_error(results: Sequence[Result]) -> PredictionError | None:
    """The error over the results that were both predicted and measured; None if there are none."""
    errors = [
        result.predicted_speedup / result.speedup - 1 for result in results if result.predicted_speedup and result.speedup
    ]
    sizes = [abs(error) for error in errors]
    return PredictionError(len(errors), median(sizes), max(sizes), mean(errors)) if errors else None


def baseline_drift(first: Tensor, second: Tensor) -> float:
    """Median over the prompts of the relative change in time per token between two measurements (2, prompts) of a setting."""
    change = (second[0] / second[1]) / (first[0] / first[1]) - 1
    return change[change.isfinite()].abs().quantile(0.5).item()
