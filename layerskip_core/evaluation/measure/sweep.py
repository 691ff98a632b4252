"""Every exit and drafter with every draft length on one task: quality, speed, and which setting to decode with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product

from ...checkpoint.loaded import Decoder
from ...config.checks import require, require_exit_layer, require_skip
from ...config.decoding import DecodingConfig, DecodingOptions, decoding, default_exits, resolve_as, spread_exits
from ...config.evaluation import SweepConfig
from ...config.packing import Quantization
from ..bootstrap import Margin, margin
from ..outputs import finite
from ..perplexity import ReferenceLosses
from ..results import Result, RunRecord
from ..tasks.task import Task
from .cost_model import Predictions, predict, side_of
from .measure import NEAR_TIE, Measured, Part, environment, measure, result_of, scored, setting_of
from .pass_times import draft_profile
from .recommendation import baseline_drift, mark_pareto, prediction_error, recommend
from .runs import Progress, default_timed, timed_examples
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
    autoregressive, settings = decoding("autoregressive", config.generation), _settings(loaded, config)
    if searched is not None:
        settings.append(skipping := _skipping(config, searched.choice))
    predictable = [setting for setting in settings if setting.strategy == "self-speculative"]
    predictions = yield from predict(loaded, examples, predictable, autoregressive.max_new_tokens, task.stop)
    if searched is not None:
        predictions = replace(predictions, settings=predictions.settings | {skipping: searched.prediction})
    chosen = _promising(settings, predictions) if config.quick else settings
    # The baseline runs twice, first and in the middle. The others are compared with both; their difference shows the noise.
    half = len(chosen) // 2
    methods = [autoregressive, *chosen[:half], autoregressive, *chosen[half:]]
    measured = yield from measure([Part(loaded, task.examples)], methods, config.batch_size, config.timed)
    plain, *others = scored(task, measured, losses, loaded.backend.num_layers)
    again = others.pop(half)
    by_setting: dict[DecodingConfig, Measured] = dict(zip(chosen, others, strict=True))
    rows = [by_setting.get(setting) for setting in settings]
    (first,), (second,) = plain.times, again.times
    base = [(first[0] + second[0], first[1] + second[1])]
    compared = (plain, None, task.answers_per_prompt, base)
    full = result_of(plain, *compared)
    intervals = {name: ends for name, ends in full.intervals.items() if not name.endswith("speedup")}  # they are the unit
    full = replace(full, speedup=1.0, decode_speedup=1.0, tokens_per_second=1 / base[0][0].seconds_per_token)
    results = [replace(full, intervals=intervals, perplexity=losses.perplexity(loaded.backend.num_layers))]
    for setting, row in zip(settings, rows, strict=True):
        result = setting_of(setting) if row is None else result_of(row, *compared)
        results.append(_with_predictions(result, setting, losses, predictions))
    if searched is not None:
        results[-1] = replace(results[-1], agreement=searched.agreement)
    metric = task.quality_metric
    marked = mark_pareto(results, metric)
    times = [base[0][0], *(None if row is None else row.times[0][0] for row in rows)]
    times = [each and each.by_prompt(task.answers_per_prompt) for each in times]
    margins = [None, *(_margin(row, plain, metric, config.keep) for row in rows)]
    drift = baseline_drift(plain.repeats[0], again.repeats[0])
    advice = recommend(marked, NEAR_TIE[loaded.backend.dtype], drift, metric, config, times, margins)
    resolved = asdict(config) | {"quality_metric": metric, "prompt_template": loaded.template.name}
    profile = draft_profile(loaded, marked, config.packing, predictions.context)
    answered = task.answered([plain.answers, *(None if row is None else row.answers for row in rows)])
    yield RunRecord(resolved, machine, tuple(marked), advice, prediction_error(marked), profile, answered)


def _margin(row: Measured | None, plain: Measured, metric: str, keep: float) -> Margin | None:
    """By how much an early exit keeps its share of full depth's quality; None where that was not measured."""
    if row is None or row.method.strategy != "early-exit" or metric not in row.scores or metric not in plain.scores:
        return None
    return margin(row.scores[metric], plain.scores[metric], keep, metric)


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
    settings = [
        decoding("early-exit", generation, exit_layer=exit_layer) for exit_layer in exits if exit_layer not in only_drafting
    ]
    candidates = [exit_layer for exit_layer in loaded.recommended().exits or exits if exit_layer not in only_drafting]
    chosen = spread_exits(tuple(candidates), num_layers)
    for confidence in config.exit_confidences or () if chosen else ():
        settings.append(decoding("early-exit", generation, exit_confidence=confidence, exits=chosen))
    for weights in dict.fromkeys((None, *config.packing.draft_weights)):
        layers = exits if weights is None else config.exits
        settings += [
            decoding(
                "self-speculative",
                generation,
                exit_layer=exit_layer,
                num_draft_tokens=drafts,
                draft_weights=weights,
            )
            for exit_layer, drafts in product(layers, config.specs)
        ]
    settings += [decoding("lookup", generation, num_draft_tokens=drafts) for drafts in config.specs]
    if skip := generation.get("skip"):
        require_skip(skip, num_layers)
        settings += [_skipping(config, {"skip": skip, "num_draft_tokens": drafts}) for drafts in config.specs]
    known = loaded.recommended(config.packing)
    return [*settings, resolve_as("adaptive", generation, known, num_layers, config.packing)]


def _weights(config: SweepConfig) -> Quantization | None:
    """Those that draft where a single copy does."""
    return config.packing.draft_weights[0] if config.packing.draft_weights else None


def _skipping(config: SweepConfig, choice: DecodingOptions) -> DecodingConfig:
    return decoding("draft-and-verify", {**config.generation, **choice}, draft_weights=_weights(config))


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
