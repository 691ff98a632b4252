"""From the table of measurements of a setting to its Result; the machine."""

import math
import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig
from ...config.evaluation import kind_of
from ...decoding import DecodeStats
from ..intervals import SHARE, Estimate, change, estimate, finite, metric, speed_ratio
from ..results import Failure, Result
from .measuring import Measured, Measurement, drafts_tokens, sums_by_prompt


def setting_of(setting: DecodingConfig) -> Result:
    """A Result that names a setting, without figures."""
    result = Result(setting.strategy, skip=setting.skip)
    if setting.strategy in STRATEGIES:  # a baseline drafts with the model's own weights
        result = replace(result, draft_weights=setting.draft_weights)
    if setting.exit_confidence > 0:
        result = replace(result, exit_confidence=setting.exit_confidence, exits=setting.exits)
    elif kind_of(setting.strategy).has_exit:
        result = replace(result, exit_layer=setting.exit_layer)
    # Adaptive decoding chooses the number of drafts itself
    if drafts_tokens(setting) and setting.strategy != "adaptive":
        result = replace(result, num_draft_tokens=setting.num_draft_tokens)
    return result


def result_of(measured: Measured, full: Measured, transformers: Measured | None = None) -> Result:
    """The figures of one setting, compared with full depth, and with transformers if that ran."""
    answers = measured.answers
    stats = total_stats(measured)
    figures = {"identical_outputs": _identical_outputs(measured, full)}
    result = setting_of(measured.setting)
    if measured.timed:
        result = _with_speeds(result, measured)
        figures["speedup"] = speed_ratio(full.times, measured.times)
        if transformers is not None:
            figures["speedup_over_transformers"] = speed_ratio(transformers.times, measured.times)
        result = replace(result, rows_to_halve=figures["speedup"].rows_to_halve)
    if drafts_tokens(measured.setting):
        result = replace(result, acceptance_by_position=_acceptance_by_position(stats))
        figures |= _acceptance(answers, stats)

    metrics = {name: metric(scores) for name, scores in measured.scores.items()}
    changes = {}
    for name, scores in measured.scores.items():
        if name in full.scores:
            changes[name] = change(scores, full.scores[name])
    failures = []
    for row in answers:
        if row.output.error is not None:
            failures.append(Failure(row.sample, row.output.error))
    values: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
    means = {name: each.value for name, each in metrics.items() if each.value is not None}
    return replace(
        result,
        **values,
        metrics=means,
        differences=measured.differences,
        failures=tuple(failures),
        steps_by_drafter=stats.steps_by_drafter,
        mean_layers=stats.mean_layers if result.exit_confidence else None,
        intervals=_bounds(figures | metrics),
        changes=_bounds(changes),
    )


def total_stats(measured: Measured) -> DecodeStats:
    """The counts of all answers."""
    return sum((row.output.stats for row in measured.answers), DecodeStats())


def _bounds(figures: dict[str, Estimate]) -> dict[str, Any]:
    return {name: each.bounds for name, each in figures.items() if each.bounds is not None}


def _identical_outputs(measured: Measured, full: Measured) -> Estimate:
    """The share of the answers of full depth that this setting gives too."""
    expected = {row.sample: row.output for row in full.answers}

    def is_known(row: Measurement) -> bool:
        return expected[row.sample].error is None

    def is_same(row: Measurement) -> bool:
        return is_known(row) and row.output.ids == expected[row.sample].ids

    return estimate(torch.div, sums_by_prompt(measured.answers, is_same, is_known), SHARE)


def _acceptance(answers: list[Measurement], stats: DecodeStats) -> dict[str, Estimate]:
    """Accepted drafts: as a share of all, and per round. Both are 0 where nothing was drafted."""
    accepted, drafted, rounds = sums_by_prompt(
        answers,
        lambda row: row.output.stats.accepted,
        lambda row: row.output.stats.drafted,
        lambda row: row.output.stats.rounds,
    )
    rate = estimate(torch.div, torch.stack([accepted, drafted]), SHARE)
    mean = estimate(torch.div, torch.stack([accepted, rounds]), (0.0, math.inf))
    return {
        "acceptance_rate": rate._replace(value=stats.acceptance_rate),
        "mean_accepted_tokens": mean._replace(value=stats.mean_accepted_tokens),
    }


def _acceptance_by_position(stats: DecodeStats) -> tuple[float, ...]:
    """A draft is tested if all drafts before it in the round were accepted."""
    shares = []
    for position, tested in enumerate(stats.tested_by_position):
        accepted = 0
        if position < len(stats.accepted_by_position):
            accepted = stats.accepted_by_position[position]
        shares.append(accepted / tested)
    return tuple(shares)


def _with_speeds(result: Result, measured: Measured) -> Result:
    """Median time to the first token (over prompts, then repeats), rate, and peak memory."""
    firsts: dict[int | None, list[float]] = {}
    peaks = []
    for row in measured.timed:
        own = firsts.setdefault(row.repeat, [])
        if row.output.steps:
            own.append(row.output.steps[0].seconds)
        if row.output.peak_memory_mb is not None:
            peaks.append(row.output.peak_memory_mb)
    medians = [median(own or [math.nan]) for own in firsts.values()]
    seconds, tokens = measured.times
    return replace(
        result,
        ttft_ms=finite(1000 * median(medians)),
        peak_memory_mb=max(peaks, default=None),
        tokens_per_second=estimate(torch.div, torch.stack([tokens, seconds])).value,
    )


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine and implementation. The load average is taken before the run."""
    backend = loaded.backend
    device = backend.device
    cpu = _cpu_name()
    implementation = backend.implementation
    if backend.recordable:
        implementation += ", CUDA graphs"
    machine: dict[str, Any] = {
        "versions": {
            "layerskip": version("layerskip"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "implementation": implementation,
        "notes": list(loaded.notes),
        "load_average": None,
    }
    if hasattr(os, "getloadavg"):  # not on Windows
        machine["load_average"] = list(os.getloadavg())
    if backend.exit_blocks:
        machine["exit_blocks"] = list(backend.exit_blocks)
    return machine


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
