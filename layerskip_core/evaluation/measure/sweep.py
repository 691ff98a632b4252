"""Every exit and drafter with every draft length on one task: quality, speed, and which setting to decode with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product

from ...checkpoint.loaded import Decoder
from ...config.checks import require, require_exit_layer, require_skip
from ...config.decoding import DecodingConfig, DecodingSettings, default_exits, spread_exits
from ...config.evaluation import SweepConfig
from ...config.packing import Quantization
from ..bootstrap import Margin, answer_bounds, change_bounds, margin, metric_bounds, ratio_bounds
from ..metrics import Scores
from ..outputs import Outputs, Times, finite
from ..perplexity import ReferenceLosses
from ..results import Bounds, Difference, Result, RunRecord
from ..tasks.task import Task
from .comparison import NEAR_TIE, differences
from .cost_model import Predictions, predict, side_of
from .environment import environment
from .pass_times import draft_profile
from .recommendation import baseline_drift, mark_pareto, prediction_error, recommend
from .runs import (
    Progress,
    answer_in_batches,
    default_timed,
    drafts_tokens,
    exit_and_drafts,
    measure_interleaved,
    timed_examples,
)
from .skip_search import search_skips

_QUICK = 3  # settings that a quick sweep measures
_CONFIDENCES = (0.8, 0.9, 0.95)


def sweep(loaded: Decoder, task: Task, config: SweepConfig) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record with a recommendation.

    Raises:
        ConfigError: an exit is outside the model.
        LayerSkipError: no prompt could be answered.
    """
    task, generation = task.asked(config.generation)
    if config.exit_confidences is None:
        several = bool(loaded.recommended().exits) and config.batch_size == 1 and not config.quick and task.text is None
        config = replace(config, exit_confidences=_CONFIDENCES if several else ())
    elif task.text is not None:
        require(not config.exit_confidences, "exit_confidences", "left out for `task` lm, which goes through one exit", "some")
    config = replace(_resolved(loaded, config), task=task.config, generation=generation)
    loaded = task.prepared(loaded)
    machine = environment(loaded)
    losses = ReferenceLosses()
    layers = sorted({*config.exits, loaded.backend.num_layers})
    for number, new in enumerate(task.losses(loaded, layers), start=1):
        losses = losses + new
        yield Progress(min(number, len(task.examples)), len(task.examples), "perplexity")
    searched = (yield from search_skips(loaded, task, generation, _weights(config))) if config.search_skips else None
    examples = timed_examples(task.examples, config.timed)
    autoregressive, settings = config.generation.decoding("autoregressive"), _settings(loaded, config)
    if searched is not None:
        settings.append(skipping := _skipping(config, searched.choice.layers, searched.choice.num_draft_tokens))
    predictable = [setting for setting in settings if setting.strategy == "self-speculative"]
    predictions = yield from predict(loaded, examples, predictable, autoregressive.max_new_tokens, task.stop)
    if searched is not None:
        predictions = replace(predictions, settings=predictions.settings | {skipping: searched.prediction})
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
    baseline = first.times + second.times
    full = losses.perplexity(loaded.backend.num_layers)
    expected, *answers = batched or [first, *timed]
    task = task.referring_to(expected.answers)
    expected_scores = task.score(expected.texts, losses.scores(loaded.backend.num_layers))
    compared = (baseline, expected, expected_scores, task.answers_per_prompt)
    plain = exit_result(autoregressive, first, expected, expected_scores, compared)
    both = replace(plain, tokens_per_second=1 / baseline.seconds_per_token, speedup=1.0)
    results = [replace(both, intervals=_without(both.intervals, "speedup"))]  # its speed is the unit
    margins: list[Margin | None] = [None]
    by_setting = dict(zip(chosen, zip(timed, answers, strict=True), strict=True))
    for setting in settings:
        if setting not in by_setting:
            results.append(unmeasured(setting))
            margins.append(None)
            continue
        outputs, answers_of = by_setting[setting]
        drafts = drafts_tokens(setting)
        comparable = drafts and not setting.sampling.temperature
        differing = differences(loaded, task.examples, answers_of, expected) if comparable else ()
        depth = setting.exit_layer if setting.strategy == "early-exit" else None
        scores = task.score(answers_of.texts, losses.scores(depth or loaded.backend.num_layers))
        results.append(exit_result(setting, outputs, answers_of, scores, compared, differing))
        metric = task.quality_metric
        comparable = setting.strategy == "early-exit" and metric in scores and metric in expected_scores
        margins.append(margin(scores[metric], expected_scores[metric], config.keep, metric) if comparable else None)
    results[0] = replace(results[0], perplexity=full)
    results[1:] = [
        _with_predictions(result, setting, losses, predictions) for result, setting in zip(results[1:], settings, strict=True)
    ]
    if searched is not None:
        results[-1] = replace(results[-1], agreement=searched.agreement)
    marked = mark_pareto(results, task.quality_metric)
    drift = baseline_drift(first, second)
    times = [by_setting[setting][0].times if setting in by_setting else None for setting in settings]
    advice = recommend(marked, NEAR_TIE[loaded.backend.dtype], drift, task.quality_metric, config, [baseline, *times], margins)
    resolved = asdict(config) | {"quality_metric": task.quality_metric, "prompt_template": loaded.template.name}
    profile = draft_profile(loaded, marked, config.packing, predictions.context)
    answered = task.answered([expected, *(by_setting[setting][1] if setting in by_setting else None for setting in settings)])
    yield RunRecord(resolved, machine, tuple(marked), advice, prediction_error(marked), profile, answered)


