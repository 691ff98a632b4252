"""Decoding strategies and baselines, interleaved on the same prompts."""

import hashlib
import json
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...checkpoint.loaded import Decoder
from ...checkpoint.locate import files_digest
from ...config.decoding import STRATEGIES, DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig, with_llama_cpp
from ...config.resolution import Recommended, resolve_as
from ...errors import refused
from ...processor import OtherLoad
from ..journal import Journal
from ..metrics import Scores, scores_by_exit
from ..results import Result, RunRecord
from ..tasks.task import Task
from .bandwidth import bandwidth
from .baselines import describe_llama_cpp, load_baselines
from .figures import environment, result_of, total_stats
from .measuring import Measured, Progress, depth_of, measure


def bench(
    loaded: Decoder,
    task: Task,
    config: BenchConfig,
    folder: Path | None = None,
    resume: bool = False,
) -> Generator[Progress, None, RunRecord]:
    """Yields progress, returns the record. `resume` continues the journal in `folder` on the same
    files. Raises LayerSkipError.
    """
    task, generation = task.asked(config.generation)
    layers = loaded.backend.num_layers
    recommended = loaded.recommended(config.packing)
    loaded = task.prepared(loaded)
    config = replace(config, task=task.config, generation=generation)
    settings = strategies_of(loaded, config, recommended)
    # Baselines have the exit and the draft length of self-speculative decoding
    speculative = resolve_as("self-speculative", generation, recommended, layers, config.packing)
    baselines = load_baselines(loaded, config, speculative)
    machine = environment(loaded)
    if with_llama_cpp(baselines):
        machine["llama_cpp"] = describe_llama_cpp()
    named: dict[str, Any] = asdict(config)
    named["exit_layer"] = speculative.exit_layer
    named["num_draft_tokens"] = speculative.num_draft_tokens
    journal = None
    if folder is not None:
        files_and_rows = _digests(loaded, task, config, machine)
        journal = Journal(folder, named | files_and_rows, resume)
    perplexity: dict[int, Scores] = {}
    if task.text is not None:
        depths = [depth_of(setting, layers) or layers for setting in settings]
        perplexity = scores_by_exit(task.losses(loaded, depths))

    load = OtherLoad()
    compared = settings + [replace(speculative, strategy=name) for name in baselines]
    measured = yield from measure(
        loaded, task, compared, config, config.repeats, baselines, journal, perplexity
    )
    machine["busy_cores"] = load.busy_cores()
    read = _bandwidth(loaded, measured[0])
    if read:
        machine["bandwidth"] = read
    named["strategies"] = tuple(dict.fromkeys(setting.strategy for setting in settings))
    named["quality_metric"] = task.quality_metric
    named["prompt_template"] = loaded.template.name
    named["has_references"] = task.against is None
    results = _results(task, measured)
    answered = task.answered([each.texts for each in measured], [each.scores for each in measured])
    return RunRecord(named, machine, tuple(results), answered=answered)


def _digests(
    loaded: Decoder, task: Task, config: BenchConfig, machine: dict[str, Any]
) -> dict[str, Any]:
    """What must be as before when a run is resumed, beside its settings."""
    rows: list[Any] = [(example.prompt, example.completion) for example in task.examples]
    rows.append(task.text)
    files = [files_digest(loaded.name)]
    if config.packing.draft_model:
        files.append(files_digest(config.packing.draft_model))
    compared = ("versions", "device_name", "threads", "dtype", "implementation")
    return {
        "model_files": " ".join(files),
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "machine": {name: machine[name] for name in compared},
    }


def _bandwidth(loaded: Decoder, full: Measured) -> dict[str, float] | None:
    """What a step of plain decoding reads, without prefills; None if none was timed."""
    tokens = 0
    seconds = 0.0
    for row in full.timed:
        for step in row.output.steps[1:]:
            tokens += step.tokens
            seconds += step.seconds
    if not tokens:
        return None
    stats = total_stats(full)
    positions = (stats.prompt_tokens + stats.new_tokens / 2) / max(stats.sequences, 1)
    return bandwidth(loaded, seconds / tokens, positions)


def _results(task: Task, measured: list[Measured]) -> list[Result]:
    """The figures of each setting, also by category of the rows."""
    full = measured[0]
    transformers = None
    for each in measured:
        if each.setting.strategy == "transformers":
            transformers = each
    results = [result_of(each, full, transformers) for each in measured]
    for name, samples in task.categories.items():
        own_full = full.of(samples)
        if all(text is None for text in own_full.texts):
            continue  # every prompt of the category failed
        own_transformers = transformers and transformers.of(samples)
        for place, each in enumerate(measured):
            own = result_of(each.of(samples), own_full, own_transformers)
            own = replace(own, samples=len(samples))
            result = results[place]
            results[place] = replace(result, categories=result.categories | {name: own})
    return results


def strategies_of(
    loaded: Decoder, config: BenchConfig, recommended: Recommended
) -> list[DecodingConfig]:
    """The strategies in the order of the tables; self-speculative decoding once per low-bit copy.
    Raises ConfigError.
    """
    chosen = set(config.strategies or suiting_strategies(loaded, config))
    if config.generation.get("skip"):
        chosen.add("draft-and-verify")
    for name in chosen - loaded.backend.drafters.keys():
        if name in STRATEGIES[name].needs:
            needed = f"a list without {name} for a model without such a drafter"
            raise refused("strategies", needed, name)
    settings = []
    for name in dict.fromkeys(("autoregressive", "early-exit", *STRATEGIES)):
        if name not in chosen:
            continue
        setting = resolve_as(
            name, config.generation, recommended, loaded.backend.num_layers, config.packing
        )
        copies = dict.fromkeys(config.packing.draft_weights)
        if name == "self-speculative" and copies:
            settings += [replace(setting, draft_weights=weights) for weights in copies]
        else:
            settings.append(setting)
    return settings


def suiting_strategies(loaded: Decoder, config: BenchConfig | SweepConfig) -> set[str]:
    """The strategies for which the model or the config has what they need: exits if trained,
    recommended or asked for, low-bit copies and skipped layers that were asked for, and drafters.
    """
    generation = config.generation
    has: set[str] = {*loaded.backend.drafters}
    asked = generation.keys() & {"exit_layer", "exit_confidence"}
    if loaded.recommended(config.packing).exits or loaded.info.exit_layer or asked:
        has.add("exits")
    if config.packing.draft_weights:
        has.add("draft_weights")
    if generation.get("skip"):
        has.add("skip")
    if loaded.backend.draft_model is not None:
        has.add("draft_model")
    suiting = set()
    for name, strategy in STRATEGIES.items():
        if not strategy.needs or has & set(strategy.needs):
            suiting.add(name)
    return suiting
