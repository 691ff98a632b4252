"""Figures of measurements, the machine, and the recommendation of a sweep.

Against the winner's curse a sweep times the best few settings once more, in turns with plain and
adaptive decoding, on other prompts, and decides by the lower end of the speedup's interval. So it
does with the fastest early exits that keep the quality.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import DRAFTERS, STRATEGIES, DecodingConfig, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...config.resolution import EXACT, FAST, Policy, policy_text
from ...decoding import DecodeStats
from ...errors import plural
from ..metrics import SHARE, Estimate, Margin, change, estimate, finite, margin, metric, speed_ratio
from ..results import Failure, Recommendation, Result
from . import Measured, Progress, drafts_tokens, in_turn

_WITH_EXIT = ("early-exit", "self-speculative", "no-reuse", "assistant-early-exit")
# Adaptive drafting is preferred to a fixed setting less than 5% faster: it adapts to other prompts
_CLOSE = 1.05
_FINALISTS = 2  # fixed settings, and early exits, that are timed once more
_FEWEST_TURNS = 8
_MOST_TURNS = 256
_NARROW = 0.02  # timing ends when lower ends of speedups are less than 2% below them
# The options of a policy that a Result holds.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


def setting_of(setting: DecodingConfig) -> Result:
    """A Result that names a setting, without figures."""
    chooses = setting.exit_confidence > 0
    own = setting.strategy in STRATEGIES
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


def result_of(measured: Measured, full: Measured, transformers: Measured | None = None) -> Result:
    """The figures of one setting, compared with full depth, and with transformers if that ran."""
    answers = measured.answers
    scores = measured.scores
    drafts = drafts_tokens(measured.setting)
    result = setting_of(measured.setting)
    stats = sum((output.stats for output in answers), DecodeStats())
    figures: dict[str, Estimate] = {}
    if measured.repeats:
        times = measured.times
        figures["speedup"] = speed_ratio(full.times, times)
        if transformers is not None:
            figures["speedup_over_transformers"] = speed_ratio(transformers.times, times)
        result = replace(
            result, **_speeds(measured), tokens_per_second=estimate(torch.div, times[[1, 0]]).value
        )
    known = [output.error is None for output in full.answers]
    same = [
        there and mine.ids == other.ids
        for there, mine, other in zip(known, answers, full.answers, strict=True)
    ]
    figures["identical_outputs"] = estimate(
        torch.div, [same, known], measured.answers_per_prompt, SHARE
    )
    counted = (("acceptance_rate", "drafted", 1.0), ("mean_accepted_tokens", "rounds", math.inf))
    for name, of, most in counted if drafts else ():
        counts = [[getattr(output.stats, part) for output in answers] for part in ("accepted", of)]
        rate = estimate(torch.div, counts, measured.answers_per_prompt, (0.0, most))
        figures[name] = rate._replace(value=getattr(stats, name))  # 0 without drafts
    metrics = {name: metric(each) for name, each in scores.items()}
    changes = {
        name: change(each, full.scores[name]).bounds
        for name, each in scores.items()
        if name in full.scores
    }
    accepted_at = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
    values: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
    return replace(
        result,
        **values,
        metrics={
            name: figure.value for name, figure in metrics.items() if figure.value is not None
        },
        # A draft is tested if all drafts before it in the round were accepted.
        acceptance_by_position=tuple(map(truediv, accepted_at, stats.tested_by_position))
        if drafts
        else None,
        differences=measured.differences,
        failures=tuple(
            Failure(sample, each.error)
            for sample, each in enumerate(answers)
            if each.error is not None
        ),
        steps_by_drafter=stats.steps_by_drafter,
        mean_layers=stats.mean_layers if result.exit_confidence else None,
        intervals={
            name: figure.bounds
            for name, figure in (figures | metrics).items()
            if figure.bounds is not None
        },
        changes={name: ends for name, ends in changes.items() if ends is not None},
        rows_to_halve=figures["speedup"].rows if "speedup" in figures else None,
    )


def _speeds(measured: Measured) -> dict[str, Any]:
    """Median time to first token (over prompts, then repeats), and peak memory."""
    firsts = [
        [output.steps[0].seconds for output in outputs if output.steps] or [math.nan]
        for outputs in measured.repeats
    ]
    peaks = [
        each.peak_memory_mb
        for outputs in measured.repeats
        for each in outputs
        if each.peak_memory_mb is not None
    ]
    return {
        "ttft_ms": finite(1000 * median(map(median, firsts))),
        "peak_memory_mb": max(peaks, default=None),
    }


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine and implementation. The load average is taken before the run."""
    device = loaded.backend.device
    blocks = loaded.backend.exit_blocks
    cpu = platform.processor() or platform.machine()
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
        "implementation": loaded.backend.implementation
        + ", CUDA graphs" * loaded.backend.recordable,
        "notes": list(loaded.notes),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **({"exit_blocks": list(blocks)} if blocks else {}),
    }


