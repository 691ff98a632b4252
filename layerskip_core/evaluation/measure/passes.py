"""Times the passes of settings along answers: drafts, verifications and plain steps."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from statistics import fmean

import numpy

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.model import Quantization
from ...decoding import DecodeStats, decode

STEPS_TIMED = 32  # plain steps timed per answer, in its middle
# Timed rounds per setting and answer; fewer of long drafts
_ROUNDS = 10
_FEWEST_ROUNDS = 3
_DRAFTS = 96
_FEW_STEPS = 8  # plain steps timed where nothing else was measured

DraftLayers = tuple[Quantization | None, int]
"""The drafter: its weights (None: the model's own) and number of layers."""


def draft_layers(setting: DecodingConfig) -> DraftLayers:
    """The drafter of self-speculative decoding, or the layers of an early exit; 0 layers for other
    strategies.
    """
    return setting.draft_weights, setting.exit_layer or 0


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine."""

    draft: float  # one draft token: layers 0..E-1 and the head
    # A round's verification, with layers 0..E-1 for the last draft, or for all tokens after low-bit
    # drafts
    verify: float
    other: float  # the rest of a round
    plain: float  # an autoregressive step, timed next to the rounds
    length: float = 0.0  # the mean number of drafts in these rounds

    @property
    def milliseconds(self) -> dict[str, float]:
        """For reports, without the length."""
        names = ("draft", "verify", "other", "plain")
        return {name: 1000 * getattr(self, name) for name in names}


@dataclass(frozen=True)
class Part:
    """What passes are timed along: `limit` tokens of an answer after these ids."""

    ids: list[int]
    limit: int


def timed_part(
    loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], steps: int = STEPS_TIMED
) -> Part:
    """The whole answer, or its middle `steps` tokens. The limit has one more, so that the last can
    be a draft.
    """
    start = max(0, (len(output_ids) - steps) // 2)
    ids = [*prompt_ids, *output_ids[:start]]
    in_context = loaded.backend.spec.context - len(ids)
    return Part(ids, max(1, min(len(output_ids) - start + 1, in_context)))


@dataclass(frozen=True)
class _TimedStep:
    """A step after the prefill: its drafts, and seconds."""

    drafted: int
    draft: float
    verify: float
    total: float


def pass_times(
    loaded: Decoder, part: Part, setting: DecodingConfig, plain: float
) -> PassTimes | None:
    """Mean pass times of greedy rounds along an answer (None: no round fits). `plain`: the mean
    autoregressive step.
    """
    most = max(_FEWEST_ROUNDS, min(_ROUNDS, _DRAFTS // setting.num_draft_tokens))
    rounds = [step for step in _timed_steps(loaded, part, setting, most) if step.drafted]
    if not rounds:
        return None
    drafted = sum(step.drafted for step in rounds)
    return PassTimes(
        draft=sum(step.draft for step in rounds) / drafted,
        verify=fmean(step.verify for step in rounds),
        other=fmean(step.total - step.draft - step.verify for step in rounds),
        plain=plain,
        length=drafted / len(rounds),
    )


def _timed_steps(
    loaded: Decoder, part: Part, setting: DecodingConfig, most: int
) -> list[_TimedStep]:
    greedy = replace(setting, max_new_tokens=part.limit, stop=(), temperature=0.0, lookup=0)
    # The answer's end is known, so EOS ids are not needed
    decoding = decode(loaded.backend, part.ids, greedy)
    steps = []
    before = DecodeStats()
    started = time.perf_counter()
    for _ in islice(decoding, 1 + most):
        total = time.perf_counter() - started
        now = decoding.stats
        steps.append(
            _TimedStep(
                now.drafted - before.drafted,
                now.draft_seconds - before.draft_seconds,
                now.verify_seconds - before.verify_seconds,
                total,
            )
        )
        before = now
        started = time.perf_counter()
    return steps[1:]  # without the prefill


def plain_step(loaded: Decoder) -> float:
    """Seconds of a plain step: the mean of a few after a short prompt."""
    part = Part(loaded.encode_prompt("a"), _FEW_STEPS)
    steps = _timed_steps(loaded, part, DecodingConfig("autoregressive"), _FEW_STEPS)
    return fmean(step.total for step in steps)


def speed_of(loaded: Decoder, stats: DecodeStats) -> float:
    """Estimated speedup of rounds with drafts over a few timed steps of plain decoding."""
    tokens = stats.accepted + stats.rounds
    return plain_step(loaded) * tokens / (stats.draft_seconds + stats.verify_seconds)


Visit = dict[DecodingConfig, PassTimes]
"""The pass times of the settings along one answer."""


def timed_visits(
    loaded: Decoder, parts: Iterable[Part], settings: Sequence[DecodingConfig]
) -> Iterator[Visit]:
    """Times rounds of each setting along each part that has room for them, and plain steps next to
    each drafter's.
    """
    for number, part in enumerate(parts):
        timed: Visit = {}
        # There and back, so that no drafter is always the first
        ordered = settings[::-1] if number % 2 else settings
        for _, of_drafter in groupby(ordered, key=draft_layers):
            steps = _timed_steps(loaded, part, DecodingConfig("autoregressive"), STEPS_TIMED)
            if not steps:  # an answer of one token
                continue
            plain = fmean(step.total for step in steps)
            for setting in of_drafter:
                times = pass_times(loaded, part, setting, plain)
                if times is not None:
                    timed[setting] = times
        if timed:
            # One plain step for all: its noise must not rank drafters
            plain = fmean(each.plain for each in timed.values())
            timed = {setting: replace(times, plain=plain) for setting, times in timed.items()}
        yield timed


def averages(times: Sequence[PassTimes]) -> PassTimes:
    """Trimmed means, without the lowest and highest tenth. Medians would overestimate speed: a few
    rounds take much longer.
    """
    left_out = len(times) // 10
    means = {}
    for field in fields(PassTimes):
        seconds = sorted(getattr(each, field.name) for each in times)
        means[field.name] = fmean(seconds[left_out : len(seconds) - left_out])
    return PassTimes(**means)


def interpolated(length: float, known: Iterable[PassTimes]) -> PassTimes:
    """Round times interpolated to a mean draft length."""
    ordered = sorted(known, key=lambda times: times.length)
    lengths = [times.length for times in ordered]
    values = {}
    for field in fields(PassTimes):
        column = [getattr(times, field.name) for times in ordered]
        values[field.name] = float(numpy.interp(length, lengths, column))
    return PassTimes(**values)
