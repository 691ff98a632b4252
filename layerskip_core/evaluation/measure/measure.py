"""Measures several ways of decoding on the same prompts: their answers, times and scores, and the figures that follow."""

import os
import platform
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...data.examples import Example
from ...model.backend import Backend
from ..bootstrap import answer_bounds, change_bounds, metric_bounds, ratio_bounds
from ..metrics import Scores
from ..outputs import Output, Outputs, Times, finite
from ..perplexity import ReferenceLosses
from ..results import Difference, Result
from ..tasks.task import Task
from .journal import Journal
from .runs import Method, Progress, answer_in_batches, drafts_tokens, exit_and_drafts, measure_interleaved, timed_examples

# A top-2 logit gap below this is a near-tie: kernels for one row and for several rows may round to either side of it. In bf16,
# logits of 16 to 32 are 1/8 apart, so the bound is two steps. In fp32 it is a thousand times the spread between the kernels.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Part:
    """Prompts that are decoded alike: those of a task, or what one task of lm-eval asks with the same limits.

    `loaded` encodes them. `adapted`: a way of decoding with these limits. `name` stands before the phases of progress.
    """

    loaded: Decoder
    examples: Sequence[Example]
    adapted: Callable[[Method], Method] = lambda method: method
    name: str = ""


@dataclass(frozen=True)
class Measured:
    """One way of decoding: its answers to all prompts, and the outputs that were timed in each repeat.

    `scores` are those of the answers, `differences` where they depart from the first method's.
    """

    method: Method
    answers: Outputs
    repeats: Sequence[Outputs]
    differences: tuple[Difference, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)

    def of(self, samples: Sequence[int], timed: Sequence[int]) -> "Measured":
        """On some of the prompts; `timed`: their places among those that were timed."""
        repeats = [outputs.of(timed) for outputs in self.repeats if timed]
        scores = {name: each.of(samples) for name, each in self.scores.items()}
        return Measured(self.method, self.answers.of(samples), repeats, (), scores)

    @property
    def times(self) -> list[tuple[Times, Times]]:
        """Of each repeat: of whole generations, and without the prefill and its token."""
        return [(outputs.times, outputs.decode_times) for outputs in self.repeats]


def measure(
    parts: Sequence[Part],
    methods: Sequence[Method],
    batch_size: int = 1,
    timed: int | None = None,
    repeats: int = 1,
    journal: Journal | None = None,
) -> Generator[Progress, None, list[Measured]]:
    """Decodes every prompt by every method. Yields progress; returns what was measured of each method.

    Args:
        methods: the first is full depth, which the others are compared with.
        batch_size: above 1, answers come from batches, and only some prompts are timed.
        timed: how many prompts of each part; None: all.
        journal: of an interrupted run, whose outputs are not measured again.

    Raises:
        LayerSkipError: every prompt of a part failed with the first method.
    """
    answers: list[list[Output]] = [[] for _ in methods]
    timings: list[list[list[Output]]] = [[[] for _ in range(repeats)] for _ in methods]
    differing: list[list[Difference]] = [[] for _ in methods]
    distinct = [place for place, method in enumerate(methods) if methods.index(method) == place]
    for part in parts:
        own, start = [part.adapted(method) for method in methods], len(answers[0])
        batched: dict[int, Outputs] = {}
        if batch_size > 1:
            run = answer_in_batches(part.loaded, part.examples, [own[place] for place in distinct], batch_size, journal)
            batched = dict(zip(distinct, (yield from _named(part.name, run)), strict=True))
        times: list[list[Outputs]] = [[] for _ in methods]
        if chosen := timed_examples(part.examples, timed):
            times = yield from _named(part.name, measure_interleaved(part.loaded, chosen, own, repeats, journal))
        outputs = [
            batched[methods.index(method)] if batched else of_method[0]
            for method, of_method in zip(methods, times, strict=True)
        ]
        sampled = isinstance(own[0], DecodingConfig) and own[0].temperature > 0
        for number, (method, output) in enumerate(zip(own, outputs, strict=True)):
            answers[number] += output.each
            for repeat, of_repeat in enumerate(times[number]):
                timings[number][repeat] += of_repeat.each
            if method.strategy != "early-exit" and not sampled:
                found = differences(part.loaded, part.examples, output, outputs[0])
                differing[number] += [replace(each, sample=each.sample + start) for each in found]
    return [
        Measured(method, Outputs(tuple(each)), [Outputs(tuple(repeat)) for repeat in of_method if repeat], tuple(places))
        for method, each, of_method, places in zip(methods, answers, timings, differing, strict=True)
    ]


def scored(task: Task, measured: Sequence[Measured], losses: ReferenceLosses, num_layers: int) -> list[Measured]:
    """What was measured, with the scores of the answers. The first method's are the references of a task that has none.

    Perplexity, of a task on text, comes from our own passes through one exit, so that baselines have none.
    """
    task = task.referring_to(measured[0].answers.answers)
    found = []
    for each in measured:
        depth = depth_of(each.method, num_layers)
        scores = task.score(each.answers.texts, None if depth is None else losses.scores(depth))
        found.append(replace(each, scores=scores))
    return found


