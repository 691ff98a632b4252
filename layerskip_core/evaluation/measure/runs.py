"""Decodes prompts by several methods: timed one by one, in turn so that a slow moment hits all, or in batches for quality."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig, SweepConfig
from ...data.examples import Example
from ...data.records import Item, spread
from ...decoding import Decoding, check_prompt, decode, decode_batch
from ...errors import LayerSkipError
from ..outputs import Output, Outputs, answer_text, require_outputs
from ..results import Step
from .journal import Journal

_WARM_UP_TOKENS = 16
_DEFAULT_TIMED = 8
_QUALITY_REPEAT = -1  # the journal's repeat number of answers from batches
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


@dataclass(frozen=True)
class Progress:
    """The progress of one phase of a measurement."""

    done: int
    total: int
    phase: str


class Baseline(Protocol):
    """A decoding method that a DecodingConfig cannot describe, such as transformers' generate."""

    @property
    def strategy(self) -> str:
        """Its name in results."""

    @property
    def exit_layer(self) -> int | None: ...

    @property
    def num_draft_tokens(self) -> int | None: ...

    @property
    def max_new_tokens(self) -> int: ...

    def limited(self, max_new_tokens: int) -> "Baseline":
        """The same method with another limit."""

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Output:
        """Raises LayerSkipError when the prompt cannot be answered."""

    def run_batch(self, loaded: Decoder, prompts: list[list[int]]) -> list[Output]:
        """Answers several prompts, without times; one by one if the method has no batches."""


Method = DecodingConfig | Baseline


def decode_timed(decoding: Decoding) -> Output:
    """Decodes to the end. A step's time ends when its tokens have arrived here."""
    ids: list[int] = []
    steps: list[Step] = []
    started = time.perf_counter()
    for tokens in decoding:
        seconds = time.perf_counter() - started
        steps.append(Step(len(tokens), seconds, decoding.drafter))
        ids += [token.id for token in tokens]
        started = time.perf_counter()
    return Output(tuple(ids), "", tuple(steps), decoding.stats, decoding.finish_reason)


def measure_prompt(loaded: Decoder, prompt: str, method: Method) -> Output:
    """Decodes a prompt in the checkpoint's template and times it. Tokenizing and detokenizing are not timed.

    A prompt that does not fit the context or the memory gives an Output with an error.
    """
    device = loaded.backend.device
    known = _reset_peak(device)
    try:
        prompt_ids = loaded.encode_prompt(prompt)
        if isinstance(method, DecodingConfig):
            output = decode_timed(decode(loaded.backend, prompt_ids, method, loaded.ends(method.stop), loaded.detokenize))
        else:
            output = method.run(loaded, prompt_ids)
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        return Output(error=str(error))
    peak = _peak_mb(device) if known else None
    return replace(output, text=answer_text(loaded, prompt_ids, output.ids), peak_memory_mb=peak)


def measure_interleaved(
    loaded: Decoder,
    examples: Sequence[Example],
    methods: Sequence[Method],
    repeats: int = 1,
    journal: Journal | None = None,
) -> Generator[Progress, None, list[list[Outputs]]]:
    """Decodes every prompt by every method, `repeats` times. Yields progress; returns outputs by [method][repeat].

    A prompt is decoded by all methods before the next one, so a machine that slows down slows all of them. The order of the
    methods rotates and reverses from prompt to prompt, so that no method always follows the same other one. Each method first
    warms up with a few tokens. What the journal already holds is not measured again; new measurements are added to it.

    Raises LayerSkipError when every prompt failed with the first method.
    """
    for method in methods:
        measure_prompt(loaded, examples[0].prompt, _warm_up(method))
    outputs: list[list[Outputs]] = [[] for _ in methods]
    for repeat in range(repeats):
        by_sample: list[list[Output]] = []  # [sample][method]
        for sample, example in enumerate(examples):
            row = journal.recall(repeat, sample) if journal is not None else None
            if row is None:
                by_method = {
                    index: measure_prompt(loaded, example.prompt, _seeded(methods[index], sample))
                    for index in _order(len(methods), sample + repeat)
                }
                row = [by_method[index] for index in range(len(methods))]
                if journal is not None:
                    journal.add(repeat, sample, row)
            by_sample.append(row)
            yield Progress(repeat * len(examples) + sample + 1, repeats * len(examples), "prompts")
        for of_method, new in zip(outputs, zip(*by_sample, strict=True), strict=True):
            of_method.append(Outputs(new))
        require_outputs(outputs[0][-1])
    return outputs


def default_timed(config: BenchConfig | SweepConfig) -> int | None:
    """How many prompts are timed. None: all of them, and answers do not come from batches."""
    return _DEFAULT_TIMED if config.batch_size > 1 and config.timed is None else config.timed


