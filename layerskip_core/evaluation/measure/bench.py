"""The decoding strategies and baselines side by side: the same prompts, in one process, interleaved."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from ...checkpoint.loaded import Decoder
from ...config.decoding import DRAFTERS, DecodingConfig, DecodingSettings, ExitChoice, SkipChoice
from ...config.evaluation import BenchConfig
from ...config.packing import PackingConfig
from ..bootstrap import answer_bounds, change_bounds, metric_bounds, ratio_bounds
from ..metrics import Scores
from ..outputs import Outputs, Times, finite
from ..perplexity import ReferenceLosses
from ..results import Difference, Result, RunRecord
from ..tasks.task import Task
from .baselines import load_baselines
from .comparison import differences
from .environment import environment
from .journal import FOUND_SKIP, Journal, found_skip
from .llama_cpp import NAME as LLAMA_CPP
from .llama_cpp import describe_build
from .runs import (
    Method,
    Progress,
    answer_in_batches,
    default_timed,
    drafts_tokens,
    exit_and_drafts,
    measure_interleaved,
    timed_examples,
)
from .skip_search import search_skips


def bench(
    loaded: Decoder,
    task: Task,
    config: BenchConfig,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record. With a `folder` every measured prompt is written to its journal, for `resume`.

    With a batch size above 1, all prompts are answered in batches for quality, and `timed` of them are timed one by one.

    Raises:
        ConfigError: the exit is outside the model, or a baseline cannot run this model.
        CheckpointError: a baseline's model cannot be read.
        LayerSkipError: no prompt could be answered, or the journal to resume belongs to other settings.
    """
    task, generation = task.asked(config.generation)
    asked = DecodingSettings(None, config.exit_layer, config.num_draft_tokens, generation)
    loaded, recommended = task.prepared(loaded), loaded.recommended(config.packing)
    searched: SkipChoice | None = None
    if must_search(loaded, config):
        searched = found_skip(folder) if folder is not None and resume else None
        if searched is None:
            weights = config.packing.draft_weights
            searched = (yield from search_skips(loaded, task, generation, weights[0] if weights else None)).choice
        recommended = replace(recommended, skip=searched)
    strategies = strategies_of(loaded, config, asked, recommended)
    speculative = asked.resolve_as("self-speculative", recommended, loaded.backend.num_layers, config.packing)
    config = replace(
        config,
        task=task.config,
        generation=generation,
        exit_layer=speculative.exit_layer,
        num_draft_tokens=speculative.num_draft_tokens,
        timed=default_timed(config),
    )
    sampled = generation.sampling.temperature > 0
    methods: list[Method] = [*strategies, *load_baselines(loaded, config, speculative)]
    machine = environment(loaded) | ({"llama_cpp": describe_build()} if LLAMA_CPP in config.baselines else {})
    asked_of = [*((example.prompt, example.completion) for example in task.examples), task.text]
    rows = hashlib.sha256(json.dumps(asked_of).encode()).hexdigest()
    settings = asdict(config) | ({FOUND_SKIP: asdict(searched)} if searched else {}) | {"rows": rows}
    journal = Journal(folder, settings, resume) if folder is not None else None
    losses = ReferenceLosses()
    if task.text is not None:
        losses = sum(task.losses(loaded, [_target_layers(strategy, loaded) for strategy in strategies]), losses)
    batched = None
    if config.batch_size > 1:
        batched = yield from answer_in_batches(loaded, task.examples, methods, config.batch_size, journal)
    outputs: list[list[Outputs]] = [[] for _ in methods]
    if examples := timed_examples(task.examples, config.timed):
        outputs = yield from measure_interleaved(loaded, examples, methods, config.repeats, journal)
    answers = batched or [repeats[0] for repeats in outputs]
    expected = answers[0]
    transformers = next(
        (timed for method, timed in zip(methods, outputs, strict=True) if method.strategy == "transformers"), None
    )
    task = task.referring_to(expected.answers)
    results = []
    expected_scores: dict[str, Scores] = {}
    for method, answered, timed in zip(methods, answers, outputs, strict=True):
        comparable = method.strategy != "early-exit" and not sampled
        differing = differences(loaded, task.examples, answered, expected) if comparable else ()
        # Perplexity is measured by our own passes through one exit, so that the baselines have none.
        perplexity = None
        if isinstance(method, DecodingConfig) and not method.exit_confidence:
            perplexity = losses.scores(_target_layers(method, loaded))
        scores = task.score(answered.texts, perplexity)
        expected_scores = expected_scores or scores  # those of the first method
        pair, both, repeated = (answered, expected), (scores, expected_scores), task.answers_per_prompt
        figures = bench_result(method, timed, outputs[0], both, differing, transformers, pair, repeated)
        compared = (timed, outputs[0], transformers or ())
        results.append(replace(figures, categories=_by_category(task, config, method, compared, pair, both)))
    resolved = asdict(config) | {"quality_metric": task.quality_metric, "prompt_template": loaded.template.name}
    yield RunRecord(resolved, machine, tuple(results), answered=task.answered(answers))


