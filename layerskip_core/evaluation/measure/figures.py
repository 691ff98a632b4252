"""What a measurement says: the figures of each way of decoding, and the machine."""

import math
import os
import platform
from dataclasses import replace
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig
from ...decoding import DecodeStats
from ..metrics import SHARE, Estimate, change, estimate, finite, metric, speed_ratio
from ..results import Failure, Result
from . import Measured, drafts_tokens

_WITH_EXIT = ("early-exit", "self-speculative", "no-reuse", "assistant-early-exit")


def setting_of(setting: DecodingConfig) -> Result:
    """A way of decoding without any figure."""
    chooses, own = setting.exit_confidence > 0, setting.strategy in STRATEGIES
    drafts = drafts_tokens(setting) and setting.strategy != "adaptive"
    return Result(
        setting.strategy,
        setting.exit_layer if setting.strategy in _WITH_EXIT and not chooses else None,
        setting.num_draft_tokens if drafts else None,
        draft_weights=setting.draft_weights if own else None,
        exit_confidence=setting.exit_confidence if chooses else None,
        exits=setting.exits if chooses else (),
        skip=setting.skip,
    )


def result_of(measured: Measured, full: Measured, transformers: Measured | None = None) -> Result:
    """The figures of one way of decoding, compared with those of full depth, and of transformers if that ran."""
    answers, scores, drafts = measured.answers, measured.scores, drafts_tokens(measured.setting)
    result, stats = setting_of(measured.setting), sum((output.stats for output in answers), DecodeStats())
    figures: dict[str, Estimate] = {}
    if measured.repeats:
        times, base = measured.times, full.times
        figures |= {"speedup": speed_ratio(base[:2], times[:2]), "decode_speedup": speed_ratio(base[2:], times[2:])}
        if transformers is not None:
            figures["speedup_over_transformers"] = speed_ratio(transformers.times[:2], times[:2])
        result = replace(result, **_speeds(measured), tokens_per_second=estimate(torch.div, times[[1, 0]]).value)
    known = [output.error is None for output in full.answers]
    same = [there and mine.ids == other.ids for there, mine, other in zip(known, answers, full.answers, strict=True)]
    figures["identical_outputs"] = estimate(torch.div, [same, known], measured.answers_per_prompt, SHARE)
    counted = (("acceptance_rate", "drafted", 1.0), ("mean_accepted_tokens", "rounds", math.inf))
    for name, count, most in counted if drafts else ():
        counts = [[getattr(output.stats, part) for output in answers] for part in ("accepted", count)]
        found = estimate(torch.div, counts, measured.answers_per_prompt, (0.0, most))
        figures[name] = found._replace(value=getattr(stats, name))  # 0 without drafts
    metrics = {name: metric(each) for name, each in scores.items()}
    changes = {name: change(each, full.scores[name]).bounds for name, each in scores.items() if name in full.scores}
    accepted_at = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
    values: dict[str, Any] = {name: found.value for name, found in figures.items()}
    return replace(
        result,
        **values,
        metrics={name: found.value for name, found in metrics.items() if found.value is not None},
        # A draft is compared if all drafts before it in the round were accepted.
        acceptance_by_position=tuple(map(truediv, accepted_at, stats.tested_by_position)) if drafts else None,
        differences=measured.differences,
        failures=tuple(Failure(sample, each.error) for sample, each in enumerate(answers) if each.error is not None),
        steps_by_drafter=stats.steps_by_drafter,
        mean_layers=stats.mean_layers if result.exit_confidence else None,
        intervals={name: found.bounds for name, found in (figures | metrics).items() if found.bounds is not None},
        changes={name: ends for name, ends in changes.items() if ends is not None},
        rows_to_halve=figures["speedup"].rows if "speedup" in figures else None,
    )


def _speeds(measured: Measured) -> dict[str, Any]:
    """The figures of steps: medians over the repeats; the phases and the longest answer are the first one's."""
    firsts, per_token = [], []
    for outputs in measured.repeats:
        firsts.append(median([output.steps[0].seconds for output in outputs if output.steps] or [math.nan]))
        # The tokens of a step share its time equally.
        steps = [step for output in outputs for step in output.steps[1:]]
        per_token.append(sorted(step.seconds / step.tokens for step in steps for _ in range(step.tokens)) or [math.nan])
    quantiles = {
        name: finite(1000 * median(times[math.ceil(share * len(times)) - 1] for times in per_token))
        for name, share in (("p50", 0.50), ("p95", 0.95))
    }
    # Per new token: prefill, drafting, verifying (or plain steps) and everything else.
    outputs = measured.repeats[0]
    stats = sum((output.stats for output in outputs), DecodeStats())
    parts = {"prefill": stats.prefill_seconds, "draft": stats.draft_seconds, "verify": stats.verify_seconds}
    parts["other"] = sum(step.seconds for output in outputs for step in output.steps) - sum(parts.values())
    peaks = [each.peak_memory_mb for outputs in measured.repeats for each in outputs if each.peak_memory_mb is not None]
    longest = max(outputs, key=lambda output: len(output.ids)).steps
    return {
        "time_per_token_ms": quantiles,
        "ttft_ms": finite(1000 * median(firsts)),
        "peak_memory_mb": max(peaks, default=None),
        "time_split_ms": {name: 1000 * part / stats.new_tokens for name, part in parts.items()} if stats.new_tokens else {},
        "longest_answer": longest if measured.setting.strategy == "adaptive" else (),
    }


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine, and how the model runs. The load average is the one before the run."""
    device, blocks, cpu = loaded.backend.device, loaded.backend.exit_blocks, platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), cpu)
    return {
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
        "dtype": str(loaded.backend.dtype).removeprefix("torch."),
        "implementation": loaded.backend.implementation + ", CUDA graphs" * loaded.backend.recordable,
        "notes": list(loaded.notes),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **({"exit_blocks": {str(exit_layer): placed.block.feature for exit_layer, placed in blocks.items()}} if blocks else {}),
    }