def exit_result(
    setting: DecodingConfig,
    outputs: Outputs,
    answers: Outputs,
    scores: Mapping[str, Scores],
    compared: tuple[Times, Outputs, Mapping[str, Scores], int],
    differing: tuple[Difference, ...] = (),
) -> Result:
    """The figures of one setting: speed from its timed outputs, all else from its answers and the autoregressive ones.

    `compared`: the autoregressive times, answers and scores, and how many answers each prompt got.
    """
    autoregressive, expected, expected_scores, per_prompt = compared
    drafts, times = drafts_tokens(setting), outputs.times
    bounds = {"speedup": ratio_bounds([autoregressive], [times], per_prompt)}
    bounds |= answer_bounds(answers, expected, drafts, per_prompt) | metric_bounds(scores)
    return replace(
        unmeasured(setting),
        metrics={name: each.mean for name, each in scores.items()},
        acceptance_rate=answers.stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=answers.stats.mean_accepted_tokens if drafts else None,
        tokens_per_second=finite(1 / times.seconds_per_token),
        speedup=finite(autoregressive.seconds_per_token / times.seconds_per_token),
        identical_outputs=answers.identical_outputs(expected),
        acceptance_by_position=answers.acceptance_by_position if drafts else None,
        time_split_ms=outputs.time_split_ms,
        differences=differing,
        failures=answers.failures,
        steps_by_drafter=answers.stats.steps_by_drafter,
        mean_layers=answers.stats.mean_layers if setting.exit_confidence else None,
        intervals={name: ends for name, ends in bounds.items() if ends is not None},
        changes=change_bounds(scores, expected_scores),
    )


def _without(bounds: Mapping[str, Bounds], name: str) -> dict[str, Bounds]:
    return {other: ends for other, ends in bounds.items() if other != name}


def _resolved(loaded: Decoder, config: SweepConfig) -> SweepConfig:
    """The config with its defaults filled in.

    Low-bit copies draft with all layers, so that the exits of a model are left out if they were not trained.
    """
    num_layers, copies = loaded.backend.num_layers, bool(config.packing.draft_weights)
    known = loaded.recommended()
    worthwhile = not copies or bool(known.exits) or known.strategy == "self-speculative"
    usual = tuple(loaded.backend.exit_blocks) or default_exits(num_layers)
    exits = config.exits or (usual if worthwhile else ())
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, copies, field="exits")
    # All layers of the copies too, unless the exits were given.
    drafting = config.exits or tuple(sorted({*exits, *((num_layers,) if copies else ())}))
    return replace(config, exits=drafting, timed=default_timed(config))


