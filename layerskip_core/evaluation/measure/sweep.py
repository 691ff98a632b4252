"""Every exit with every draft length on one task: quality, speed, and which setting to decode with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product

from ...checkpoint.loaded import Decoder
from ...config.checks import require_exit_layer
from ...config.decoding import DecodingConfig
from ...config.evaluation import SweepConfig
from ..outputs import Outputs, finite
from ..perplexity import ReferenceLosses
from ..record import RunRecord
from ..results import Difference, ExitResult
from ..tasks.task import Task
from .batches import answer_in_batches, default_timed, timed_examples
from .comparison import NEAR_TIE, differences
from .cost_model import Predictions, predict
from .environment import environment
from .recommendation import baseline_drift, mark_pareto, prediction_error, recommend
from .runner import Progress, drafts_tokens, measure_interleaved

_QUICK = 3  # settings that a quick sweep measures


def sweep(loaded: Decoder, task: Task, config: SweepConfig) -> Iterator[Progress | RunRecord[ExitResult]]:
    """Yields progress, then the record with a recommendation.

    Raises:
        ConfigError: an exit is outside the model.
        LayerSkipError: no prompt could be answered.
    """
    task, generation = task.asked(config.generation)
    config = replace(_resolved(loaded, config), task=task.config, generation=generation)
    loaded = task.prepared(loaded)
    machine = environment(loaded)
    losses = ReferenceLosses(0, {})
    for number, new in enumerate(task.losses(loaded, [*config.exits, loaded.backend.num_layers]), start=1):
        losses = losses + new
        yield Progress(min(number, len(task.examples)), len(task.examples), "perplexity")
    examples = timed_examples(task.examples, config.timed)
    autoregressive, settings = _settings(config)
    predictions = yield from predict(loaded, examples, config.exits, config.specs, autoregressive.max_new_tokens, task.stop)
    chosen = _promising(settings, predictions) if config.quick else settings
    batched = None
    if config.batch_size > 1:
        batched = yield from answer_in_batches(loaded, task.examples, [autoregressive, *chosen], config.batch_size)
    # The baseline runs twice, first and in the middle. The others are compared with both; their difference shows the noise.
    half = len(chosen) // 2
    methods = [autoregressive, *chosen[:half], autoregressive, *chosen[half:]]
    measured = yield from measure_interleaved(loaded, examples, methods)
    first, *timed = (repeats[0] for repeats in measured)
    second = timed.pop(half)
    seconds = Outputs(first.each + second.each).seconds_per_token
    full = losses.perplexity(loaded.backend.num_layers)
    expected, *answers = batched or [first, *timed]
    plain = exit_result(autoregressive, first, seconds, expected, expected, task.score(expected.texts, full))
    results = [replace(plain, tokens_per_second=1 / seconds, speedup=1.0)]  # over both measurements
    by_setting = dict(zip(chosen, zip(timed, answers, strict=True), strict=True))
    for setting in settings:
        if setting not in by_setting:
            results.append(_unmeasured(setting))
            continue
        outputs, answered = by_setting[setting]
        drafts = drafts_tokens(setting)
        comparable = drafts and not setting.sampling.temperature
        differing = differences(loaded, task.examples, answered, expected) if comparable else ()
        perplexity = full if drafts or setting.exit_layer is None else losses.perplexity(setting.exit_layer)
        metrics = task.score(answered.texts, perplexity)
        results.append(exit_result(setting, outputs, seconds, answered, expected, metrics, differing))
    results = [_with_predictions(result, losses, loaded.backend.num_layers, predictions) for result in results]
    marked = mark_pareto(results, task.quality_metric)
    advice = recommend(marked, NEAR_TIE[loaded.backend.dtype], baseline_drift(first, second))
    resolved = asdict(config) | {"quality_metric": task.quality_metric, "prompt_template": loaded.template.name}
    yield RunRecord(resolved, machine, tuple(marked), advice, prediction_error(marked))


def exit_result(
    setting: DecodingConfig,
    outputs: Outputs,
    autoregressive_seconds_per_token: float,
    answers: Outputs,
    expected: Outputs,
    metrics: dict[str, float],
    differing: tuple[Difference, ...] = (),
) -> ExitResult:
    """The figures of one setting: speed from its timed outputs, all else from its answers and the autoregressive ones."""
    drafts = drafts_tokens(setting)
    return replace(
        _unmeasured(setting),
        metrics=metrics,
        acceptance_rate=answers.stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=answers.stats.mean_accepted_tokens if drafts else None,
        tokens_per_second=finite(1 / outputs.seconds_per_token),
        speedup=finite(autoregressive_seconds_per_token / outputs.seconds_per_token),
        identical_outputs=answers.identical_outputs(expected),
        acceptance_by_position=answers.acceptance_by_position if drafts else None,
        time_split_ms=outputs.time_split_ms,
        differences=differing,
        failures=answers.failures,
    )


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Six exits, denser among the early layers, where drafts are cheap. Of 24 layers: 3, 4, 6, 8, 12 and 18."""
    shares = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    return tuple(sorted({max(1, min(round(num_layers * share), num_layers - 1)) for share in shares}))


def _resolved(loaded: Decoder, config: SweepConfig) -> SweepConfig:
    """The config with its defaults filled in."""
    num_layers = loaded.backend.num_layers
    exits = config.exits or default_exits(num_layers)
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, field="exits")
    return replace(config, exits=exits, timed=default_timed(config))


def _settings(config: SweepConfig) -> tuple[DecodingConfig, list[DecodingConfig]]:
    """Autoregressive decoding, and the settings compared with it: each exit alone, then each exit with each draft length."""
    generation = config.generation
    alone = [generation.decoding("early-exit", exit_layer) for exit_layer in config.exits]
    drafting = [
        generation.decoding("self-speculative", exit_layer, drafts)
        for exit_layer, drafts in product(config.exits, config.specs)
    ]
    return generation.decoding("autoregressive"), alone + drafting


def _promising(settings: Sequence[DecodingConfig], predictions: Predictions) -> list[DecodingConfig]:
    """The settings with the best predicted speedup, and their exits alone."""
    best = predictions.promising(_QUICK)
    exits = {exit_layer for exit_layer, _ in best}
    return [
        setting
        for setting in settings
        if ((setting.exit_layer, setting.num_draft_tokens) in best if drafts_tokens(setting) else setting.exit_layer in exits)
    ]


def _unmeasured(setting: DecodingConfig) -> ExitResult:
    drafts = setting.num_draft_tokens if drafts_tokens(setting) else None
    return ExitResult(setting.strategy, setting.exit_layer, drafts, {}, None, None, None, None, None, None)


def _with_predictions(result: ExitResult, losses: ReferenceLosses, num_layers: int, predictions: Predictions) -> ExitResult:
    """Adds what is known without decoding by the setting: an exit's perplexity and agreement, or a predicted speedup."""
    if result.strategy != "self-speculative":
        agreement = predictions.agreement[result.exit_layer] if result.exit_layer else None
        return replace(result, perplexity=losses.perplexity(result.exit_layer or num_layers), agreement=agreement)
    assert result.exit_layer is not None and result.num_draft_tokens is not None
    prediction = predictions.settings.get((result.exit_layer, result.num_draft_tokens))
    if prediction is None:
        return result
    return replace(
        result,
        predicted_speedup=prediction.speedup,
        predicted_tokens_per_second=finite(prediction.tokens_per_second),
        predicted_acceptance_rate=prediction.rounds.acceptance_rate,
        pass_times_ms={name: 1000 * seconds for name, seconds in asdict(prediction.times).items()},
    )
