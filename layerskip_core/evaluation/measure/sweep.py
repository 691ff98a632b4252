"""Every exit with every draft length on one task: how good, how fast, and which to decode with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from statistics import mean, median

from ...checkpoint.loaded import Decoder
from ...config.checks import require_exit_layer
from ...config.decoding import DecodingConfig, Strategy
from ...config.evaluation import SweepConfig
from ..metrics import NEAR_TIE, Difference, ReferenceLosses, quality
from ..outputs import Failure, Outputs, finite
from ..report.record import PredictionError, Recommendation, RunRecord, environment, frontier
from ..tasks import Task
from .batches import answer_together, timed_by_default, timed_examples
from .cost_model import Predictions, predict
from .runner import Progress, differences, drafts_tokens, measure_interleaved

_WORTHWHILE = 1.05  # a speedup below this is not worth the words
_QUICK = 3  # settings that a quick sweep measures
_NOISY = 0.1  # a baseline that drifts by more makes small differences meaningless


@dataclass(frozen=True)
class ExitResult:
    """One way of decoding: autoregressive, an early exit, or an exit as the draft of self-speculation.

    `perplexity` is that of the reference through the exit, None for self-speculation, which answers with the last layer.
    `speedup` compares the total generation time by new token, prefill included, with the autoregressive one of the same run.
    `pareto`: nothing else in the sweep is as good by the task's quality metric and as fast, and better in one of them.
    `agreement`: the share of the autoregressive tokens that the exit would have chosen too. The predictions are the cost
    model's, made from the pass times given with them before the settings themselves were measured; the predicted speedup is
    relative to the autoregressive steps among them, so that a machine which becomes slower later does not spoil it. A setting
    that a quick sweep did not measure has only these; `metrics` is then empty.
    """

    strategy: Strategy
    exit_layer: int | None
    num_draft_tokens: int | None
    metrics: dict[str, float]
    perplexity: float | None
    acceptance_rate: float | None
    mean_accepted_tokens: float | None
    tokens_per_second: float | None
    speedup: float | None
    identical_outputs: float | None
    pareto: bool = False
    predicted_speedup: float | None = None
    predicted_tokens_per_second: float | None = None
    predicted_acceptance_rate: float | None = None
    pass_times_ms: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    acceptance_by_position: tuple[float, ...] | None = None
    time_split_ms: dict[str, float] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()


def sweep(loaded: Decoder, task: Task, config: SweepConfig) -> Iterator[Progress | RunRecord[ExitResult]]:
    """Yields progress, then the record with a recommendation.

    Raises:
        ConfigError: an exit is outside the model.
        LayerSkipError: no prompt could be answered.
    """
    config = _resolved(loaded, task, config)
    loaded = task.prepared(loaded)
    machine = environment(loaded)
    losses = ReferenceLosses(0, {})
    for number, one in enumerate(task.losses(loaded, [*config.exits, loaded.backend.num_layers]), start=1):
        losses = losses + one
        yield Progress(min(number, len(task.examples)), len(task.examples), "perplexity")
    examples = timed_examples(task.examples, config.timed)
    predictions = yield from predict(loaded, examples, config.exits, config.specs, task.max_new_tokens, task.stop)
    baseline, ways = _settings(config, task)
    chosen = _promising(ways, predictions) if config.quick else ways
    together = None
    if config.batch_size > 1:
        together = yield from answer_together(loaded, task.examples, [baseline, *chosen], config.batch_size)
    # The baseline runs twice among the others, half of them apart: what it is compared with, and how steady the machine was.
    half = len(chosen) // 2
    measured = yield from measure_interleaved(loaded, examples, [baseline, *chosen[:half], baseline, *chosen[half:]])
    first, *others = (repeats[0] for repeats in measured)
    second = others.pop(half)
    seconds = Outputs(first.each + second.each).seconds_per_token
    full = losses.perplexity(loaded.backend.num_layers)
    expected, *answers = together or [first, *others]
    plain = exit_result(baseline, first, seconds, expected, expected, task.score(expected.texts, full))
    results = [replace(plain, tokens_per_second=1 / seconds, speedup=1.0)]  # of both its measurements
    found = dict(zip(chosen, zip(others, answers, strict=True), strict=True))
    for setting in ways:
        if setting not in found:
            results.append(_unmeasured(setting))
            continue
        outputs, mine = found[setting]
        drafts = drafts_tokens(setting)
        parted = differences(loaded, task.examples, mine, expected) if drafts and not setting.sampling.temperature else ()
        perplexity = full if drafts or setting.exit_layer is None else losses.perplexity(setting.exit_layer)
        metrics = task.score(mine.texts, perplexity)
        results.append(exit_result(setting, outputs, seconds, mine, expected, metrics, parted))
    results = [_with_predictions(result, losses, loaded.backend.num_layers, predictions) for result in results]
    marked = mark_pareto(results, task.quality_metric)
    advice = recommend(marked, NEAR_TIE[loaded.backend.dtype], baseline_drift(first, second))
    settings = asdict(config) | {"quality_metric": task.quality_metric}
    yield RunRecord(settings, machine, tuple(marked), advice, prediction_error(marked))


def exit_result(
    setting: DecodingConfig,
    outputs: Outputs,
    baseline_seconds_per_token: float,
    answers: Outputs,
    expected: Outputs,
    metrics: dict[str, float],
    parted: tuple[Difference, ...] = (),
) -> ExitResult:
    """The figures of one way of decoding: of speed from the outputs measured, of all else from its answers and those expected
    of it, the autoregressive ones.
    """
    drafts = drafts_tokens(setting)
    return replace(
        _unmeasured(setting),
        metrics=metrics,
        acceptance_rate=answers.stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=answers.stats.mean_accepted_tokens if drafts else None,
        tokens_per_second=finite(1 / outputs.seconds_per_token),
        speedup=finite(baseline_seconds_per_token / outputs.seconds_per_token),
        identical_outputs=answers.identical_outputs(expected),
        acceptance_by_position=answers.acceptance_by_position if drafts else None,
        time_split_ms=outputs.time_split_ms,
        differences=parted,
        failures=answers.failures,
    )


def prediction_error(results: Sequence[ExitResult]) -> PredictionError | None:
    """Over the results that were both predicted and measured; None when there is none."""
    errors = [
        result.predicted_speedup / result.speedup - 1 for result in results if result.predicted_speedup and result.speedup
    ]
    sizes = [abs(error) for error in errors]
    return PredictionError(len(errors), median(sizes), max(sizes), mean(errors)) if errors else None


def mark_pareto(results: Sequence[ExitResult], quality_metric: str) -> list[ExitResult]:
    """The results with `pareto` set, by the quality metric and tokens a second, for those that were measured."""
    measured = [place for place, result in enumerate(results) if result.metrics]
    points = [(quality(results[place].metrics, quality_metric), results[place].tokens_per_second or 0.0) for place in measured]
    best = {measured[place] for place in frontier(points)}
    return [replace(result, pareto=place in best) for place, result in enumerate(results)]


def recommend(results: Sequence[ExitResult], near_tie: float, drift: float) -> Recommendation:
    """The fastest self-speculative setting whose outputs are the autoregressive ones, or part from them at near-ties only."""
    baseline = next(result for result in results if result.strategy == "autoregressive")
    drafting = [result for result in results if result.strategy == "self-speculative"]
    speculative = [result for result in drafting if result.metrics]  # measured
    faithful = [result for result in speculative if _is_faithful(result, baseline, near_tie)]
    notes = ""
    if len(faithful) < len(speculative):
        notes += f"; {len(speculative) - len(faithful)} of {len(speculative)} settings gave other outputs and were set aside"
    if len(speculative) < len(drafting):
        notes += f"; {len(drafting) - len(speculative)} more should be slower and were not measured"
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
        f"{name} is the fastest of {len(faithful)} settings, {speedup:.2f}x autoregressive decoding "
        f"({best.tokens_per_second:.0f} against {baseline.tokens_per_second:.0f} tokens/s): {best.acceptance_rate:.0%} of the "
        f"drafts are accepted, and {best.identical_outputs or 0.0:.0%} of the outputs are identical{_near_ties(best)}{notes}"
    )
    return Recommendation(best.exit_layer, best.num_draft_tokens, best.speedup, drift, reason)


def baseline_drift(first: Outputs, second: Outputs) -> float:
    """Median over the prompts of how much the second measurement's time differs from the first's, as a share of it."""
    pairs = [(one, other) for one, other in zip(first.each, second.each, strict=True) if one.steps and other.steps]
    times = [(Outputs((one,)).seconds_per_token, Outputs((other,)).seconds_per_token) for one, other in pairs]
    return median(abs(later / earlier - 1) for earlier, later in times)


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Six exits, denser among the early ones, where a draft is cheap; of 24 layers 3, 4, 6, 8, 12 and 18."""
    shares = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    return tuple(sorted({max(1, min(round(num_layers * share), num_layers - 1)) for share in shares}))


