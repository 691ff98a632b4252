"""A sweep's advice: the Pareto frontier, the cost model's error, the recommended setting, and the policies to store."""

from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import mean, median
from typing import cast

from torch import Tensor

from ...config.decoding import DRAFTERS, EXACT, FAST, Policy, policy_text, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...errors import plural
from ..metrics import Margin, margin, quality, speed_ratio
from ..results import Bounds, PredictionError, Recommendation, Result, frontier
from . import Measured

_WORTHWHILE = 1.05  # smaller speedups of a fixed setting are not recommended
_CLOSE = 1.05  # adaptive drafting is preferred to a fixed setting that is faster by less: it suits other prompts too
_NAMED = 3  # settings that a sentence lists
_NOISY = 0.1  # a baseline that drifts by more makes small differences meaningless
# The settings that are columns of a sweep.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


def recommend(
    results: Sequence[Result],
    near_tie: float,
    drift: float,
    quality_metric: str,
    config: SweepConfig,
    measured: Sequence[Measured | None] = (),
) -> Recommendation:
    """The fastest drafting setting with the autoregressive outputs, up to differences at near-ties, and the policies.

    Args:
        results: the first is full depth.
        drift: by how much the time of full depth changed, see `Recommendation`.
        measured: what was measured of each result, on the same prompts, None of one that was only predicted. If given, it tells
            which settings may be as fast, and which early exits keep their quality.
    """
    policies = [policy_of(result, results[0], quality_metric, config) for result in results]
    tried = [place for place, result in enumerate(results) if result.strategy in DRAFTERS and result.metrics]
    faithful = [
        place
        for place in tried
        if results[place].failures == results[0].failures
        and all(found.top2_gap <= near_tie for found in results[place].differences)
    ]
    best, pays = _choice(results, faithful, measured)
    chosen = best if pays else 0
    changed = len(tried) - len(faithful)
    skipped = sum(1 for result in results if result.predicted_speedup and not result.metrics)
    noise = f"the autoregressive baseline itself varied by {drift:.0%}, so measure again on a quieter machine"
    reason = (
        _verdict(results, faithful, best, pays, policy_text(policies[best])),
        _alike(results, faithful, best, measured, policies) if pays else "",
        f"{changed} of {len(tried)} settings changed the output and were excluded" if changed else "",
        f"not measured because of a lower predicted speed: {skipped}" if skipped else "",
        noise if drift > _NOISY else "",
    )
    full = measured[0].scores.get(quality_metric) if measured and measured[0] else None
    exits = [
        (policies[place], margin(row.scores[quality_metric], full, config.keep, quality_metric))
        for place, row in enumerate(measured)
        if full and row and results[place].strategy == "early-exit" and quality_metric in row.scores
    ]
    fast, fast_reason = fast_policy(exits, policies[chosen], quality_metric, config.keep)
    return Recommendation(
        results[chosen].exit_layer,
        results[chosen].num_draft_tokens,
        results[best].speedup if faithful else None,
        drift,
        "; ".join(filter(None, reason)),
        fast_reason,
        {EXACT: policies[chosen]} | ({} if fast is None else {FAST: fast}),
    )


def _choice(results: Sequence[Result], faithful: Sequence[int], measured: Sequence[Measured | None]) -> tuple[int, bool]:
    """The index of the best of the `faithful` settings, 0 if there are none, and whether to decode with it.

    Adaptive drafting is preferred to a fixed setting that is hardly faster, and not certainly, and to plain decoding unless
    that is faster.
    """
    speeds = [result.speedup or 0.0 for result in results]
    best = max(faithful, key=speeds.__getitem__, default=0)
    adaptive = next((place for place in faithful if results[place].strategy == "adaptive"), 0)
    if adaptive and speeds[adaptive] >= max(1.0, speeds[best] / _CLOSE):
        lead = _lead(measured, best, adaptive)
        if lead is None or lead.low <= 1:
            return adaptive, True
    return best, speeds[best] >= _WORTHWHILE


def _verdict(results: Sequence[Result], faithful: Sequence[int], best: int, pays: bool, name: str) -> str:
    """Why the best of the `faithful` settings is recommended, or none; `name` is the best one's."""
    found, plain = results[best], results[0]
    if not faithful:
        return "no setting that drafts kept the autoregressive outputs"
    if not pays:
        return f"speculation does not pay on this model and machine: {name}, the best setting, reaches {found.speedup:.2f}x"
    fastest = max(results[place].speedup or 0.0 for place in faithful)
    rank = "the fastest" if fastest == found.speedup else f"close to the fastest ({fastest:.2f}x)"
    ties = len(found.differences)
    return (
        f"{name} is {rank} of {len(faithful)} settings: {found.speedup:.2f}x the speed of autoregressive decoding "
        f"({found.tokens_per_second:.0f} vs. {plain.tokens_per_second:.0f} tokens/s), "
        f"{found.acceptance_rate or 0.0:.0%} of drafts accepted, {found.identical_outputs or 0.0:.0%} of outputs identical"
        + (f" ({ties} {'differs at a near-tie' if ties == 1 else 'differ at near-ties'})" if ties else "")
    )


def _alike(
    results: Sequence[Result],
    faithful: Sequence[int],
    best: int,
    measured: Sequence[Measured | None],
    policies: Sequence[Policy],
) -> str:
    """Names the settings that may be as fast as the best, the fastest first; empty if there are none."""
    leads = {place: _lead(measured, best, place) for place in faithful if place != best}
    alike = [place for place, lead in leads.items() if lead is not None and lead.low <= 1 <= lead.high]
    alike.sort(key=lambda place: -(results[place].speedup or 0.0))
    names = ", ".join(policy_text(policies[place]) for place in alike[:_NAMED])
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    return f"on these prompts it cannot be told from {names}{more}" if alike else ""


def _lead(measured: Sequence[Measured | None], best: int, other: int) -> Bounds | None:
    """The interval of the speed of one setting over another's, on the same prompts."""
    one, slower = (measured[place] if measured else None for place in (best, other))
    return speed_ratio(slower.times[:2], one.times[:2]).bounds if one and slower else None


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
    measured = [index for index, result in enumerate(results) if result.metrics]
    points = [(quality(results[index].metrics, quality_metric), results[index].tokens_per_second or 0.0) for index in measured]
    optimal = {measured[index] for index in frontier(points)}
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
