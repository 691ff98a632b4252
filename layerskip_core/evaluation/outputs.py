"""Outputs of prompts: tokens, text and times, for one prompt and for all prompts of a task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from ..checkpoint.loaded import Decoder
from ..decoding import DecodeStats, StopReason
from ..errors import LayerSkipError
from .results import Failure, Step


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt, or the `error` that prevented it. The fields are the journal's.

    The first step is the prefill, which gives the first token. Answers of a batch have no steps.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    steps: tuple[Step, ...] = ()
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: StopReason | None = None
    peak_memory_mb: float | None = None
    error: str | None = None


def answer_text(loaded: Decoder, prompt_ids: list[int], ids: Sequence[int]) -> str:
    """The text of an answer, detokenized together with its prompt.

    On its own, some tokenizers drop the leading space, and with it the indentation of code.
    """
    text = loaded.detokenize(prompt_ids + [token for token in ids if token not in loaded.eos_ids])
    return text[len(loaded.detokenize(prompt_ids)) :]


@dataclass(frozen=True)
class Times:
    """Seconds and new tokens, by prompt."""

    seconds: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def seconds_per_token(self) -> float:
        """Over all prompts. NaN without tokens."""
        tokens = sum(self.tokens)
        return sum(self.seconds) / tokens if tokens else math.nan

    def by_prompt(self, answers: int) -> "Times":
        """Sum over each prompt's rows, which are so many in a row."""
        starts = range(0, len(self.seconds), answers)
        seconds = (sum(self.seconds[start : start + answers]) for start in starts)
        return Times(tuple(seconds), tuple(sum(self.tokens[start : start + answers]) for start in starts))

    def __add__(self, other: "Times") -> "Times":
        """Add two measurements of the same prompts."""
        seconds = zip(self.seconds, other.seconds, strict=True)
        tokens = zip(self.tokens, other.tokens, strict=True)
        return Times(tuple(map(sum, seconds)), tuple(map(sum, tokens)))


@dataclass(frozen=True)
class Outputs:
    """One output for each example of a task, all by the same method. Failed prompts do not count in the times."""

    each: tuple[Output, ...]

    def of(self, samples: Sequence[int]) -> "Outputs":
        """The outputs for some of the examples."""
        return Outputs(tuple(self.each[sample] for sample in samples))

    @cached_property
    def stats(self) -> DecodeStats:
        return sum((output.stats for output in self.each), DecodeStats())

    @property
    def texts(self) -> list[str]:
        return [output.text for output in self.each]

    @property
    def answers(self) -> list[str | None]:
        """The texts, None for a prompt that failed."""
        return [None if output.error is not None else output.text for output in self.each]

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple(Failure(sample, output.error) for sample, output in enumerate(self.each) if output.error is not None)

    @property
    def peak_memory_mb(self) -> float | None:
        return max((output.peak_memory_mb for output in self.each if output.peak_memory_mb is not None), default=None)

    @property
    def times(self) -> Times:
        """Times of whole generations, prefill included."""
        return _times([output.steps for output in self.each])

    @property
    def decode_times(self) -> Times:
        """Times after the prefill and its token."""
        return _times([output.steps[1:] for output in self.each])

    @property
    def first_token_seconds(self) -> float:
        """Median time to the first token, over the prompts. NaN without tokens."""
        firsts = [output.steps[0].seconds for output in self.each if output.steps]
        return median(firsts) if firsts else math.nan

    @property
    def longest(self) -> Output:
        """The output with the most tokens, the first of several."""
        return max(self.each, key=lambda output: len(output.ids))

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """The share of drafts accepted at each position of a round. A draft counts if all drafts before it were accepted."""
        stats = self.stats
        accepted = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
        return tuple(count / tested for count, tested in zip(accepted, stats.tested_by_position, strict=False))

    @property
    def time_split_ms(self) -> dict[str, float]:
        """Milliseconds per new token spent on prefill, drafting, verifying (or plain steps) and everything else."""
        stats = self.stats
        parts = {"prefill": stats.prefill_seconds, "draft": stats.draft_seconds, "verify": stats.verify_seconds}
        parts["other"] = sum(step.seconds for output in self.each for step in output.steps) - sum(parts.values())
        return {name: 1000 * seconds / stats.new_tokens for name, seconds in parts.items()} if stats.new_tokens else {}

    def token_seconds(self, quantile: float) -> float:
        """A quantile of the time per token, over all tokens after the first. The tokens of a step share its time equally.

        NaN without tokens.
        """
        times = sorted(
            step.seconds / step.tokens for output in self.each for step in output.steps[1:] for _ in range(step.tokens)
        )
        return times[math.ceil(quantile * len(times)) - 1] if times else math.nan

    def identical_outputs(self, baseline: "Outputs") -> float:
        """The share of samples with the baseline's tokens, among those that the baseline answered."""
        pairs = [
            (output.ids, expected.ids)
            for output, expected in zip(self.each, baseline.each, strict=True)
            if expected.error is None
        ]
        return sum(ids == expected for ids, expected in pairs) / len(pairs)


def require_outputs(outputs: Outputs) -> None:
    """Raises LayerSkipError if every prompt failed."""
    failures = outputs.failures
    if len(failures) == len(outputs.each):
        raise LayerSkipError(f"none of the {len(failures)} prompts could be answered; the first: {failures[0].error}")


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def _times(prompts: Sequence[Sequence[Step]]) -> Times:
    seconds = (sum(step.seconds for step in steps) for steps in prompts)
    tokens = (sum(step.tokens for step in steps) for steps in prompts)
    return Times(tuple(seconds), tuple(tokens))