@dataclass(frozen=True)
class Contest:
    """Seconds and tokens (settings, 2, prompts) of plain decoding and of the best settings;
    `places`: their result indices.
    """

    places: Sequence[int]
    times: Tensor
    noun: str = "other prompt"

    def speed(self, place: int, other: int = 0) -> Estimate:
        """Speedup over another setting. Over plain decoding (0) all lower ends hold jointly at 95%
        (Bonferroni).
        """
        mine, theirs = (self.times[self.places.index(each)][:, None] for each in (place, other))
        return speed_ratio(theirs, mine, 0.95 if other else 1 - 0.1 / (len(self.places) - 1))

    def lower_end(self, place: int) -> float:
        bounds = self.speed(place).bounds
        return 0.0 if bounds is None else bounds.low

    def surely_faster(self, places: Sequence[int], other: int) -> list[int]:
        """Those of the places that are faster than `other`, the fastest first. Lower ends hold
        jointly at 95% (Bonferroni).
        """
        found = []
        for place in places:
            mine, theirs = (self.times[self.places.index(each)][:, None] for each in (place, other))
            value, bounds, _ = speed_ratio(theirs, mine, 1 - 0.1 / len(places))
            if bounds is not None and bounds.low > 1:
                found.append((value or 0.0, place))
        return [place for _, place in sorted(found, reverse=True)]

    def text(self, place: int) -> str:
        """`1.82x the speed of autoregressive decoding on 16 other prompts (at least 1.74x with 95%
        confidence)`.
        """
        prompts = plural(self.times.shape[-1], self.noun)
        value = self.speed(place).value or 0.0
        low = self.lower_end(place)
        least = f"at least {low:.2f}x with 95% confidence" if low else "too few for an interval"
        return f"{value:.2f}x the speed of autoregressive decoding on {prompts} ({least})"


def faithful(results: Sequence[Result], near_tie: float) -> list[int]:
    """Indices of drafting settings whose outputs equal plain decoding's, except at near-ties."""
    drafting = [place for place, result in enumerate(results) if result.strategy in DRAFTERS]
    return [place for place in drafting if results[place].keeps_outputs(results[0], near_tie)]


def finalists(
    results: Sequence[Result], near_tie: float, keeping: Mapping[int, Margin] | None = None
) -> list[int]:
    """What is timed once more, full depth first; empty if nothing was faster than full depth.

    The fastest faithful settings and adaptive drafting, if any was faster; and the fastest early
    exits that certainly keep the quality, by the margins `keeping`.
    """
    known = sorted(faithful(results, near_tie), key=lambda place: -(results[place].speedup or 0.0))
    faster = [place for place in known if (results[place].speedup or 0.0) > 1]
    fixed = [place for place in faster if results[place].strategy != "adaptive"][:_FINALISTS]
    adaptive = [place for place in known if results[place].strategy == "adaptive"] if faster else []
    kept = [
        place
        for place, margin in (keeping or {}).items()
        if margin.low >= 0 and (results[place].speedup or 0.0) > 1
    ]
    exits = sorted(kept, key=lambda place: -(results[place].speedup or 0.0))[:_FINALISTS]
    chosen = [*fixed, *adaptive, *exits]
    return [0, *chosen] if chosen else []


def margins(
    results: Sequence[Result], measured: Sequence[Measured], quality_metric: str, keep: float
) -> dict[int, Margin]:
    """By how much each early exit, by its index, exceeds the share `keep` of full depth's quality.
    Full depth comes first.
    """
    full = measured[0].scores.get(quality_metric)
    exits = {
        place: each.scores[quality_metric]
        for place, (result, each) in enumerate(zip(results, measured, strict=True))
        if result.strategy == "early-exit" and quality_metric in each.scores
    }
    if full is None:
        return {}
    return {
        place: margin(scores, full, keep, quality_metric, len(exits))
        for place, scores in exits.items()
    }


