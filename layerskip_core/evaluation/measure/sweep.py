"""Exits and drafters with several draft lengths on one task: quality, speed, and which setting to
decode with.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig, decoding
from ...config.evaluation import SweepConfig
from ...config.model import Quantization
from ...config.resolution import default_exits, require_exit_layer, resolve_as, spread_exits
from ...data import spread
from ...errors import require
from ...processor import OtherLoad
from ..intervals import metric
from ..metrics import Scores, frontier, scores_by_exit
from ..results import NEAR_TIE, Result, RunRecord
from ..tasks.task import Task
from .bench import suiting_strategies
from .draft_profile import draft_profile
from .figures import environment, result_of
from .measuring import Measured, Progress, depth_of, drafts_tokens, measure, measure_prompt
from .passes import draft_layers
from .prediction import Predictions, predict
from .recommendation import Contest, contest, finalists, margins, recommend

_PREDICTED = "self-speculative"  # whose draft lengths are chosen by prediction
_BEST = 12  # how many of the best predicted settings are measured
_CONFIDENCES = (0.8, 0.9, 0.95)
_ONCE_MORE = 0.25  # time of the contest, as a share of the sweep's time before it
_OTHERS = 256  # prompts of the contest, at most


def sweep(loaded: Decoder, task: Task, config: SweepConfig) -> Generator[Progress, None, RunRecord]:
    """Yields progress, returns the record with a recommendation. Raises ConfigError, and
    LayerSkipError without answers.
    """
    started = time.perf_counter()
    task, generation = task.asked(config.generation)
    copies = config.packing.draft_weights
    if not copies and not config.exits:
        # Those that were made for adaptive drafting
        copies = tuple(weights for weights in loaded.backend.draft_sides if weights is not None)
    config = _resolved(loaded, task, config, copies)
    config = replace(config, task=task.config, generation=generation)
    loaded = task.prepared(loaded)
    layers = loaded.backend.num_layers
    name = task.quality_metric
    near_tie = NEAR_TIE[loaded.backend.dtype]
    machine = environment(loaded)
    load = OtherLoad()

    losses = []
    for new in task.losses(loaded, sorted({*config.exits, layers})):
        losses.append(new)
        count = len(task.examples)
        yield Progress(min(len(losses), count), count, "perplexity")
    perplexity = scores_by_exit(losses)
    plain = decoding("autoregressive", generation)
    settings = _settings(loaded, config, copies)
    predictable = [setting for setting in settings if setting.strategy == _PREDICTED]
    timed = spread(task.examples, config.timed or 0)
    predictions = yield from predict(loaded, timed, predictable, plain)
    if not config.specs:
        settings = _with_best_lengths(settings, predictions)
    settings = [plain, *settings]
    measured = yield from measure(loaded, task, settings, config, perplexity=perplexity)
    results = _results(measured, perplexity, predictions, layers)
    for place in frontier(results, name):
        results[place] = replace(results[place], pareto=True)
    outcome = None
    places = finalists(results, near_tie, margins(results, measured, name, config.keep))
    if places:
        seconds = _ONCE_MORE * (time.perf_counter() - started)
        outcome = yield from _once_more(loaded, task, settings, places, seconds)

    machine["busy_cores"] = load.busy_cores()
    named = asdict(config) | {"quality_metric": name, "prompt_template": loaded.template.name}
    advice = recommend(results, near_tie, name, config, measured, outcome)
    profile = draft_profile(loaded, results, config.packing, predictions.context)
    answered = task.answered([each.texts for each in measured], [each.scores for each in measured])
    return RunRecord(named, machine, tuple(results), advice, profile, answered)


def _once_more(
    loaded: Decoder,
    task: Task,
    settings: Sequence[DecodingConfig],
    places: Sequence[int],
    seconds: float,
) -> Generator[Progress, None, Contest]:
    """Times the settings at these places on rows that were not measured, or on measured ones if
    there are no others.
    """
    rows = spread(task.examples, _OTHERS) if task.others is None else task.others(_OTHERS)

    def timed(row: int, place: int) -> tuple[float, int]:
        output = measure_prompt(loaded, rows[row].prompt, settings[place])
        return output.seconds, output.tokens

    noun = "prompt" if rows[0] in task.examples else "other prompt"
    return (yield from contest(places, len(rows), timed, seconds, noun))


def _resolved(
    loaded: Decoder, task: Task, config: SweepConfig, copies: Sequence[Quantization]
) -> SweepConfig:
    """Fills in default exits (with low-bit copies only trained ones, except for a task on text) and
    confidences.
    """
    layers = loaded.backend.num_layers
    known = loaded.recommended()
    confidences = config.exit_confidences
    if task.text is not None:
        needed = "left out for `task` lm, which goes through one exit"
        require(not confidences, "exit_confidences", needed, "some")
    elif confidences is None and known.exits and config.batch_size == 1:
        confidences = _CONFIDENCES
    exits = config.exits
    are_trained = bool(known.exits) or known.strategy == "self-speculative"
    if not exits and (are_trained or not copies or task.text is not None):
        exits = usual_exits(loaded)
    for exit_layer in exits:
        require_exit_layer(exit_layer, layers, bool(copies), field="exits")
    if not config.exits:
        full_depth = {layers} if copies else set()  # copies also draft there
        exits = tuple(sorted({*exits} | full_depth))
    return replace(config, exits=exits, exit_confidences=confidences or ())


def usual_exits(loaded: Decoder) -> tuple[int, ...]:
    """The exits with a block, else the trained ones (at most six), else `default_exits`."""
    layers = loaded.backend.num_layers
    trained = tuple(loaded.backend.exit_blocks) or spread_exits(loaded.info.trained_exits, layers)
    return trained or default_exits(layers)


def _settings(
    loaded: Decoder, config: SweepConfig, copies: Sequence[Quantization]
) -> list[DecodingConfig]:
    """Settings to compare: exits alone, exits by confidence (trained ones, else the sweep's),
    drafters by draft length.
    """
    generation = config.generation
    layers = loaded.backend.num_layers
    exits = [exit_layer for exit_layer in config.exits if exit_layer < layers]
    settings = [decoding("early-exit", generation, exit_layer=exit_layer) for exit_layer in exits]

    by_confidence = spread_exits(loaded.recommended().exits or tuple(exits), layers)
    if by_confidence:
        for confidence in config.exit_confidences or ():
            settings.append(
                decoding("early-exit", generation, exit_confidence=confidence, exits=by_confidence)
            )

    def drafting(weights: Quantization | None, exit_layers: Sequence[int]) -> None:
        for exit_layer in exit_layers:
            for drafts in config.specs or STRATEGIES[_PREDICTED].lengths:
                settings.append(
                    decoding(
                        _PREDICTED,
                        generation,
                        exit_layer=exit_layer,
                        num_draft_tokens=drafts,
                        draft_weights=weights,
                    )
                )

    drafting(None, exits)
    for weights in dict.fromkeys(copies):
        drafting(weights, config.exits)  # also at full depth

    known = loaded.recommended(config.packing)
    suiting = suiting_strategies(loaded, config)
    for name, strategy in STRATEGIES.items():
        if name in suiting and name != _PREDICTED and strategy.lengths:
            setting = resolve_as(name, generation, known, layers, config.packing)
            for drafts in config.specs or strategy.lengths:
                settings.append(replace(setting, num_draft_tokens=drafts))
    settings.append(resolve_as("adaptive", generation, known, layers, config.packing))
    return settings


def _with_best_lengths(
    settings: Sequence[DecodingConfig], predictions: Predictions
) -> list[DecodingConfig]:
    """The settings with the best predictions, overall and per drafter, and all settings without a
    prediction.
    """
    speedups = predictions.speedups
    ranked = sorted(speedups, key=lambda setting: -speedups[setting])
    kept = set(ranked[:_BEST])
    drafters = set()
    for setting in ranked:
        if draft_layers(setting) not in drafters:  # the best of a drafter
            drafters.add(draft_layers(setting))
            kept.add(setting)
    return [setting for setting in settings if setting in kept or setting not in speedups]


def _results(
    measured: Sequence[Measured],
    perplexity: Mapping[int, Scores],
    predictions: Predictions,
    num_layers: int,
) -> list[Result]:
    """The figures of each setting, measured and predicted; full depth first."""
    results = list[Result]()
    for each in measured:
        setting = each.setting
        result = result_of(each, measured[0])
        if setting.strategy == "early-exit" or setting.draft_weights:
            result = replace(result, agreement=predictions.agreement.get(draft_layers(setting)))
        losses = perplexity.get(depth_of(setting, num_layers) or 0)
        if losses is not None and not drafts_tokens(setting):
            result = replace(result, perplexity=metric(losses).value)
        if setting in predictions.speedups:
            times = predictions.times[setting].milliseconds
            result = replace(
                result, predicted_speedup=predictions.speedups[setting], pass_times_ms=times
            )
        results.append(result)
    return results