def _resolved(loaded: Decoder, task: Task, config: SweepConfig) -> SweepConfig:
    """The config with its defaults filled in."""
    num_layers = loaded.backend.num_layers
    exits = config.exits or default_exits(num_layers)
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, field="exits")
    return replace(config, task=task.config, exits=exits, timed=timed_by_default(config))


def _settings(config: SweepConfig, task: Task) -> tuple[DecodingConfig, list[DecodingConfig]]:
    """The baseline, and what is compared with it: every exit alone, then every exit with every draft length."""
    max_new_tokens = task.max_new_tokens
    alone = [DecodingConfig("early-exit", exit_layer, max_new_tokens=max_new_tokens) for exit_layer in config.exits]
    drafting = [
        DecodingConfig("self-speculative", exit_layer, drafts, max_new_tokens)
        for exit_layer, drafts in product(config.exits, config.specs)
    ]
    baseline = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)
    return task.decoding(baseline), [task.decoding(setting) for setting in alone + drafting]


def _promising(ways: Sequence[DecodingConfig], predictions: Predictions) -> list[DecodingConfig]:
    """The settings that should be fastest, and their exits alone."""
    best = predictions.promising(_QUICK)
    exits = {exit_layer for exit_layer, _ in best}
    return [
        way
        for way in ways
        if (way.exit_layer in exits if not drafts_tokens(way) else (way.exit_layer, way.num_draft_tokens) in best)
    ]