def contest(
    places: Sequence[int],
    prompts: int,
    timed: Callable[[int, int], tuple[float, int]],
    seconds: float,
    noun: str = "other prompt",
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Progress, None, Contest]:
    """Times settings prompt by prompt until intervals are narrow or `seconds` are over; yields
    progress in percent.
    """
    times = torch.zeros(len(places), 2, prompts, dtype=torch.float64)
    started = clock()
    for turn in range(_MOST_TURNS):
        for place in in_turn(turn, len(places)):
            times[place, :, turn % prompts] += torch.tensor(
                timed(turn % prompts, places[place]), dtype=torch.float64
            )
        outcome = Contest(places, times[..., : turn + 1], noun)
        share = (clock() - started) / max(seconds, 1e-9)
        yield Progress(min(100, int(100 * share)), 100, "the best once more")
        narrow = (
            outcome.lower_end(each) > (1 - _NARROW) * (outcome.speed(each).value or 0.0)
            for each in places[1:]
        )
        if turn + 1 >= _FEWEST_TURNS and (share >= 1 or all(narrow)):
            break
    return outcome


def winner(again: Contest, results: Sequence[Result], places: Sequence[int]) -> tuple[int, int]:
    """Of these places the one to recommend (adaptive, unless clearly or certainly slower), and the
    one of highest lower end.
    """
    first = max(places, key=again.lower_end)
    for place in places:
        if results[place].strategy == "adaptive" and again.lower_end(place) > 1:
            lead, ends, _ = again.speed(first, place)
            if lead is None or (lead <= _CLOSE and (ends is None or ends.low <= 1)):
                return place, first
    return first, first


