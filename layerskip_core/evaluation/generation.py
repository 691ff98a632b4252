"""One prompt decoded and timed, and a whole task in many settings: what sweeps and benchmarks are made of."""

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch

from ..checkpoint import LoadedModel
from ..config import DecodingConfig
from ..data import Example
from ..decoding import DecodeStats, Decoding, StopReason, decode
from ..errors import LayerSkipError
from .memory import PeakMemory
from .metrics import Difference, first_difference, top2_gap

if TYPE_CHECKING:
    from .journal import Journal

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Progress:
    """How far a phase of a measurement is."""

    done: int
    total: int
    phase: str


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


class Peer(Protocol):
    """A way of decoding that no DecodingConfig describes, named by `strategy`; a dataclass, so that `replace` shortens it."""

    @property
    def strategy(self) -> str: ...

    @property
    def exit_layer(self) -> int | None: ...

    @property
    def num_draft_tokens(self) -> int | None: ...

    @property
    def max_new_tokens(self) -> int: ...

    def run(self, loaded: LoadedModel, prompt_ids: list[int]) -> "Timed":
        """Raises LayerSkipError when the prompt cannot be answered."""

    def run_together(self, loaded: LoadedModel, prompts: list[list[int]]) -> "list[Timed]":
        """The same for several prompts, without times; one after the other where there is no other way."""


Setting = DecodingConfig | Peer


@dataclass(frozen=True)
class Timed:
    """What a way of decoding made of a prompt. The first step is the prefill, with the first token."""

    ids: tuple[int, ...]
    steps: tuple[Step, ...]
    stats: DecodeStats
    finish_reason: StopReason | None


def timed(decoding: Decoding) -> Timed:
    """Decodes to the end; a step's time is all that passes until its tokens are there."""
    ids: list[int] = []
    steps: list[Step] = []
    started = time.perf_counter()
    for tokens in decoding:
        steps.append(Step(len(tokens), time.perf_counter() - started))
        ids += [token.id for token in tokens]
        started = time.perf_counter()
    return Timed(tuple(ids), tuple(steps), decoding.stats, decoding.finish_reason)


def measure(loaded: LoadedModel, prompt: str, setting: Setting) -> Output:
    """Decodes a prompt in the checkpoint's template. Neither tokenizing nor detokenizing is timed.

    A prompt that fits neither the context nor the memory gives an output with an error. The setting must suit the model.
    """
    memory = PeakMemory(loaded.depth.device)
    try:
        prompt_ids = loaded.encode_prompt(prompt)
        if isinstance(setting, DecodingConfig):
            found = timed(decode(loaded.depth, prompt_ids, setting, loaded.eos_ids, loaded.detokenize))
        else:
            found = setting.run(loaded, prompt_ids)
    except (LayerSkipError, torch.OutOfMemoryError) as error:
        return Output(error=str(error))
    text = answer_text(loaded, prompt_ids, found.ids)
    return Output(found.ids, text, found.steps, found.stats, found.finish_reason, memory.peak_mb())


def answer_text(loaded: LoadedModel, prompt_ids: list[int], ids: Sequence[int]) -> str:
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


def measure_interleaved(
    loaded: LoadedModel,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    repeats: int = 1,
    journal: "Journal | None" = None,
) -> Generator[Progress, None, list[list[Outputs]]]:
    """Decodes every prompt in every setting, `repeats` times; yields progress, returns outputs by [setting][repeat].

    All settings meet a prompt one after the other, so a machine that slows down slows all of them. From prompt to prompt the
    order rotates and turns round, so none always follows the same other. Before all that each decodes a few tokens,
    unmeasured. What the journal holds is not measured again, and what is measured is added to it. Raises LayerSkipError when
    every prompt failed in the first setting.
    """
    for setting in settings:
        measure(loaded, examples[0].prompt, _shortened(setting))
    outputs: list[list[Outputs]] = [[] for _ in settings]
    for repeat in range(repeats):
        found: list[list[Output]] = []  # by [sample][setting]
        for number, example in enumerate(examples):
            mine = journal.recall(repeat, number) if journal is not None else None
            if mine is None:
                turn = _order(len(settings), number + repeat)
                by_place = {place: measure(loaded, example.prompt, _seeded(settings[place], number)) for place in turn}
                mine = [by_place[place] for place in range(len(settings))]
                if journal is not None:
                    journal.add(repeat, number, mine)
            found.append(mine)
            yield Progress(repeat * len(examples) + number + 1, repeats * len(examples), "prompts")
        for of_setting, new in zip(outputs, zip(*found, strict=True), strict=True):
            of_setting.append(Outputs(new))
        require_outputs(outputs[0][-1])
    return outputs


def differences(
    loaded: LoadedModel, examples: Sequence[Example], outputs: Outputs, baseline: Outputs
) -> tuple[Difference, ...]:
    """Where outputs that should be the baseline's first differ from it; a sample that failed has no place."""
    differing = []
    for sample, (one, other) in enumerate(zip(outputs.each, baseline.each, strict=True)):
        position = first_difference(one.ids, other.ids)
        if position is not None and one.error is None and other.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(other.ids[:position])
            differing.append(Difference(sample, position, top2_gap(loaded.depth, prefix)))
    return tuple(differing)


def drafts_tokens(setting: Setting) -> bool:
    """Whether this way of decoding drafts tokens and verifies them."""
    return setting.strategy not in ("autoregressive", "early-exit", "transformers")


def require_outputs(outputs: Outputs) -> Outputs:
    """The same. Raises LayerSkipError when every prompt failed."""
    failures = outputs.failures
    if len(failures) == len(outputs.each):
        raise LayerSkipError(f"none of the {len(failures)} prompts could be answered; the first: {failures[0].error}")
    return outputs


def finite(value: float) -> float | None:
    """The value, or None for a NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _seeded(setting: Setting, sample: int) -> Setting:
    """With a seed of the sample's own, so that several answers to one prompt differ where they are drawn."""
    if not isinstance(setting, DecodingConfig) or not setting.sampling.temperature:
        return setting
    return replace(setting, sampling=replace(setting.sampling, seed=setting.sampling.seed + sample))


def _shortened(setting: Setting) -> Setting:
    """The same, for a few tokens."""
    changed: Setting = replace(cast(Any, setting), max_new_tokens=min(_WARM_UP_TOKENS, setting.max_new_tokens))
    return changed


def _order(count: int, turn: int) -> list[int]:
    """0..count-1 beginning at `turn`, backwards on every odd turn."""
    step = -1 if turn % 2 else 1
    return [(turn + step * place) % count for place in range(count)]


def _seconds_per_token(steps: Sequence[Step]) -> float:
    tokens = sum(step.tokens for step in steps)
    return sum(step.seconds for step in steps) / tokens if tokens else math.nan
