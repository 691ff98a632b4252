"""Evaluates the rows of a sweep: the Pareto frontier, the cost model's error, and the setting to decode with."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median

from ..metrics import quality
from ..outputs import Outputs
from ..record import PredictionError, Recommendation
from ..results import ExitResult, frontier

_WORTHWHILE = 1.05  # smaller speedups are not recommended
_NOISY = 0.1  # a baseline that drifts by more makes small differences meaningless


def recommend(results: Sequence[ExitResult], near_tie: float, drift: float) -> Recommendation:
    """The fastest self-speculative setting with the autoregressive outputs, up to differences at near-ties."""
    autoregressive = next(result for result in results if result.strategy == "autoregressive")
    settings = [result for result in results if result.strategy == "self-speculative" and result.draft_weights is None]
    measured = [result for result in settings if result.metrics]
    faithful = [result for result in measured if _is_faithful(result, autoregressive, near_tie)]
    notes = ""
    if len(faithful) < len(measured):
        notes += f"; {len(measured) - len(faithful)} of {len(measured)} settings changed the output and were excluded"
    if len(measured) < len(settings):
        notes += f"; not measured because of a lower predicted speed: {len(settings) - len(measured)}"
    if drift > _NOISY:
        notes += f"; the autoregressive baseline itself varied by {drift:.0%}, so measure again on a quieter machine"
    best = max(faithful, key=lambda result: result.speedup or 0.0, default=None)
    if best is None:
        return Recommendation(None, None, None, drift, f"no self-speculative setting kept the autoregressive outputs{notes}")
    speedup = best.speedup or 0.0
    name = f"exit {best.exit_layer} with {best.num_draft_tokens} draft tokens"
    if speedup < _WORTHWHILE:
        reason = f"speculation does not pay on this model and machine: {name}, the best setting, reaches {speedup:.2f}x{notes}"
        return Recommendation(None, None, best.speedup, drift, reason)
    reason = (
        f"{name} is the fastest of {len(faithful)} settings: {speedup:.2f}x the speed of autoregressive decoding "
        f"({best.tokens_per_second:.0f} vs. {autoregressive.tokens_per_second:.0f} tokens/s), {best.acceptance_rate:.0%} of "
        f"drafts accepted, {best.identical_outputs or 0.0:.0%} of outputs identical{_near_ties(best)}{notes}"
    )
    return Recommendation(best.exit_layer, best.num_draft_tokens, best.speedup, drift, reason)


def mark_pareto(results: Sequence[ExitResult], quality_metric: str) -> list[ExitResult]:
    """The results with `pareto` set, by the quality metric and tokens per second, for those that were measured."""
    measured = [index for index, result in enumerate(results) if result.metrics]
    points = [(quality(results[index].metrics, quality_metric), results[index].tokens_per_second or 0.0) for index in measured]
    optimal = {measured[index] for index in frontier(points)}
    return [replace(result, pareto=index in optimal) for index, result in enumerate(results)]


def prediction_error(results: Sequence[ExitResult]) -> PredictionError | None:
    """The error over the results that were both predicted and measured; None if there are none."""
    errors = [
        result.predicted_speedup / result.speedup - 1 for result in results if result.predicted_speedup and result.speedup
    ]
    sizes = [abs(error) for error in errors]
    return PredictionError(len(errors), median(sizes), max(sizes), mean(errors)) if errors else None


def baseline_drift(first: Outputs, second: Outputs) -> float:
    """Median over the prompts of the relative change in time between two measurements of the same method."""
    pairs = [(before, after) for before, after in zip(first.each, second.each, strict=True) if before.steps and after.steps]
    times = [(Outputs((before,)).seconds_per_token, Outputs((after,)).seconds_per_token) for before, after in pairs]
    return median(abs(after / before - 1) for before, after in times)


def _is_faithful(result: ExitResult, autoregressive: ExitResult, near_tie: float) -> bool:
    same_failures = result.failures == autoregressive.failures
    return same_failures and all(difference.top2_gap <= near_tie for difference in result.differences)


def _near_ties(result: ExitResult) -> str:
    count = len(result.differences)
    return f" ({count} {'differs at a near-tie' if count == 1 else 'differ at near-ties'})" if count else ""