def depth_of(method: Method, num_layers: int) -> int | None:
    """How many layers an answer comes from. None of a baseline, and if its tokens leave at several exits."""
    if not isinstance(method, DecodingConfig) or method.exit_confidence:
        return None
    return method.exit_layer if method.strategy == "early-exit" else num_layers


def setting_of(method: Method) -> Result:
    """A way of decoding without any figure."""
    exit_layer, drafts = exit_and_drafts(method)
    if not isinstance(method, DecodingConfig):
        return Result(method.strategy, exit_layer, drafts)
    confidence = method.exit_confidence or None
    return Result(
        method.strategy, exit_layer, drafts, draft_weights=method.draft_weights, exit_confidence=confidence,
        exits=method.exits if confidence else (), skip=method.skip,
    )  # fmt: skip


def result_of(
    measured: Measured,
    full: Measured,
    transformers: Measured | None = None,
    answers_per_prompt: int = 1,
    base: Sequence[tuple[Times, Times]] | None = None,
) -> Result:
    """The figures of one method, compared with those of full depth, and of transformers if that ran.

    `base`: the times that speedups are relative to, by repeat; None: those of `full`.
    """
    answers, expected, repeats = measured.answers, full.answers, measured.repeats
    stats, drafts, result = answers.stats, drafts_tokens(measured.method), setting_of(measured.method)
    times, decode_times = ([of_repeat[kind] for of_repeat in measured.times] for kind in (0, 1))
    base = full.times if base is None else base
    theirs = [outputs.times for outputs in transformers.repeats] if transformers else []
    ratios = {
        "speedup": ([of_repeat[0] for of_repeat in base], times),
        "decode_speedup": ([of_repeat[1] for of_repeat in base], decode_times),
        "speedup_over_transformers": (theirs, times if theirs else []),
    }
    bounds = {name: ratio_bounds(*pair, answers_per_prompt) for name, pair in ratios.items()}
    bounds |= answer_bounds(answers, expected, drafts, answers_per_prompt) | metric_bounds(measured.scores)
    return replace(
        result,
        metrics={name: each.mean for name, each in measured.scores.items()},
        acceptance_rate=stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=stats.mean_accepted_tokens if drafts else None,
        acceptance_by_position=answers.acceptance_by_position if drafts else None,
        tokens_per_second=_median(1 / each.seconds_per_token for each in times),
        time_per_token_ms={
            "p50": _median(1000 * outputs.token_seconds(0.50) for outputs in repeats),
            "p95": _median(1000 * outputs.token_seconds(0.95) for outputs in repeats),
        },
        ttft_ms=_median(1000 * outputs.first_token_seconds for outputs in repeats),
        peak_memory_mb=max((peak for outputs in repeats if (peak := outputs.peak_memory_mb) is not None), default=None),
        speedup=_ratio(*ratios["speedup"]),
        decode_speedup=_ratio(*ratios["decode_speedup"]),
        speedup_over_transformers=_ratio(*ratios["speedup_over_transformers"]),
        identical_outputs=answers.identical_outputs(expected),
        time_split_ms=repeats[0].time_split_ms if repeats else {},
        differences=measured.differences,
        failures=answers.failures,
        steps_by_drafter=stats.steps_by_drafter,
        mean_layers=stats.mean_layers if result.exit_confidence else None,
        longest_answer=repeats[0].longest.steps if repeats and result.strategy == "adaptive" else (),
        intervals={name: ends for name, ends in bounds.items() if ends is not None},
        changes=change_bounds(measured.scores, full.scores),
    )


def differences(loaded: Decoder, examples: Sequence[Example], outputs: Outputs, baseline: Outputs) -> tuple[Difference, ...]:
    """The first difference of each output from the baseline's. Samples that failed in either are left out."""
    differing = []
    for sample, (output, expected) in enumerate(zip(outputs.each, baseline.each, strict=True)):
        position = first_difference(output.ids, expected.ids)
        if position is not None and output.error is None and expected.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(expected.ids[:position])
            differing.append(Difference(sample, position, top2_gap(loaded.backend, prefix)))
    return tuple(differing)


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first position where two outputs differ, None when they are equal. If one is a prefix of the other, its length."""
    if list(ids) == list(expected):
        return None
    shorter = min(len(ids), len(expected))
    return next((position for position in range(shorter) if ids[position] != expected[position]), shorter)


@torch.inference_mode()
def top2_gap(model: Backend, ids: Sequence[int]) -> float:
    """The gap between the two largest logits of the full model for the token after `ids`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    positions, cache = torch.arange(len(ids))[None], model.new_cache(1, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache)
    best, second = model.unembed(hidden[:, -1:])[0, -1].double().topk(2).values.tolist()
    return float(best - second)


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


def _named(name: str, events: Generator[Progress, None, Any]) -> Generator[Progress, None, Any]:
    """The progress of a part under its name."""
    while True:
        try:
            progress = next(events)
        except StopIteration as end:
            return end.value
        yield replace(progress, phase=f"{name} {progress.phase}".strip())


def _ratio(slower: Sequence[Times], faster: Sequence[Times]) -> float | None:
    """Of the seconds per token, in the median over the repeats."""
    return _median(base.seconds_per_token / new.seconds_per_token for base, new in zip(slower, faster, strict=True))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return finite(median(known)) if known else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