def strategies_of(
    loaded: Decoder, config: BenchConfig, asked: DecodingSettings, recommended: ExitChoice
) -> list[DecodingConfig]:
    """The strategies of a benchmark in the order of its tables; self-speculative decoding with each of the low-bit copies.

    Raises ConfigError for an exit outside the model.
    """
    chosen = {*config.strategies, *(["draft-and-verify"] if config.skips else [])}
    block = loaded.backend.exit_blocks.get(config.exit_layer or recommended.exit_layer)
    if block is not None and not block.stands_alone:
        chosen.discard("early-exit")  # that exit can only draft
    in_order = [name for name in ("autoregressive", "early-exit", *DRAFTERS) if name in chosen]
    known = (recommended, loaded.backend.num_layers, config.packing)
    return [setting for name in in_order for setting in _by_copy(asked.resolve_as(name, *known), config.packing)]


def must_search(loaded: Decoder, config: BenchConfig) -> bool:
    """Whether Draft & Verify runs, and the layers to skip were neither given nor stored with the model."""
    return config.skips and not config.generation.skip and loaded.recommended().skip is None


def bench_result(
    method: Method,
    repeats: Sequence[Outputs],
    autoregressive: Sequence[Outputs],
    scores: tuple[Mapping[str, Scores], Mapping[str, Scores]],
    differing: tuple[Difference, ...] = (),
    transformers: Sequence[Outputs] | None = None,
    answers: tuple[Outputs, Outputs] | None = None,
    answers_per_prompt: int = 1,
) -> Result:
    """The figures of one method. The other outputs are those of the same repeats: our autoregressive ones and transformers'.

    `scores`: the method's and the autoregressive ones. `answers`: both answers, if they were not timed.
    """
    first, expected = answers or (repeats[0], autoregressive[0])
    drafts = drafts_tokens(method)
    exit_layer, num_draft_tokens = exit_and_drafts(method)
    confidence = (method.exit_confidence or None) if isinstance(method, DecodingConfig) else None
    times, decode_times = [outputs.times for outputs in repeats], [outputs.decode_times for outputs in repeats]
    ratios = {  # of seconds per token
        "speedup": ([outputs.times for outputs in autoregressive], times),
        "decode_speedup": ([outputs.decode_times for outputs in autoregressive], decode_times),
        "speedup_over_transformers": ([outputs.times for outputs in transformers or ()], times if transformers else []),
    }
    bounds = {name: ratio_bounds(*pair, answers_per_prompt) for name, pair in ratios.items()}
    bounds |= answer_bounds(first, expected, drafts, answers_per_prompt) | metric_bounds(scores[0])
    return Result(
        strategy=method.strategy,
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        metrics={name: each.mean for name, each in scores[0].items()},
        acceptance_rate=first.stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=first.stats.mean_accepted_tokens if drafts else None,
        tokens_per_second=_median(1 / of_repeat.seconds_per_token for of_repeat in times),
        time_per_token_ms={
            "p50": _median(1000 * outputs.token_seconds(0.50) for outputs in repeats),
            "p95": _median(1000 * outputs.token_seconds(0.95) for outputs in repeats),
        },
        ttft_ms=_median(1000 * outputs.first_token_seconds for outputs in repeats),
        peak_memory_mb=max((peak for outputs in repeats if (peak := outputs.peak_memory_mb) is not None), default=None),
        identical_outputs=first.identical_outputs(expected),
        speedup=_ratio(*ratios["speedup"]),
        decode_speedup=_ratio(*ratios["decode_speedup"]),
        speedup_over_transformers=_ratio(*ratios["speedup_over_transformers"]),
        acceptance_by_position=first.acceptance_by_position if drafts else None,
        time_split_ms=repeats[0].time_split_ms if repeats else {},
        differences=differing,
        failures=first.failures,
        draft_weights=method.draft_weights if isinstance(method, DecodingConfig) else None,
        steps_by_drafter=first.stats.steps_by_drafter,
        exit_confidence=confidence,
        mean_layers=first.stats.mean_layers if confidence else None,
        skip=method.skip if isinstance(method, DecodingConfig) else (),
        longest_answer=repeats[0].longest.steps if repeats and method.strategy == "adaptive" else (),
        intervals={name: ends for name, ends in bounds.items() if ends is not None},
        changes=change_bounds(*scores),
    )


