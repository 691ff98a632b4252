"""Measures decoding settings on a task: prompts one by one in turns, for speed; in batches, for
quality only.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig
from ...data import Example, spread
from ...decoding import check_prompt, decode, decode_batch
from ...decoding.drafters.lookup import EarlierAnswers
from ...errors import LayerSkipError
from ...model.backend import Backend
from ..metrics import Scores
from ..results import Difference, Journal, Output, Step, require_outputs
from ..tasks import Task

Baseline = Callable[[Decoder, list[int], DecodingConfig], Output]
"""Decodes the token ids of a prompt by another implementation. The setting's strategy is the baseline's name."""

_WARM_UP_TOKENS = 16
_BATCHES = -1  # the journal's repeat number of answers from batches
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


@dataclass(frozen=True)
class Progress:
    """The progress of one phase of a measurement."""

    done: int
    total: int
    phase: str
    # True amid times that are compared: the number of threads must not change now
    comparing: bool = False


@dataclass(frozen=True)
class Measured:
    """One setting: its answers to all prompts, and in each repeat the outputs of the `timed`
    prompts.
    """

    setting: DecodingConfig
    answers: Sequence[Output]
    repeats: Sequence[Sequence[Output]]
    differences: tuple[Difference, ...] = ()  # between the answers and the first setting's
    scores: Mapping[str, Scores] = field(default_factory=dict)  # of the answers
    timed: Sequence[int] = ()
    answers_per_prompt: int = 1  # consecutive answers to one prompt

    @property
    def texts(self) -> list[str | None]:
        """None for a prompt that failed."""
        return [None if output.error is not None else output.text for output in self.answers]

    @property
    def times(self) -> Tensor:
        """(2, repeats, prompts): seconds and tokens of generations, the prefill included."""
        parts = attrgetter("seconds"), attrgetter("tokens")
        columns = [
            [[sum(map(part, output.steps)) for output in outputs] for outputs in self.repeats]
            for part in parts
        ]
        times = torch.tensor(columns, dtype=torch.float64)
        return times.reshape(*times.shape[:2], -1, self.answers_per_prompt).sum(-1)

    def of(self, samples: Sequence[int]) -> "Measured":
        """The measurement restricted to these prompts."""
        places = [place for place, sample in enumerate(self.timed) if sample in samples]
        repeats = [[outputs[place] for place in places] for outputs in self.repeats if places]
        scores = {name: each.of(samples) for name, each in self.scores.items()}
        return Measured(
            self.setting, [self.answers[sample] for sample in samples], repeats, (), scores
        )

    def __add__(self, other: "Measured") -> "Measured":
        """The same setting on more prompts."""
        moved = [
            replace(each, sample=len(self.answers) + each.sample) for each in other.differences
        ]
        repeats = [
            [*mine, *theirs] for mine, theirs in zip(self.repeats, other.repeats, strict=True)
        ]
        return Measured(
            self.setting, [*self.answers, *other.answers], repeats, (*self.differences, *moved)
        )


def drafts_tokens(setting: DecodingConfig) -> bool:
    """True for strategies that draft tokens and verify them."""
    return setting.strategy not in ("autoregressive", "early-exit", "transformers", "llama.cpp")


def depth_of(setting: DecodingConfig, num_layers: int) -> int | None:
    """How many layers predict each token; None for a baseline, and if exits are chosen per
    token.
    """
    if setting.strategy not in STRATEGIES or setting.exit_confidence:
        return None
    return setting.exit_layer if setting.strategy == "early-exit" else num_layers


def in_turn(turn: int, count: int) -> list[int]:
    """An order of settings that rotates and reverses from turn to turn, so that none always follows
    the same one.
    """
    return [(turn - step if turn % 2 else turn + step) % count for step in range(count)]


def measure(
    loaded: Decoder,
    task: Task,
    settings: Sequence[DecodingConfig],
    config: BenchConfig | SweepConfig,
    repeats: int = 1,
    baselines: Mapping[str, Baseline] | None = None,
    journal: Journal | None = None,
    perplexity: Mapping[int, Scores] | None = None,
    name: str = "",
) -> Generator[Progress, None, list[Measured]]:
    """Decodes every prompt of the task by every setting. Yields progress; returns the measurement
    of each setting.

    All settings decode a prompt (or a batch) before the next one, in a rotating order, so that a
    slow moment of the machine slows all of them. Lookups search earlier answers of the same setting
    and repeat.

    `settings`: full depth first. `journal`: outputs of an interrupted run. `perplexity`: by exit,
    of a task on text. Raises LayerSkipError if every prompt failed with the first setting.
    """
    examples = task.examples
    batches = config.batch_size > 1
    every = range(len(examples))
    timed = () if config.timed == 0 else spread(every, config.timed or 0)  # None: all
    phases = (
        [("answers", [(_BATCHES, sample) for sample in every], config.batch_size)]
        if batches
        else []
    )
    phases += (
        [("prompts", [(repeat, sample) for repeat in range(repeats) for sample in timed], 1)]
        if timed
        else []
    )
    # The outputs of all settings by repeat and sample
    rows = {} if journal is None else dict(journal.known)
    # By setting and repeat
    earlier = defaultdict[tuple[int, int], EarlierAnswers](lambda: EarlierAnswers(config.remember))

    for phase, wanted, size in phases:
        missing = [each for each in wanted if each not in rows]
        if size > 1:
            missing.sort(key=lambda each: len(examples[each[1]].prompt))
        for setting in settings if size == 1 and missing else ():
            limit = min(_WARM_UP_TOKENS, setting.max_new_tokens)
            answer_prompts(
                loaded, [examples[0].prompt], replace(setting, max_new_tokens=limit), baselines
            )
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            prompts, (repeat, sample) = [examples[each].prompt for _, each in batch], batch[0]
            outputs: dict[int, list[Output]] = {}
            for place in in_turn(repeat + sample, len(settings)):
                # So that sampled answers to one prompt differ
                seed = (settings[place].seed + sample) % 2**32
                setting = (
                    replace(settings[place], seed=seed)
                    if settings[place].temperature
                    else settings[place]
                )
                outputs[place] = answer_prompts(
                    loaded, prompts, setting, baselines, earlier[place, repeat]
                )
            for each, row in zip(
                batch,
                zip(*(outputs[place] for place in range(len(settings))), strict=True),
                strict=True,
            ):
                rows[each] = list(row)
                if journal is not None:
                    journal.add(*each, row)
            yield Progress(
                len(wanted) - len(missing) + start + len(batch),
                len(wanted),
                f"{name} {phase}".strip(),
            )
        require_outputs([rows[each][0] for each in wanted])

    measured: list[Measured] = []
    for place, setting in enumerate(settings):
        answers = [rows[_BATCHES if batches else 0, sample][place] for sample in every]
        times = [
            [rows[repeat, sample][place] for sample in timed] for repeat in range(repeats) if timed
        ]
        exact = setting.strategy != "early-exit" and not settings[0].temperature
        differing = (
            differences(loaded, examples, answers, measured[0].answers)
            if exact and measured
            else ()
        )
        own = Measured(setting, answers, times, differing, {}, timed, task.answers_per_prompt)
        task = task.referring_to(own.texts)  # without references: the first setting's answers
        depth = depth_of(setting, loaded.backend.num_layers)
        measured.append(
            replace(
                own,
                scores=task.score(
                    [text or "" for text in own.texts], (perplexity or {}).get(depth or 0)
                ),
            )
        )
    return measured


def answer_prompts(
    loaded: Decoder,
    prompts: Sequence[str],
    setting: DecodingConfig,
    baselines: Mapping[str, Baseline] | None = None,
    earlier: EarlierAnswers | None = None,
) -> list[Output]:
    """One output per prompt, with an error if it exceeds context or memory. A single prompt is
    timed step by step.
    """
    model = loaded.backend
    alone = len(prompts) == 1
    baseline = (baselines or {}).get(
        setting.strategy, partial(own_output, earlier=earlier) if alone else None
    )
    has_peak = alone and _reset_peak(model.device)
    try:
        ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for prompt_ids in ids:
            check_prompt(prompt_ids, model)
        if baseline is not None:
            outputs = [baseline(loaded, prompt_ids, setting) for prompt_ids in ids]
        else:
            batch = decode_batch(
                model, ids, setting, loaded.ends(setting.stop), loaded.detokenize, earlier=earlier
            )
            answers = sorted(batch, key=lambda answer: answer.row)
            outputs = [
                Output(tuple(each.ids), "", (), each.stats, each.finish_reason) for each in answers
            ]
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        if alone:  # else each prompt is tried by itself
            return [Output(error=str(error))]
        return [answer_prompts(loaded, [prompt], setting, baselines)[0] for prompt in prompts]
    peak = _peak_mb(model.device) if has_peak else None
    detokenized = []
    for prompt_ids, output in zip(ids, outputs, strict=True):
        # Some tokenizers drop the leading space of an answer decoded without its prompt, and so the
        # indentation of code.
        whole = loaded.detokenize(
            prompt_ids + [token for token in output.ids if token not in loaded.eos_ids]
        )
        detokenized.append(
            replace(output, text=whole[len(loaded.detokenize(prompt_ids)) :], peak_memory_mb=peak)
        )
    return detokenized


def measure_prompt(loaded: Decoder, prompt: str, setting: DecodingConfig) -> Output:
    """The timed output for one prompt; see `answer_prompts`."""
    return answer_prompts(loaded, [prompt], setting)[0]


def own_output(
    loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig, **options: Any
) -> Output:
    """Our own decoding, with further `options` of `decode`. A step's time ends when its tokens are
    on the host.
    """
    decoding = decode(
        loaded.backend, prompt_ids, setting, loaded.ends(setting.stop), loaded.detokenize, **options
    )
    steps: list[Step] = []
    started = time.perf_counter()
    for [step] in decoding:
        seconds = time.perf_counter() - started
        steps.append(Step(len(step.ids), seconds))
        started = time.perf_counter()
    return Output(
        tuple(decoding.rows[0].output), "", tuple(steps), decoding.stats, decoding.finish_reason
    )


def differences(
    loaded: Decoder,
    examples: Sequence[Example],
    outputs: Sequence[Output],
    baseline: Sequence[Output],
) -> tuple[Difference, ...]:
    """The first difference of each output from the baseline's, with the top-2 logit gap there.
    Failed samples are left out.
    """
    differing = []
    for sample, (output, expected) in enumerate(zip(outputs, baseline, strict=True)):
        position = first_difference(output.ids, expected.ids)
        if position is not None and output.error is None and expected.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(expected.ids[:position])
            best, second = last_logits(loaded.backend, prefix).topk(2).values.tolist()
            differing.append(Difference(sample, position, best - second))
    return tuple(differing)


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first position where two outputs differ (the length of a prefix); None when they are
    equal.
    """
    if list(ids) == list(expected):
        return None
    pairs = enumerate(zip(ids, expected, strict=False))
    return next(
        (position for position, (own, other) in pairs if own != other), min(len(ids), len(expected))
    )


@torch.inference_mode()
def last_logits(model: Backend, ids: Sequence[int]) -> Tensor:
    """The model's logits (V,) after the last of these token ids, on the CPU in fp64."""
    tokens = torch.tensor([ids], device=model.device)
    places = model.new_cache(1, len(ids)).span(0, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, places)
    # The CPU first: mps has no fp64
    return model.unembed(hidden[:, -1:])[0, -1].cpu().double()


def _reset_peak(device: torch.device) -> bool:
    """Resets the peak of memory; False if the system cannot: not Linux, or a container that forbids
    it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_mb(device: torch.device) -> float:
    """Peak MB (2**20 bytes) since the reset: allocated by torch on CUDA, else the resident set of
    the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(
        line
        for line in _STATUS.read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024