def recommend(
    results: Sequence[Result],
    near_tie: float,
    quality_metric: str,
    config: SweepConfig,
    measured: Sequence[Measured],
    again: Contest | None = None,
) -> Recommendation:
    """The setting that certainly gains in the contest `again`, else plain decoding; and policies.
    Full depth comes first.
    """
    known = faithful(results, near_tie)
    policies = [policy_of(result, results[0], quality_metric, config) for result in results]
    best = first = max(known, key=lambda place: results[place].speedup or 0.0, default=0)
    speed = results[best].speedup
    lower_end = None
    gain = f"{results[best].speedup or 0.0:.2f}x"
    alike: list[int] = []
    drafting: list[int] = []
    if again is not None:
        for place in again.places[1:]:
            policies[place]["measured"]["speedup"] = again.speed(place).value or 0.0
        drafting = [place for place in again.places[1:] if place in known]
    if again is not None and drafting:
        best, first = winner(again, results, drafting)
        speed = again.speed(best).value
        lower_end = again.lower_end(best)
        gain = again.text(best)
        leads = {place: again.speed(best, place).bounds for place in drafting if place != best}
        alike = [
            place
            for place, ends in leads.items()
            if ends is not None and ends.low <= 1 <= ends.high
        ]
    pays = lower_end is not None and lower_end > 1
    result = results[best]
    name = policy_text(policies[best])
    if not known:
        verdict = "no setting that drafts kept the autoregressive outputs"
    elif not drafting or again is None or not pays:
        verdict = f"speculation does not pay on this model and machine: {name}, the best setting, reaches {gain}"
    else:
        rank = (
            "the fastest"
            if best == first
            else f"close to the fastest ({again.speed(first).value or 0.0:.2f}x)"
        )
        ties = len(result.differences)
        verdict = (
            f"{name} is {rank} of {len(known)} settings: {gain}, "
            f"{result.acceptance_rate or 0:.0%} of drafts accepted, {result.identical_outputs or 0:.0%} of outputs identical"
            + (
                f" ({ties} {'differs at a near-tie' if ties == 1 else 'differ at near-ties'})"
                if ties
                else ""
            )
        )
    tried = sum(result.strategy in DRAFTERS for result in results)
    reason = [verdict]
    chosen = best if pays else 0
    if pays and alike:
        reason.append(
            f"not significantly different from {', '.join(policy_text(policies[place]) for place in alike)}"
        )
    if tried > len(known):
        reason.append(
            f"{tried - len(known)} of {tried} settings changed the output and were excluded"
        )
    exits = margins(results, measured, quality_metric, config.keep)
    fast, fast_reason = fast_policy(exits, policies, chosen, quality_metric, config.keep, again)
    saved = {EXACT: policies[chosen]} | ({} if fast is None else {FAST: policies[fast]})
    own = results[chosen]
    speed = speed if known else None
    return Recommendation(
        own.exit_layer,
        own.num_draft_tokens,
        speed,
        "; ".join(reason),
        fast_reason,
        saved,
        lower_end,
    )


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy, with the packing of its drafts. `plain`: the row of full
    depth.
    """
    settings = {name: getattr(result, name) for name in _COLUMNS}
    if result.strategy in used_by("lookup"):
        settings["lookup"] = config.generation.get("lookup")
    # Exits by confidence are tested with the head of drafts too.
    if result.exit_confidence or result.strategy not in ("autoregressive", "lookup", "early-exit"):
        copies = config.packing.draft_weights if result.strategy == "adaptive" else ()
        settings |= {"draft_copies": copies, "draft_vocab": config.packing.draft_vocab}
        settings["draft_head"] = (
            config.packing.draft_head if copies or result.draft_weights else None
        )
    policy = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value
    }
    value, full = (each.metrics.get(quality_metric, 0.0) for each in (result, plain))
    figures = {"value": value, "full_depth": full, "speedup": result.speedup or 0.0}
    policy["measured"] = {"task": str(config.task.task), "metric": quality_metric, **figures}
    return cast(Policy, policy)


def fast_policy(
    exits: Mapping[int, Margin],
    policies: Sequence[Policy],
    exact: int,
    quality_metric: str,
    keep: float,
    again: Contest | None,
) -> tuple[int | None, str]:
    """The fastest early exit that certainly keeps this share of the quality and is faster than
    `exact`, or None; and why.

    `exits`: their margins, by index; `policies` have the speeds of the contest `again`, where they
    were timed in it.
    """
    full = policies[exact]["measured"]["full_depth"]
    to_beat = policies[exact]["measured"]["speedup"]
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    if not exits:
        return None, "none, because no early exit was measured"

    def described(place: int) -> str:
        speed = policies[place]["measured"]["speedup"]
        value = policies[place]["measured"]["value"]
        return f"{speed:.2f}x the speed of plain decoding, {quality_metric} {value:.3g} ({full:.3g} at full depth)"

    ranked = sorted(exits, key=lambda place: -policies[place]["measured"]["speedup"])
    good = [place for place in ranked if exits[place].needed is not None]
    if not good:
        best = max(ranked, key=lambda place: exits[place].mean)
        missed = f"no early exit keeps more than {keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        value = policies[best]["measured"]["value"]
        return (
            None,
            f"none, because {missed}; the best, {policy_text(policies[best])}, has {value:.3g}",
        )
    faster = [place for place in good if policies[place]["measured"]["speedup"] > to_beat]
    if not faster:
        not_faster = f"is not faster than the policy exact ({to_beat:.2f}x)"
        return (
            None,
            f"none, because {policy_text(policies[good[0]])} ({described(good[0])}) {not_faster}",
        )
    timed = [] if again is None else [place for place in exits if place in again.places]
    certain = [] if again is None else again.surely_faster(timed, exact)
    if certain and again is not None:
        best = certain[0]
        prompts = plural(again.times.shape[-1], again.noun)
        return best, f"{policy_text(policies[best])}: {described(best)}, timed on {prompts}"
    if timed:
        best = max(timed, key=lambda place: policies[place]["measured"]["speedup"])
        uncertain = f"is not certainly faster than the policy exact ({to_beat:.2f}x)"
        return None, f"none, because {policy_text(policies[best])} ({described(best)}) {uncertain}"
    best = min(faster, key=lambda place: exits[place].needed or 0)
    return None, (
        f"none, because {plural(exits[best].prompts, 'prompt')} cannot show that an early exit keeps {keep:.4g} of "
        f"{quality_metric}; for {policy_text(policies[best])} ({described(best)}) it would take about {exits[best].needed} "
        "(`samples`)"
    )
