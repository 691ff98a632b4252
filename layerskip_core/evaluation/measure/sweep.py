"""Exits and drafters with several draft lengths on one task: quality, speed, and which setting to
decode with.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, decoding
from ...config.evaluation import SweepConfig
from ...config.model import Quantization
from ...config.resolution import default_exits, require_exit_layer, resolve_as, spread_exits
from ...data import spread
from ...errors import require
from ...processor import OtherLoad
from ..metrics import Scores, frontier, metric, scores_by_exit
from ..results import NEAR_TIE, Result, RunRecord
from ..tasks import Task
from . import Measured, Progress, depth_of, drafts_tokens, measure, measure_prompt
from .cost_model import Prediction, draft_profile, predict, side_of
from .figures import Contest, contest, environment, finalists, margins, recommend, result_of

_LENGTHS = (2, 4, 6, 8, 12, 16, 24, 32)  # draft lengths to predict if none are given
_UNPREDICTED = (4, 8, 16)  # draft lengths to measure of drafters without predictions
_BEST = 12  # how many of the best predicted settings are measured
_CONFIDENCES = (0.8, 0.9, 0.95)
_ONCE_MORE = 0.25  # time of the contest, as a share of the sweep's time before it
_OTHERS = 256  # prompts of the contest, at most


def sweep(loaded: Decoder, task: Task, config: SweepConfig) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record with a recommendation. Raises ConfigError, and
    LayerSkipError without answers.
    """
    started, (task, generation) = time.perf_counter(), task.asked(config.generation)
    # Copies for adaptive drafting
    made = tuple(weights for weights in loaded.backend.draft_sides if weights is not None)
    copies = config.packing.draft_weights or (() if config.exits else made)
    config = replace(
        _resolved(loaded, task, config, copies), task=task.config, generation=generation
    )
    loaded, layers, name = task.prepared(loaded), loaded.backend.num_layers, task.quality_metric
    machine = environment(loaded)
    losses = []
    load = OtherLoad()
    for number, new in enumerate(task.losses(loaded, sorted({*config.exits, layers})), start=1):
        losses.append(new)
        yield Progress(min(number, len(task.examples)), len(task.examples), "perplexity")
    perplexity = scores_by_exit(losses)
    plain = decoding("autoregressive", generation)
    settings = _settings(loaded, config, copies)
    predictable = [setting for setting in settings if setting.strategy == "self-speculative"]
    timed = spread(task.examples, config.timed or 0)
    predictions, by_side, context = yield from predict(loaded, timed, predictable, plain)
    agreement = {
        each: by_side.get(side_of(each))
        for each in settings
        if each.strategy == "early-exit" or each.draft_weights
    }
    if not config.specs:
        settings = _with_best_lengths(settings, predictions)
    settings = [plain, *settings]
    measured = yield from measure(loaded, task, settings, config, perplexity=perplexity)
    results = _results(measured, perplexity, predictions, agreement, layers)
    optimal = frontier(results, name)
    results = [replace(result, pareto=place in optimal) for place, result in enumerate(results)]
    near_tie = NEAR_TIE[loaded.backend.dtype]
    again = None
    if places := finalists(results, near_tie, margins(results, measured, name, config.keep)):
        again = yield from _once_more(
            loaded, task, settings, places, _ONCE_MORE * (time.perf_counter() - started)
        )
    machine["busy_cores"] = load.busy_cores()
    named = asdict(config) | {"quality_metric": name, "prompt_template": loaded.template.name}
    advice = recommend(results, near_tie, name, config, measured, again)
    profile = draft_profile(loaded, results, config.packing, context)
    answered = task.answered([each.texts for each in measured])
    yield RunRecord(named, machine, tuple(results), advice, profile, answered)


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
        steps = measure_prompt(loaded, rows[row].prompt, settings[place]).steps
        return sum(step.seconds for step in steps), sum(step.tokens for step in steps)

    noun = "prompt" if rows[0] in task.examples else "other prompt"
    return (yield from contest(places, len(rows), timed, seconds, noun))