def unmeasured_bench(method: DecodingConfig) -> Result:
    """A method without any figure."""
    exit_layer, drafts = exit_and_drafts(method)
    return Result(method.strategy, exit_layer, drafts, exit_confidence=method.exit_confidence or None, skip=method.skip)


def _by_category(
    task: Task,
    config: BenchConfig,
    method: Method,
    compared: tuple[Sequence[Outputs], Sequence[Outputs], Sequence[Outputs]],
    answers: tuple[Outputs, Outputs],
    scores: tuple[Mapping[str, Scores], Mapping[str, Scores]],
) -> dict[str, Result]:
    """The figures of one method on each category with an autoregressive answer.

    `compared`: the repeats of the method, of autoregressive decoding and of transformers. `answers` and `scores`: as for
    `bench_result`.
    """
    timed = timed_examples(range(len(task.examples)), config.timed)
    found = {}
    for name, samples in task.categories.items():
        if all(answers[1].each[sample].error is not None for sample in samples):
            continue
        places = [place for place, sample in enumerate(timed) if sample in samples]
        mine, ours, theirs = ([outputs.of(places) for outputs in repeats if places] for repeats in compared)
        answered, expected = (outputs.of(samples) for outputs in answers)
        own, full = ({metric: each.of(samples) for metric, each in by_prompt.items()} for by_prompt in scores)
        figures = bench_result(method, mine, ours, (own, full), (), theirs, (answered, expected))
        found[name] = replace(figures, samples=len(samples))
    return found


def _by_copy(decoding: DecodingConfig, packing: PackingConfig) -> list[DecodingConfig]:
    """Self-speculative decoding with each of the low-bit copies; any other strategy as it is."""
    if decoding.strategy != "self-speculative" or not packing.draft_weights:
        return [decoding]
    return [replace(decoding, draft_weights=weights) for weights in dict.fromkeys(packing.draft_weights)]


def _target_layers(decoding: DecodingConfig, loaded: Decoder) -> int:
    """How many layers an answer comes from; all if its tokens leave at several exits, of which there is no perplexity."""
    if decoding.strategy == "early-exit" and not decoding.exit_confidence and decoding.exit_layer is not None:
        return decoding.exit_layer
    return int(loaded.backend.num_layers)


def _ratio(slower: Sequence[Times], faster: Sequence[Times]) -> float | None:
    """Of the seconds per token, in the median over the repeats."""
    return _median(base.seconds_per_token / new.seconds_per_token for base, new in zip(slower, faster, strict=True))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return finite(median(known)) if known else None
