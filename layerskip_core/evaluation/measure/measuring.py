"""Measures decoding settings on a task: prompts one by one in turns, for speed; in batches, for
quality only.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import STRATEGIES, DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig, kind_of
from ...data import Example, spread
from ...decoding import check_prompt, decode, decode_batch
from ...decoding.drafters.lookup import EarlierAnswers
from ...errors import LayerSkipError
from ...model.backend import Backend
from ..journal import Journal
from ..metrics import Scores
from ..results import Difference, Output, Step, require_outputs
from ..tasks.task import Task

BaselineDecoder = Callable[[Decoder, list[int], DecodingConfig], Output]
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
class Measurement:
    """One answer of a setting: a row of its table."""

    sample: int  # index of the task's example
    prompt: int  # several answers to one prompt count as one row of the data
    repeat: int | None  # None: answered in a batch, so not timed
    output: Output


@dataclass(frozen=True)
class Measured:
    """One setting: its answers as a long table, ordered by repeat, then sample, and what they
    scored.
    """

    setting: DecodingConfig
    table: Sequence[Measurement]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()  # between its answers and the first setting's

    @property
    def answers(self) -> list[Measurement]:
        """One row per sample, for quality: of the batches, else of the first repeat."""
        batched = [row for row in self.table if row.repeat is None]
        return batched or [row for row in self.table if row.repeat == 0]

    @property
    def timed(self) -> list[Measurement]:
        return [row for row in self.table if row.repeat is not None]

    @property
    def texts(self) -> list[str | None]:
        """None for a prompt that failed."""
        texts: list[str | None] = []
        for row in self.answers:
            texts.append(row.output.text if row.output.error is None else None)
        return texts

    @property
    def times(self) -> Tensor:
        """(2, repeats, prompts): seconds and tokens of generations, the prefill included."""
        return sums_by_prompt(
            self.timed, lambda row: row.output.seconds, lambda row: row.output.tokens
        )

    def of(self, samples: Sequence[int]) -> "Measured":
        """The measurement restricted to these samples."""
        chosen = set(samples)
        table = [row for row in self.table if row.sample in chosen]
        scores = {name: each.of(samples) for name, each in self.scores.items()}
        return Measured(self.setting, table, scores)

    def __add__(self, other: "Measured") -> "Measured":
        """The same setting on more samples, none of which has scores or several answers."""
        first = len(self.answers)
        moved = [
            replace(row, sample=first + row.sample, prompt=first + row.prompt)
            for row in other.table
        ]
        # A row of a batch has no repeat: it stands first, as `measure` orders them
        table = sorted(
            [*self.table, *moved], key=lambda row: -1 if row.repeat is None else row.repeat
        )
        differences = [replace(each, sample=first + each.sample) for each in other.differences]
        return Measured(self.setting, table, {}, (*self.differences, *differences))


def sums_by_prompt(
    table: Sequence[Measurement], *quantities: Callable[[Measurement], float]
) -> Tensor:
    """The sum of each quantity over the answers to a prompt in a repeat: (quantities, repeats,
    prompts).
    """
    sums: dict[tuple[int | None, int], list[float]] = {}
    for row in table:
        own = sums.setdefault((row.repeat, row.prompt), [0.0] * len(quantities))
        for number, quantity in enumerate(quantities):
            own[number] += quantity(row)
    repeats = len({repeat for repeat, _ in sums})
    columns = torch.tensor(list(sums.values()), dtype=torch.float64).T
    return columns.reshape(len(quantities), repeats, -1)


def drafts_tokens(setting: DecodingConfig) -> bool:
    """True for strategies and baselines that draft tokens and verify them."""
    return kind_of(setting.strategy).drafts


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
    direction = -1 if turn % 2 else 1
    return [(turn + direction * step) % count for step in range(count)]


@dataclass(frozen=True)
class _Phase:
    """Answers that are made alike. `cells`: repeat and sample of each, as the journal numbers
    them.
    """

    name: str
    cells: list[tuple[int, int]]
    batch_size: int


def _phases(samples: int, repeats: int, config: BenchConfig | SweepConfig) -> list[_Phase]:
    """Batches first, if there are any; then repeats, one prompt at a time."""
    phases = []
    if config.batch_size > 1:
        cells = [(_BATCHES, sample) for sample in range(samples)]
        phases.append(_Phase("answers", cells, config.batch_size))
    if config.timed != 0:
        timed = spread(range(samples), config.timed or 0)  # None: all
        cells = [(repeat, sample) for repeat in range(repeats) for sample in timed]
        phases.append(_Phase("prompts", cells, 1))
    return phases


def measure(
    loaded: Decoder,
    task: Task,
    settings: Sequence[DecodingConfig],
    config: BenchConfig | SweepConfig,
    repeats: int = 1,
    baselines: Mapping[str, BaselineDecoder] | None = None,
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
    # The output of every setting, by repeat and sample
    outputs: dict[tuple[int, int], Sequence[Output]] = {}
    if journal is not None:
        outputs.update(journal.known)
    # By setting and repeat
    earlier = defaultdict[tuple[int, int], EarlierAnswers](lambda: EarlierAnswers(config.remember))
    phases = _phases(len(task.examples), repeats, config)
    for phase in phases:
        missing = [cell for cell in phase.cells if cell not in outputs]
        if phase.batch_size > 1:
            # Prompts of alike lengths waste no work on padding
            missing.sort(key=lambda cell: len(task.examples[cell[1]].prompt))
        elif missing:
            _warm_up(loaded, task.examples[0].prompt, settings, baselines)
        for start in range(0, len(missing), phase.batch_size):
            batch = missing[start : start + phase.batch_size]
            prompts = [task.examples[sample].prompt for _, sample in batch]
            answers = _in_turn_answered(loaded, prompts, batch[0], settings, baselines, earlier)
            for cell, own in zip(batch, answers, strict=True):
                outputs[cell] = own
                if journal is not None:
                    journal.add(*cell, own)
            done = len(phase.cells) - len(missing) + start + len(batch)
            yield Progress(done, len(phase.cells), f"{name} {phase.name}".strip())
        require_outputs([outputs[cell][0] for cell in phase.cells])

    cells = [cell for phase in phases for cell in phase.cells]
    tables = [_table(task, place, cells, outputs) for place in range(len(settings))]
    return _scored(loaded, task, settings, tables, perplexity or {})


def _in_turn_answered(
    loaded: Decoder,
    prompts: Sequence[str],
    first: tuple[int, int],
    settings: Sequence[DecodingConfig],
    baselines: Mapping[str, BaselineDecoder] | None,
    earlier: Mapping[tuple[int, int], EarlierAnswers],
) -> list[tuple[Output, ...]]:
    """For each prompt the outputs of all settings, which take turns. `first`: repeat and sample of
    the first prompt.
    """
    repeat, sample = first
    of_settings: list[list[Output]] = [[] for _ in settings]
    for place in in_turn(repeat + sample, len(settings)):
        setting = settings[place]
        if setting.temperature:
            # So that sampled answers to one prompt differ
            setting = replace(setting, seed=(setting.seed + sample) % 2**32)
        of_settings[place] = answer_prompts(
            loaded, prompts, setting, baselines, earlier[place, repeat]
        )
    return list(zip(*of_settings, strict=True))


def _table(
    task: Task,
    place: int,
    cells: Sequence[tuple[int, int]],
    outputs: Mapping[tuple[int, int], Sequence[Output]],
) -> list[Measurement]:
    """The answers of the setting at a place."""
    table = []
    for repeat, sample in cells:
        own_repeat = None if repeat == _BATCHES else repeat
        prompt = sample // task.answers_per_prompt
        table.append(Measurement(sample, prompt, own_repeat, outputs[repeat, sample][place]))
    return table


def _warm_up(
    loaded: Decoder,
    prompt: str,
    settings: Sequence[DecodingConfig],
    baselines: Mapping[str, BaselineDecoder] | None,
) -> None:
    for setting in settings:
        limit = min(_WARM_UP_TOKENS, setting.max_new_tokens)
        answer_prompts(loaded, [prompt], replace(setting, max_new_tokens=limit), baselines)


def _scored(
    loaded: Decoder,
    task: Task,
    settings: Sequence[DecodingConfig],
    tables: Sequence[Sequence[Measurement]],
    perplexity: Mapping[int, Scores],
) -> list[Measured]:
    """The settings with their tables, scores and differences from the first one."""
    full = Measured(settings[0], tables[0])
    task = task.referring_to(full.texts)  # the references of a task without its own
    expected = [row.output for row in full.answers]
    measured: list[Measured] = []
    for setting, table in zip(settings, tables, strict=True):
        own = Measured(setting, table)
        depth = depth_of(setting, loaded.backend.num_layers)
        texts = [text or "" for text in own.texts]
        own = replace(own, scores=task.score(texts, perplexity.get(depth or 0)))
        # An early exit and a sample may differ: it is no fault
        promises_equal = setting.strategy != "early-exit" and not settings[0].temperature
        if promises_equal and measured:
            outputs = [row.output for row in own.answers]
            found = differences(loaded, task.examples, outputs, expected)
            own = replace(own, differences=found)
        measured.append(own)
    return measured


def answer_prompts(
    loaded: Decoder,
    prompts: Sequence[str],
    setting: DecodingConfig,
    baselines: Mapping[str, BaselineDecoder] | None = None,
    earlier: EarlierAnswers | None = None,
) -> list[Output]:
    """One output per prompt, with an error if it exceeds context or memory. A single prompt is
    timed step by step.
    """
    model = loaded.backend
    is_alone = len(prompts) == 1
    decode_one = (baselines or {}).get(setting.strategy)
    if decode_one is None and is_alone:
        decode_one = partial(own_output, earlier=earlier)
    has_peak = is_alone and _reset_peak(model.device)
    try:
        prompt_ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for ids in prompt_ids:
            check_prompt(ids, model)
        if decode_one is not None:
            outputs = [decode_one(loaded, ids, setting) for ids in prompt_ids]
        else:
            outputs = _batched_outputs(loaded, prompt_ids, setting, earlier)
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        if is_alone:
            return [Output(error=str(error))]
        # Each by itself: one of the prompts may be at fault, or the size of the batch
        return [answer_prompts(loaded, [prompt], setting, baselines)[0] for prompt in prompts]
    peak = _peak_mb(model.device) if has_peak else None
    answers = []
    for ids, output in zip(prompt_ids, outputs, strict=True):
        text = _answer_text(loaded, ids, output.ids)
        answers.append(replace(output, text=text, peak_memory_mb=peak))
    return answers


def _batched_outputs(
    loaded: Decoder,
    prompt_ids: list[list[int]],
    setting: DecodingConfig,
    earlier: EarlierAnswers | None,
) -> list[Output]:
    ends = loaded.ends(setting.stop)
    batch = decode_batch(
        loaded.backend, prompt_ids, setting, ends, loaded.detokenize, earlier=earlier
    )
    outputs = []
    for answer in batch:
        ids = tuple(answer.ids)
        outputs.append(Output(ids, stats=answer.stats, finish_reason=answer.finish_reason))
    return outputs


def _answer_text(loaded: Decoder, prompt_ids: list[int], ids: Sequence[int]) -> str:
    """The text of an answer after its prompt: some tokenizers drop the leading space of an answer
    decoded without its prompt, and so the indentation of code.
    """
    shown = [token for token in ids if token not in loaded.eos_ids]
    whole = loaded.detokenize(prompt_ids + shown)
    return whole[len(loaded.detokenize(prompt_ids)) :]


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
    ids = tuple(decoding.rows[0].output)
    return Output(ids, "", tuple(steps), decoding.stats, decoding.finish_reason)


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
        if output.ids == expected.ids or output.error is not None or expected.error is not None:
            continue
        position = _first_difference(output.ids, expected.ids)
        prefix = loaded.encode_prompt(examples[sample].prompt) + list(expected.ids[:position])
        best, second = last_logits(loaded.backend, prefix).topk(2).values.tolist()
        differing.append(Difference(sample, position, best - second))
    return tuple(differing)


def _first_difference(ids: Sequence[int], expected: Sequence[int]) -> int:
    """The first position where two outputs differ, or the length of the shorter one."""
    for position, (own, other) in enumerate(zip(ids, expected, strict=False)):
        if own != other:
            return position
    return min(len(ids), len(expected))


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
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux reports a peak wherever it can be reset")