def _unmeasured(setting: DecodingConfig) -> ExitResult:
    drafts = setting.num_draft_tokens if drafts_tokens(setting) else None
    return ExitResult(setting.strategy, setting.exit_layer, drafts, {}, None, None, None, None, None, None)


def _with_predictions(result: ExitResult, losses: ReferenceLosses, num_layers: int, predictions: Predictions) -> ExitResult:
    """The result with what is known of it without decoding: perplexity and agreement of an exit, the speed of a setting."""
    if result.strategy != "self-speculative":
        agreement = predictions.agreement[result.exit_layer] if result.exit_layer else None
        return replace(result, perplexity=losses.perplexity(result.exit_layer or num_layers), agreement=agreement)
    assert result.exit_layer is not None and result.num_draft_tokens is not None
    found = predictions.settings.get((result.exit_layer, result.num_draft_tokens))
    if found is None:
        return result
    return replace(
        result,
        predicted_speedup=found.speedup,
        predicted_tokens_per_second=finite(found.tokens_per_second),
        predicted_acceptance_rate=found.rounds.acceptance_rate,
        pass_times_ms={name: 1000 * seconds for name, seconds in asdict(found.times).items()},
    )


def _is_faithful(result: ExitResult, baseline: ExitResult, near_tie: float) -> bool:
    return result.failures == baseline.failures and all(place.top2_gap <= near_tie for place in result.differences)


def _near_ties(result: ExitResult) -> str:
    return f" (the others part at near-ties, {len(result.differences)} of them)" if result.differences else ""
