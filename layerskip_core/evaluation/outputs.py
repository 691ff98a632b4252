"""What prompts gave: tokens, text and times, of one prompt and of all prompts of a task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import NamedTuple

from ..checkpoint.loaded import Decoder
from ..decoding import DecodeStats, StopReason
from ..errors import LayerSkipError


class Step(NamedTuple):
    """Tokens that one step of the decoding loop gave, and the wall-clock seconds that it took."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Output:
    """What one prompt gave. The first step is the prefill, with the first token; `error` says why there are no tokens."""

    ids: tuple[int, ...] = ()
    text: str = ""
    steps: tuple[Step, ...] = ()
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: StopReason | None = None
    peak_memory_mb: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Failure:
    """A sample without an output, and why."""

    sample: int
    error: str


@dataclass(frozen=True)
class Timed:
    """What a way of decoding made of a prompt. The first step is the prefill, with the first token."""

    ids: tuple[int, ...]
    steps: tuple[Step, ...]
    stats: DecodeStats
    finish_reason: StopReason | None


def answer_text(loaded: Decoder, prompt_ids: list[int], ids: Sequence[int]) -> str:
    """The text of an answer. Decoded behind its prompt: some tokenizers drop the space that a text begins with, and code is
    indented by it.
    """
    text = loaded.detokenize(prompt_ids + [token for token in ids if token not in loaded.eos_ids])
    return text[len(loaded.detokenize(prompt_ids)) :]


@dataclass(frozen=True)
class Outputs:
    """One output for each example of a task, by one way of decoding. Those that failed have no part in the times."""

    each: tuple[Output, ...]

    @cached_property
    def stats(self) -> DecodeStats:
        return sum((one.stats for one in self.each), DecodeStats())

    @property
    def texts(self) -> list[str]:
        return [one.text for one in self.each]

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple(Failure(sample, one.error) for sample, one in enumerate(self.each) if one.error is not None)

    @property
    def peak_memory_mb(self) -> float | None:
        return max((one.peak_memory_mb for one in self.each if one.peak_memory_mb is not None), default=None)

    @property
    def seconds_per_token(self) -> float:
        """Total generation time, prefill included, by new token. NaN when there is none."""
        return _seconds_per_token([step for one in self.each for step in one.steps])

    @property
    def decode_seconds_per_token(self) -> float:
        """The same without the prefill and the first token, which it gives. NaN when there is no other."""
        return _seconds_per_token([step for one in self.each for step in one.steps[1:]])

    @property
    def first_token_seconds(self) -> float:
        """Median over the prompts. NaN when none gave a token."""
        firsts = [one.steps[0].seconds for one in self.each if one.steps]
        return median(firsts) if firsts else math.nan

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Of the drafts compared at each position of a round, all before them being accepted: the share accepted."""
        stats = self.stats
        accepted = (*stats.accepted_by_position, *[0] * len(stats.tested_by_position))
        return tuple(yes / tested for yes, tested in zip(accepted, stats.tested_by_position, strict=False))

    @property
    def time_split_ms(self) -> dict[str, float]:
        """Milliseconds by new token that prefill, drafting, verifying (or plain steps) and all else took."""
        stats = self.stats
        parts = {"prefill": stats.prefill_seconds, "draft": stats.draft_seconds, "verify": stats.verify_seconds}
        parts["other"] = sum(step.seconds for one in self.each for step in one.steps) - sum(parts.values())
        return {name: 1000 * seconds / stats.new_tokens for name, seconds in parts.items()} if stats.new_tokens else {}

    def token_seconds(self, quantile: float) -> float:
        """Quantile over the tokens behind the first of each output, a step's tokens sharing its time. NaN without any."""
        shares = sorted(step.seconds / step.tokens for one in self.each for step in one.steps[1:] for _ in range(step.tokens))
        return shares[math.ceil(quantile * len(shares)) - 1] if shares else math.nan

    def identical_outputs(self, baseline: "Outputs") -> float:
        """Share of the samples that the baseline answered whose tokens equal the baseline's."""
        pairs = [(one.ids, other.ids) for one, other in zip(self.each, baseline.each, strict=True) if other.error is None]
        return sum(ids == expected for ids, expected in pairs) / len(pairs)


def require_outputs(outputs: Outputs) -> Outputs:
    """The same. Raises LayerSkipError when every prompt failed."""
    failures = outputs.failures
    if len(failures) == len(outputs.each):
        raise LayerSkipError(f"none of the {len(failures)} prompts could be answered; the first: {failures[0].error}")
    return outputs


def finite(value: float) -> float | None:
    """The value, or None for a NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _seconds_per_token(steps: Sequence[Step]) -> float:
    tokens = sum(step.tokens for step in steps)
    return sum(step.seconds for step in steps) / tokens if tokens else math.nan