def _settings(loaded: Decoder, config: SweepConfig) -> list[DecodingConfig]:
    """What is compared with autoregressive decoding: each exit alone, exits by confidence, each drafter with each draft length.

    Exits are chosen by confidence among those that were trained, as `generate` does, else among those of the sweep.
    """
    generation, num_layers = config.generation, loaded.backend.num_layers
    exits = [exit_layer for exit_layer in config.exits if exit_layer < num_layers]
    only_drafting = {exit_layer for exit_layer, block in loaded.backend.exit_blocks.items() if not block.stands_alone}
    settings = [generation.decoding("early-exit", exit_layer) for exit_layer in exits if exit_layer not in only_drafting]
    candidates = [exit_layer for exit_layer in loaded.recommended().exits or exits if exit_layer not in only_drafting]
    chosen = spread_exits(tuple(candidates), num_layers)
    for confidence in config.exit_confidences or () if chosen else ():
        settings.append(replace(generation, exit_confidence=confidence).decoding("early-exit", exits=chosen))
    for weights in dict.fromkeys((None, *config.packing.draft_weights)):
        layers = exits if weights is None else config.exits
        settings += [
            generation.decoding("self-speculative", exit_layer, drafts, draft_weights=weights)
            for exit_layer, drafts in product(layers, config.specs)
        ]
    settings += [generation.decoding("lookup", None, drafts) for drafts in config.specs]
    if generation.skip:
        require_skip(generation.skip, num_layers)
        settings += [_skipping(config, generation.skip, drafts) for drafts in config.specs]
    asked = DecodingSettings("adaptive", generation=generation)
    return [*settings, asked.resolve_as("adaptive", loaded.recommended(config.packing), num_layers, config.packing)]


def _weights(config: SweepConfig) -> Quantization | None:
    """Those that draft where a single copy does."""
    return config.packing.draft_weights[0] if config.packing.draft_weights else None


def _skipping(config: SweepConfig, skip: tuple[int, ...], drafts: int) -> DecodingConfig:
    generation = replace(config.generation, skip=skip)
    return generation.decoding("draft-and-verify", None, drafts, draft_weights=_weights(config))


def _promising(settings: Sequence[DecodingConfig], predictions: Predictions) -> list[DecodingConfig]:
    """The settings with the best predicted speedup, their exits alone, and one of each drafter without predictions."""
    best = predictions.promising(_QUICK)
    exits = {setting.exit_layer for setting in best if setting.draft_weights is None}
    lookups = [setting for setting in settings if setting.strategy == "lookup"]
    others = (setting for setting in settings if setting.strategy in ("adaptive", "draft-and-verify"))
    unpredicted = [lookups[len(lookups) // 2], *others]
    return [
        setting
        for setting in settings
        if setting in best
        or setting in unpredicted
        or setting.exit_confidence
        or (setting.strategy == "early-exit" and setting.exit_layer in exits)
    ]


def unmeasured(setting: DecodingConfig) -> Result:
    """A setting without any figure."""
    exit_layer, drafts = exit_and_drafts(setting)
    confidence = setting.exit_confidence or None
    exits, weights = setting.exits if confidence else (), setting.draft_weights
    return Result(
        setting.strategy, exit_layer, drafts, draft_weights=weights, exit_confidence=confidence, exits=exits, skip=setting.skip
    )


def _with_predictions(result: Result, setting: DecodingConfig, losses: ReferenceLosses, predictions: Predictions) -> Result:
    """Adds what is known without decoding by the setting: perplexity and agreement of an exit, and a predicted speedup."""
    if setting.strategy == "early-exit" and setting.exit_layer is not None:
        perplexity, agreement = losses.perplexity(setting.exit_layer), predictions.agreement[side_of(setting)]
        return replace(result, perplexity=perplexity, agreement=agreement)
    prediction = predictions.settings.get(setting)
    if prediction is None:
        return result
    return replace(
        result,
        agreement=predictions.agreement[side_of(setting)] if setting.draft_weights and setting.exit_layer else None,
        predicted_speedup=prediction.speedup,
        predicted_tokens_per_second=finite(prediction.tokens_per_second),
        predicted_acceptance_rate=prediction.rounds.acceptance_rate,
        pass_times_ms={name: 1000 * seconds for name, seconds in asdict(prediction.times).items()},
    )