def _resolved(
    loaded: Decoder, task: Task, config: SweepConfig, copies: Sequence[Quantization]
) -> SweepConfig:
    """Fills in default exits (with low-bit copies only trained ones, except for a task on text) and
    confidences.
    """
    num_layers = loaded.backend.num_layers
    known = loaded.recommended()
    confidences = config.exit_confidences
    if task.text is not None:
        require(
            not confidences,
            "exit_confidences",
            "left out for `task` lm, which goes through one exit",
            "some",
        )
    elif confidences is None and known.exits and config.batch_size == 1:
        confidences = _CONFIDENCES
    worthwhile = (
        not copies
        or bool(known.exits)
        or known.strategy == "self-speculative"
        or task.text is not None
    )
    exits = config.exits or (usual_exits(loaded) if worthwhile else ())
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, bool(copies), field="exits")
    # Copies also draft at full depth, unless exits were given.
    drafting = config.exits or tuple(sorted({*exits, *((num_layers,) if copies else ())}))
    return replace(config, exits=drafting, exit_confidences=confidences or ())


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
    num_layers = loaded.backend.num_layers
    exits = [exit_layer for exit_layer in config.exits if exit_layer < num_layers]
    settings = [decoding("early-exit", generation, exit_layer=exit_layer) for exit_layer in exits]
    chosen = spread_exits(loaded.recommended().exits or tuple(exits), num_layers)
    for confidence in config.exit_confidences or () if chosen else ():
        settings.append(
            decoding("early-exit", generation, exit_confidence=confidence, exits=chosen)
        )
    for weights in dict.fromkeys((None, *copies)):
        settings += [
            decoding(
                "self-speculative",
                generation,
                exit_layer=layer,
                num_draft_tokens=drafts,
                draft_weights=weights,
            )
            for layer, drafts in product(
                exits if weights is None else config.exits, config.specs or _LENGTHS
            )
        ]
    known = loaded.recommended(config.packing)
    unpredicted = [decoding("lookup", generation)]
    unpredicted += [decoding(name, generation) for name in loaded.backend.drafters]
    if generation.get("skip"):
        unpredicted.append(
            resolve_as("draft-and-verify", generation, known, num_layers, config.packing)
        )
    lengths = config.specs or _UNPREDICTED
    settings += [
        replace(setting, num_draft_tokens=drafts)
        for setting, drafts in product(unpredicted, lengths)
    ]
    return [*settings, resolve_as("adaptive", generation, known, num_layers, config.packing)]


def _with_best_lengths(
    settings: Sequence[DecodingConfig], predictions: Mapping[DecodingConfig, Prediction]
) -> list[DecodingConfig]:
    """The settings with the best predictions, overall and per drafter, and all settings without a
    prediction.
    """
    ranked = sorted(predictions, key=lambda setting: -predictions[setting].speedup)
    of_drafters = {side_of(setting): setting for setting in reversed(ranked)}
    kept = {*ranked[:_BEST], *of_drafters.values()}
    return [setting for setting in settings if setting in kept or setting not in predictions]


def _results(
    measured: Sequence[Measured],
    perplexity: Mapping[int, Scores],
    predictions: Mapping[DecodingConfig, Prediction],
    agreement: Mapping[DecodingConfig, float | None],
    num_layers: int,
) -> list[Result]:
    """The figures of each setting, measured and predicted; full depth first."""
    results = list[Result]()
    for each in measured:
        setting = each.setting
        result = result_of(each, measured[0])
        losses = (
            None if drafts_tokens(setting) else perplexity.get(depth_of(setting, num_layers) or 0)
        )
        result = replace(
            result,
            agreement=agreement.get(setting),
            perplexity=None if losses is None else metric(losses).value,
        )
        if (prediction := predictions.get(setting)) is not None:
            times = {
                name: 1000 * part
                for name, part in prediction.times._asdict().items()
                if name != "length"
            }
            result = replace(result, predicted_speedup=prediction.speedup, pass_times_ms=times)
        results.append(result)
    return results
