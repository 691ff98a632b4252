"""Decodes and times one prompt, or all prompts of a task by several methods in turn."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...data.examples import Example
from ...decoding import Decoding, decode
from ...errors import LayerSkipError
from ..outputs import Generation, Output, Outputs, answer_text, require_outputs
from ..results import Step
from .journal import Journal
from .memory import PeakMemory

_WARM_UP_TOKENS = 16


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

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Generation:
        """Raises LayerSkipError when the prompt cannot be answered."""

    def run_batch(self, loaded: Decoder, prompts: list[list[int]]) -> list[Generation]:
        """Answers several prompts, without times; one by one if the method has no batches."""


Method = DecodingConfig | Baseline


def decode_timed(decoding: Decoding) -> Generation:
    """Decodes to the end. A step's time ends when its tokens have arrived here."""
    ids: list[int] = []
    steps: list[Step] = []
    started = time.perf_counter()
    for tokens in decoding:
        seconds = time.perf_counter() - started
        steps.append(Step(len(tokens), seconds, decoding.drafter))
        ids += [token.id for token in tokens]
        started = time.perf_counter()
    return Generation(tuple(ids), tuple(steps), decoding.stats, decoding.finish_reason)


def measure_prompt(loaded: Decoder, prompt: str, method: Method) -> Output:
    """Decodes a prompt in the checkpoint's template and times it. Tokenizing and detokenizing are not timed.

    A prompt that does not fit the context or the memory gives an Output with an error.
    """
    memory = PeakMemory(loaded.backend.device)
    try:
        prompt_ids = loaded.encode_prompt(prompt)
        if isinstance(method, DecodingConfig):
            generation = decode_timed(decode(loaded.backend, prompt_ids, method, loaded.ends(method.stop), loaded.detokenize))
        else:
            generation = method.run(loaded, prompt_ids)
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        return Output(error=str(error))
    text = answer_text(loaded, prompt_ids, generation.ids)
    return Output(generation.ids, text, generation.steps, generation.stats, generation.finish_reason, memory.peak_mb())


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
    """The method with the sample's own seed, so that several sampled answers to one prompt differ."""
    if not isinstance(method, DecodingConfig) or not method.sampling.temperature:
        return method
    seed = (method.sampling.seed + sample) % 2**32  # the largest seed is 2**32 - 1
    return replace(method, sampling=replace(method.sampling, seed=seed))


def _warm_up(method: Method) -> Method:
    """The method, limited to a few tokens."""
    limit = min(_WARM_UP_TOKENS, method.max_new_tokens)
    return replace(method, max_new_tokens=limit) if isinstance(method, DecodingConfig) else method.limited(limit)


def _order(count: int, turn: int) -> list[int]:
    """0..count-1, starting at `turn`, backwards on odd turns."""
    step = -1 if turn % 2 else 1
    return [(turn + step * index) % count for index in range(count)]
