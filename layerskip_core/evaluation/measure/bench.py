"""The decoding strategies and baselines side by side: the same prompts, in one process, interleaved."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ...checkpoint.loaded import Decoder
from ...config.decoding import DRAFTERS, DecodingConfig, DecodingOptions, Recommended, resolve_as
from ...config.evaluation import BenchConfig
from ..exits import scores_by_exit
from ..results import FOUND_SKIP, Journal, RunRecord, found_skip
from ..tasks import Task
from . import Progress, depth_of, measure
from .baselines import describe_llama_cpp, load_baselines
from .figures import environment, result_of
from .skip_search import search_skips


def bench(
    loaded: Decoder, task: Task, config: BenchConfig, folder: Path | None = None, resume: bool = False
) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record. With a `folder` every measured prompt is written to its journal, for `resume`.

    Raises ConfigError for settings that do not suit the model, LayerSkipError for a journal of others and without answers.
    """
    task, generation = task.asked(config.generation)
    asked, layers = config.decoding(generation), loaded.backend.num_layers
    loaded, recommended = task.prepared(loaded), loaded.recommended(config.packing)
    searched: DecodingOptions | None = None
    if must_search(loaded, config):
        searched = found_skip(folder) if folder is not None and resume else None
        if searched is None:
            searched, *_ = yield from search_skips(loaded, task, generation, next(iter(config.packing.draft_weights), None))
        recommended = replace(recommended, skip=searched)
    settings = strategies_of(loaded, config, asked, recommended)
    speculative = resolve_as("self-speculative", asked, recommended, layers, config.packing)
    exit_layer, drafts = speculative.exit_layer, speculative.num_draft_tokens
    config = replace(config, task=task.config, generation=generation, exit_layer=exit_layer, num_draft_tokens=drafts)
    baselines = load_baselines(loaded, config, speculative)
    machine = environment(loaded) | ({"llama_cpp": describe_llama_cpp()} if "llama.cpp" in baselines else {})
    journal = None
    if folder is not None:
        rows = [*((example.prompt, example.completion) for example in task.examples), task.text]
        head = asdict(config) | ({FOUND_SKIP: searched} if searched else {})
        journal = Journal(folder, head | {"rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}, resume)
    depths = [depth_of(setting, layers) or layers for setting in settings]
    perplexity = scores_by_exit(task.losses(loaded, depths)) if task.text is not None else {}
    settings += [replace(speculative, strategy=name) for name in baselines]
    measured = yield from measure(loaded, task, settings, config, config.repeats, baselines, journal, perplexity)
    full = measured[0]
    transformers = next((each for each in measured if each.setting.strategy == "transformers"), None)
    results = []
    for each in measured:
        by_category = {}
        for name, samples in task.categories.items():
            if any(full.answers[sample].error is None for sample in samples):
                found = result_of(each.of(samples), full.of(samples), transformers and transformers.of(samples))
                by_category[name] = replace(found, samples=len(samples))
        results.append(replace(result_of(each, full, transformers), categories=by_category))
    resolved = asdict(config) | {"quality_metric": task.quality_metric, "prompt_template": loaded.template.name}
    yield RunRecord(resolved, machine, tuple(results), answered=task.answered([each.texts for each in measured]))


def strategies_of(
    loaded: Decoder, config: BenchConfig, asked: DecodingOptions, recommended: Recommended
) -> list[DecodingConfig]:
    """The strategies of a benchmark in the order of its tables; self-speculative decoding with each of the low-bit copies."""
    chosen = {*config.strategies, *(["draft-and-verify"] if config.skips else [])}
    block = loaded.backend.exit_blocks.get(config.exit_layer or recommended.exit_layer)
    if block is not None and not block.stands_alone:
        chosen.discard("early-exit")  # that exit can only draft
    settings = []
    for name in ("autoregressive", "early-exit", *DRAFTERS):
        if name in chosen:
            setting = resolve_as(name, asked, recommended, loaded.backend.num_layers, config.packing)
            copies = dict.fromkeys(config.packing.draft_weights) if name == "self-speculative" else {}
            settings += [replace(setting, draft_weights=weights) for weights in copies] or [setting]
    return settings


def must_search(loaded: Decoder, config: BenchConfig) -> bool:
    """Whether Draft & Verify runs, and the layers to skip were neither given nor stored with the model."""
    return config.skips and not config.generation.get("skip") and loaded.recommended().skip is None
