"""What a sweep advises: the Pareto frontier, the cost model's error, the setting to decode with, and the policies to store."""

from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import mean, median
from typing import cast

from ...config.decoding import DRAFTERS, EXACT, FAST, Measured, Policy, policy_text, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...config.packing import PackingConfig
from ...wording import plural
from ..bootstrap import Margin, ratio_bounds
from ..metrics import quality
from ..outputs import Outputs, Times
from ..results import PredictionError, Recommendation, Result, frontier

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
    times: Sequence[Times | None] = (),
    margins: Sequence[Margin | None] = (),
) -> Recommendation:
    """The fastest drafting setting with the autoregressive outputs, up to differences at near-ties, and the policies.

    Adaptive drafting is preferred to a fixed setting that is hardly faster, and to plain decoding unless that is faster.
    `times`: of each result on the same prompts, None if it was not measured. If given, they tell which settings may be as fast.
    `margins`: by how much each result keeps its quality, None if that was not measured.
    """
    plain = next(result for result in results if result.strategy == "autoregressive")
    settings = [result for result in results if result.strategy in DRAFTERS]
    measured = [result for result in settings if result.metrics]
    faithful = [result for result in measured if _is_faithful(result, plain, near_tie)]
    notes = ""
    if len(faithful) < len(measured):
        notes += f"; {len(measured) - len(faithful)} of {len(measured)} settings changed the output and were excluded"
    skipped = [result for result in settings if result.predicted_speedup and not result.metrics]
    if skipped:
        notes += f"; not measured because of a lower predicted speed: {len(skipped)}"
    if drift > _NOISY:
        notes += f"; the autoregressive baseline itself varied by {drift:.0%}, so measure again on a quieter machine"
    best = max(faithful, key=_speed, default=None)
    pays, fastest = best is not None and _speed(best) >= _WORTHWHILE, "the fastest"
    adaptive = next((result for result in faithful if result.strategy == "adaptive"), None)
    if best is not None and adaptive is not None and _speed(adaptive) >= max(1.0, _speed(best) / _CLOSE):
        fastest = fastest if best is adaptive else f"close to the fastest ({_speed(best):.2f}x)"
        best, pays = adaptive, True
    exact = policy_of(best if best is not None and pays else plain, plain, quality_metric, config)
    fast, fast_reason = fast_policy(results, margins, exact, plain, quality_metric, config)
    policies = {EXACT: exact} | ({} if fast is None else {FAST: fast})
    if best is None:
        reason = f"no setting that drafts kept the autoregressive outputs{notes}"
        return Recommendation(None, None, None, drift, reason, fast_reason, policies)
    speedup, name = _speed(best), policy_text(policy_of(best, plain, quality_metric, config))
    if not pays:
        reason = f"speculation does not pay on this model and machine: {name}, the best setting, reaches {speedup:.2f}x{notes}"
        return Recommendation(None, None, best.speedup, drift, reason, fast_reason, policies)
    reason = (
        f"{name} is {fastest} of {len(faithful)} settings: {speedup:.2f}x the speed of autoregressive decoding "
        f"({best.tokens_per_second:.0f} vs. {plain.tokens_per_second:.0f} tokens/s), {best.acceptance_rate or 0.0:.0%} of "
        f"drafts accepted, {best.identical_outputs or 0.0:.0%} of outputs identical{_near_ties(best)}"
    )
    alike = [
        policy_text(policy_of(result, plain, quality_metric, config))
        for result, own in zip(results, times, strict=False)
        if result in faithful and result is not best and _may_be_as_fast(own, times[results.index(best)])
    ]
    if alike:
        more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
        reason += f"; on these prompts it cannot be told from {', '.join(alike[:_NAMED])}{more}"
    reason += notes
    return Recommendation(best.exit_layer, best.num_draft_tokens, best.speedup, drift, reason, fast_reason, policies)


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy; `plain` is the row of full depth."""
    settings = {name: getattr(result, name) for name in _COLUMNS}
    for name in ("draft_confidence", "lookup"):
        if result.strategy in used_by(name):
            settings[name] = config.generation.get(name)
    settings |= _drafts_storage(result, config.packing)
    value, full = result.metrics.get(quality_metric, 0.0), plain.metrics.get(quality_metric, 0.0)
    measured: Measured = {
        "task": str(config.task.task),
        "metric": quality_metric,
        "value": value,
        "full_depth": full,
        "speedup": result.speedup or 0.0,
    }
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if value}
    return cast(Policy, said | {"measured": measured})


def fast_policy(
    results: Sequence[Result],
    margins: Sequence[Margin | None],
    exact: Policy,
    plain: Result,
    quality_metric: str,
    config: SweepConfig,
) -> tuple[Policy | None, str]:
    """The fastest early exit that certainly keeps `config.keep` of full depth's quality, and why; None if there is none.

    `margins`: of each result, None where its quality was not measured. Certainly: by the lower end of the margin's interval.
    An exit must also be faster than `exact`.
    """
    full = plain.metrics.get(quality_metric, 0.0)
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    exits = [
        (policy_of(result, plain, quality_metric, config), found)
        for result, found in zip(results, margins, strict=False)
        if result.strategy == "early-exit" and found is not None
    ]
    if not exits:
        return None, "none, because no early exit was measured"

    def described(policy: Policy) -> str:
        speed = f"{_speedup(policy):.2f}x the speed of plain decoding"
        return f"{speed}, {quality_metric} {_value(policy):.3g} ({full:.3g} at full depth)"

    good = [(policy, found) for policy, found in exits if found.needed is not None]
    if not good:
        best, _ = max(exits, key=lambda exit: exit[1].mean)
        missed = f"no early exit keeps more than {config.keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        return None, f"none, because {missed}; the best, {policy_text(best)}, has {_value(best):.3g}"
    faster = [(policy, found) for policy, found in good if _speedup(policy) > _speedup(exact)]
    if not faster:
        best = max((policy for policy, _ in good), key=_speedup)
        name, its_speed = policy_text(best), f"{_speedup(exact):.2f}x"
        return None, f"none, because {name} ({described(best)}) is not faster than the policy exact ({its_speed})"
    certain = [policy for policy, found in faster if found.low >= 0]
    if certain:
        best = max(certain, key=_speedup)
        return best, f"{policy_text(best)}: {described(best)}"
    best, found = min(faster, key=lambda exit: exit[1].needed or 0)
    return None, (
        f"none, because {plural(found.prompts, 'prompt')} cannot show that an early exit keeps {config.keep:.4g} of "
        f"{quality_metric}; for {policy_text(best)} ({described(best)}) it would take about {found.needed} (`samples`)"
    )


def _drafts_storage(result: Result, packing: PackingConfig) -> dict[str, object]:
    """How the drafts of a row were stored. Exits that are chosen by confidence are tested with the head of drafts too."""
    if result.strategy in ("autoregressive", "lookup") or (result.strategy == "early-exit" and not result.exit_confidence):
        return {}
    copies = packing.draft_weights if result.strategy == "adaptive" else ()
    head = packing.draft_head if copies or result.draft_weights else None
    return {"draft_copies": copies, "draft_head": head, "draft_vocab": packing.draft_vocab}


def _value(policy: Policy) -> float:
    return policy["measured"]["value"]


def _speedup(policy: Policy) -> float:
    return policy["measured"]["speedup"]


def mark_pareto(results: Sequence[Result], quality_metric: str) -> list[Result]:
    """The results with `pareto` set, by the quality metric and tokens per second, for those that were measured."""
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


def baseline_drift(first: Outputs, second: Outputs) -> float:
    """Median over the prompts of the relative change in time between two measurements of the same method."""
    pairs = [(before, after) for before, after in zip(first.each, second.each, strict=True) if before.steps and after.steps]
    times = [(Outputs((before,)).times, Outputs((after,)).times) for before, after in pairs]
    return median(abs(after.seconds_per_token / before.seconds_per_token - 1) for before, after in times)


def _may_be_as_fast(times: Times | None, of_best: Times | None) -> bool:
    """Whether the interval of their ratio contains 1."""
    if times is None or of_best is None:
        return False
    ends = ratio_bounds([times], [of_best])
    return ends is not None and ends.low <= 1 <= ends.high


def _speed(result: Result) -> float:
    return result.speedup or 0.0


def _is_faithful(result: Result, autoregressive: Result, near_tie: float) -> bool:
    same_failures = result.failures == autoregressive.failures
    return same_failures and all(difference.top2_gap <= near_tie for difference in result.differences)


def _near_ties(result: Result) -> str:
    count = len(result.differences)
    return f" ({count} {'differs at a near-tie' if count == 1 else 'differ at near-ties'})" if count else ""