def timed_examples(examples: Sequence[Item], timed: int | None) -> Sequence[Item]:
    """The examples to time, or their indices, evenly spaced; `timed` is `default_timed`'s."""
    return examples if timed is None else spread(examples, timed) if timed else ()


def answer_in_batches(
    loaded: Decoder,
    examples: Sequence[Example],
    methods: Sequence[Method],
    batch_size: int,
    journal: Journal | None = None,
) -> Generator[Progress, None, list[Outputs]]:
    """Answers every prompt by every method, `batch_size` prompts at a time. Yields progress; returns outputs by method.

    In fp32 the answers equal those of `measure_prompt`, except at near-ties. They have no times, because a batch's time cannot
    be divided among its prompts. Prompts of similar length share a batch. Answers in the journal are not computed again.

    Raises LayerSkipError when every prompt failed with the first method.
    """
    answers = {sample: row for sample in range(len(examples)) if journal and (row := journal.recall(_QUALITY_REPEAT, sample))}
    missing = sorted(set(range(len(examples))) - set(answers), key=lambda sample: len(examples[sample].prompt))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        prompts = [examples[sample].prompt for sample in batch]
        by_method = [_answers(loaded, prompts, method) for method in methods]
        for sample, *row in zip(batch, *by_method, strict=True):
            answers[sample] = row
            if journal is not None:
                journal.add(_QUALITY_REPEAT, sample, row)
        yield Progress(len(answers), len(examples), "answers")
    outputs = [Outputs(tuple(answers[sample][index] for sample in range(len(examples)))) for index in range(len(methods))]
    require_outputs(outputs[0])
    return outputs


def _answers(loaded: Decoder, prompts: Sequence[str], method: Method) -> list[Output]:
    """One output per prompt. If the batch fails, its prompts are answered one by one, so that only the culprit fails."""
    try:
        prompt_ids = [loaded.encode_prompt(prompt) for prompt in prompts]
        for ids in prompt_ids:
            check_prompt(ids, loaded.backend.max_positions)
        if isinstance(method, DecodingConfig):
            ends = loaded.ends(method.stop)
            finished = sorted(
                decode_batch(loaded.backend, prompt_ids, method, ends, loaded.detokenize), key=lambda answer: answer.row
            )
            outputs = [Output(tuple(answer.ids), "", (), answer.stats, answer.finish_reason) for answer in finished]
        else:
            outputs = method.run_batch(loaded, prompt_ids)
    except (LayerSkipError, torch.OutOfMemoryError):
        return [measure_prompt(loaded, prompt, method) for prompt in prompts]
    return [
        replace(output, text=answer_text(loaded, ids, output.ids), steps=())
        for ids, output in zip(prompt_ids, outputs, strict=True)
    ]


def exit_and_drafts(method: Method) -> tuple[int | None, int | None]:
    """The exit that a method answers or drafts with, and its draft length. None if it has none or chooses itself."""
    if not isinstance(method, DecodingConfig):
        return method.exit_layer, method.num_draft_tokens
    exits = method.strategy in ("early-exit", "self-speculative") and not method.exit_confidence
    drafts = drafts_tokens(method) and method.strategy != "adaptive"
    return method.exit_layer if exits else None, method.num_draft_tokens if drafts else None


def drafts_tokens(method: Method) -> bool:
    """Whether the method drafts tokens and verifies them."""
    return method.strategy not in ("autoregressive", "early-exit", "transformers", "llama.cpp")


def _seeded(method: Method, sample: int) -> Method:
    """The method with a seed of its own for each sample, so that sampled answers to one prompt differ."""
    if not isinstance(method, DecodingConfig) or not method.temperature:
        return method
    return replace(method, seed=(method.seed + sample) % 2**32)  # the largest seed is 2**32 - 1


def _warm_up(method: Method) -> Method:
    """The method, limited to a few tokens."""
    limit = min(_WARM_UP_TOKENS, method.max_new_tokens)
    return replace(method, max_new_tokens=limit) if isinstance(method, DecodingConfig) else method.limited(limit)


def _order(count: int, turn: int) -> list[int]:
    """0..count-1, starting at `turn`, backwards on odd turns."""
    step = -1 if turn % 2 else 1
    return [(turn + step * index) % count for index in range(count)]


def _reset_peak(device: torch.device) -> bool:
    """False if the system cannot reset its peak: not Linux, or a container that forbids it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_mb(device: torch.device) -> float:
    """MB of 2**20 bytes since the reset: on CUDA what torch allocated, elsewhere the resident set of the whole process.

    That includes weights and interpreter, so that strategies hardly differ.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
