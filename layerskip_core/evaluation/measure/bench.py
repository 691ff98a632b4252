"""The decoding strategies and baselines side by side: the same prompts, in one process, interleaved."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ...checkpoint.loaded import Decoder
from ...config.decoding import DRAFTERS, DecodingConfig, DecodingOptions, Recommended, resolve_as
from ...config.evaluation import BenchConfig
from ...config.packing import PackingConfig
from ..perplexity import ReferenceLosses
from ..results import Result, RunRecord
from ..tasks.task import Task
from .baselines import load_baselines
from .journal import FOUND_SKIP, Journal, found_skip
from .llama_cpp import NAME as LLAMA_CPP
from .llama_cpp import describe_build
from .measure import Measured, Part, depth_of, environment, measure, result_of, scored
from .runs import Method, Progress, default_timed, timed_examples
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
    asked = config.decoding(generation)
    loaded, recommended = task.prepared(loaded), loaded.recommended(config.packing)
    searched: DecodingOptions | None = None
    if must_search(loaded, config):
        searched = found_skip(folder) if folder is not None and resume else None
        if searched is None:
            weights = config.packing.draft_weights
            searched = (yield from search_skips(loaded, task, generation, weights[0] if weights else None)).choice
        recommended = replace(recommended, skip=searched)
    strategies = strategies_of(loaded, config, asked, recommended)
    speculative = resolve_as("self-speculative", asked, recommended, loaded.backend.num_layers, config.packing)
    config = replace(
        config,
        task=task.config,
        generation=generation,
        exit_layer=speculative.exit_layer,
        num_draft_tokens=speculative.num_draft_tokens,
        timed=default_timed(config),
    )
    methods: list[Method] = [*strategies, *load_baselines(loaded, config, speculative)]
    machine = environment(loaded) | ({"llama_cpp": describe_build()} if LLAMA_CPP in config.baselines else {})
    asked_of = [*((example.prompt, example.completion) for example in task.examples), task.text]
    rows = hashlib.sha256(json.dumps(asked_of).encode()).hexdigest()
    settings = asdict(config) | ({FOUND_SKIP: searched} if searched else {}) | {"rows": rows}
    journal = Journal(folder, settings, resume) if folder is not None else None
    layers = loaded.backend.num_layers
    losses = ReferenceLosses()
    if task.text is not None:
        losses = sum(task.losses(loaded, [depth_of(strategy, layers) or layers for strategy in strategies]), losses)
    parts = [Part(loaded, task.examples)]
    measured = yield from measure(parts, methods, config.batch_size, config.timed, config.repeats, journal)
    measured = scored(task, measured, losses, layers)
    transformers = next((each for each in measured if each.method.strategy == "transformers" and each.repeats), None)
    results = [result_of(each, measured[0], transformers, task.answers_per_prompt) for each in measured]
    found = [_by_category(task, config, each, measured[0], transformers) for each in measured]
    results = [replace(result, categories=categories) for result, categories in zip(results, found, strict=True)]
    resolved = asdict(config) | {"quality_metric": task.quality_metric, "prompt_template": loaded.template.name}
    yield RunRecord(resolved, machine, tuple(results), answered=task.answered([each.answers for each in measured]))


def strategies_of(
    loaded: Decoder, config: BenchConfig, asked: DecodingOptions, recommended: Recommended
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
    return [setting for name in in_order for setting in _by_copy(resolve_as(name, asked, *known), config.packing)]


def must_search(loaded: Decoder, config: BenchConfig) -> bool:
    """Whether Draft & Verify runs, and the layers to skip were neither given nor stored with the model."""
    return config.skips and not config.generation.get("skip") and loaded.recommended().skip is None


def _by_category(
    task: Task, config: BenchConfig, measured: Measured, full: Measured, transformers: Measured | None
) -> dict[str, Result]:
    """The figures of one method on each category with an autoregressive answer."""
    timed = timed_examples(range(len(task.examples)), config.timed)
    found = {}
    for name, samples in task.categories.items():
        if any(full.answers.each[sample].error is None for sample in samples):
            places = [place for place, sample in enumerate(timed) if sample in samples]
            theirs = None if transformers is None else transformers.of(samples, places)
            result = result_of(measured.of(samples, places), full.of(samples, places), theirs)
            found[name] = replace(result, samples=len(samples))
    return found


def _by_copy(decoding: DecodingConfig, packing: PackingConfig) -> list[DecodingConfig]:
    """Self-speculative decoding with each of the low-bit copies; any other strategy as it is."""
    if decoding.strategy != "self-speculative" or not packing.draft_weights:
        return [decoding]
    return [replace(decoding, draft_weights=weights) for weights in dict.fromkeys(packing.draft_weights)]
