"""The figures of a measurement: a Result for each way of decoding, and a description of the machine."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig
from ...decoding import DecodeStats
from ..bootstrap import Estimate, change, estimate, metric, speed_ratio
from ..metrics import Scores
from ..outputs import Output, finite, times_of
from ..results import Failure, Result
from ..tasks.task import Task
from .measure import Measured

_WITH_EXIT = ("early-exit", "self-speculative", "no-reuse", "assistant-early-exit")


def drafts_tokens(setting: DecodingConfig) -> bool:
    """Whether it drafts tokens and verifies them."""
    return setting.strategy not in ("autoregressive", "early-exit", "transformers", "llama.cpp")


def depth_of(setting: DecodingConfig, num_layers: int) -> int | None:
    """How many layers an answer comes from. None of a baseline, and if its tokens leave at several exits."""
    if setting.strategy not in STRATEGIES or setting.exit_confidence:
        return None
    return setting.exit_layer if setting.strategy == "early-exit" else num_layers


def scored(task: Task, measured: Sequence[Measured], perplexity: dict[int, Scores], num_layers: int) -> list[Measured]:
    """What was measured, with the scores of the answers. The first setting's are the references of a task that has none.

    `perplexity`: by exit, from our own passes, so that baselines have none; it is the metric of a task on text.
    """
    task = task.referring_to(measured[0].texts)
    depths = [depth_of(each.setting, num_layers) for each in measured]
    return [
        replace(each, scores=task.score([text or "" for text in each.texts], None if depth is None else perplexity.get(depth)))
        for each, depth in zip(measured, depths, strict=True)
    ]


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


def result_of(
    measured: Measured,
    full: Measured,
    transformers: Measured | None = None,
    answers_per_prompt: int = 1,
    base: Tensor | None = None,
) -> Result:
    """The figures of one way of decoding, compared with those of full depth, and of transformers if that ran.

    `base`: the times (4, repeats, prompts) that speedups are relative to; None: those of `full`.
    """
    answers, repeats, scores = measured.answers, measured.repeats, measured.scores
    result, stats = setting_of(measured.setting), sum((output.stats for output in answers), DecodeStats())
    accepted_at = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
    figures: dict[str, Estimate] = {}
    if repeats:
        times = repeated_times(repeats, answers_per_prompt)
        base = repeated_times(full.repeats, answers_per_prompt) if base is None else base
        figures["speedup"] = speed_ratio(base[:2], times[:2])
        figures["decode_speedup"] = speed_ratio(base[2:], times[2:])
        if transformers is not None:
            theirs = repeated_times(transformers.repeats, answers_per_prompt)
            figures["speedup_over_transformers"] = speed_ratio(theirs[:2], times[:2])
        result = replace(
            result,
            **_speeds(repeats, result.strategy == "adaptive"),
            tokens_per_second=estimate(torch.div, times[[1, 0]]).value,
        )
    known = [output.error is None for output in full.answers]
    same = [there and mine.ids == other.ids for there, mine, other in zip(known, answers, full.answers, strict=True)]
    figures["identical_outputs"] = estimate(torch.div, [same, known], answers_per_prompt)
    if drafts := drafts_tokens(measured.setting):
        accepted = [output.stats.accepted for output in answers]
        for name, count in (("acceptance_rate", "drafted"), ("mean_accepted_tokens", "rounds")):
            counts = [getattr(output.stats, count) for output in answers]
            found = estimate(torch.div, [accepted, counts], answers_per_prompt)
            figures[name] = found._replace(value=getattr(stats, name))  # 0 without drafts
    metrics = {name: metric(each) for name, each in scores.items()}
    values: dict[str, Any] = {name: found.value for name, found in figures.items()}
    changes = {name: change(each, full.scores[name]).bounds for name, each in scores.items() if name in full.scores}
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
    )


def repeated_times(repeats: Sequence[Sequence[Output]], answers_per_prompt: int = 1) -> Tensor:
    """(4, repeats, prompts): see `times_of`, summed over so many answers in a row to the same prompt."""
    times = torch.stack([times_of(outputs) for outputs in repeats], dim=1)
    return times.reshape(*times.shape[:2], -1, answers_per_prompt).sum(-1)


def _speeds(repeats: Sequence[Sequence[Output]], adaptive: bool) -> dict[str, Any]:
    """The figures of steps: medians over the repeats; the phases and the longest answer are the first one's."""
    firsts, per_token = [], []
    for outputs in repeats:
        firsts.append(median([output.steps[0].seconds for output in outputs if output.steps] or [math.nan]))
        # The tokens of a step share its time equally.
        steps = [step for output in outputs for step in output.steps[1:]]
        per_token.append(sorted(step.seconds / step.tokens for step in steps for _ in range(step.tokens)) or [math.nan])
    peaks = [output.peak_memory_mb for outputs in repeats for output in outputs if output.peak_memory_mb is not None]

    # Per new token: prefill, drafting, verifying (or plain steps) and everything else.
    stats = sum((output.stats for output in repeats[0]), DecodeStats())
    parts = {"prefill": stats.prefill_seconds, "draft": stats.draft_seconds, "verify": stats.verify_seconds}
    parts["other"] = sum(step.seconds for output in repeats[0] for step in output.steps) - sum(parts.values())

    def quantile(share: float) -> float | None:
        return finite(1000 * median(times[math.ceil(share * len(times)) - 1] for times in per_token))

    return {
        "time_per_token_ms": {"p50": quantile(0.50), "p95": quantile(0.95)},
        "ttft_ms": finite(1000 * median(firsts)),
        "peak_memory_mb": max(peaks, default=None),
        "time_split_ms": {name: 1000 * part / stats.new_tokens for name, part in parts.items()} if stats.new_tokens else {},
        "longest_answer": max(repeats[0], key=lambda output: len(output.ids)).steps if adaptive else (),
    }


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine, and how the model runs. The load average is the one before the run."""
    device, blocks = loaded.backend.device, loaded.backend.exit_blocks
    return {
        "versions": {
            "layerskip": version("layerskip"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.backend.dtype).removeprefix("torch."),
        "implementation": loaded.backend.implementation,
        "notes": list(loaded.notes),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **({"exit_blocks": {str(exit_layer): placed.block.feature for exit_layer, placed in blocks.items()}} if blocks else {}),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
