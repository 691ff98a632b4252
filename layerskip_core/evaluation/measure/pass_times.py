"""Times the forward passes of decoding as they are in use: along answers, by each setting and plainly in turn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import NamedTuple

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, SamplingConfig
from ...decoding import DecodeStats, Decoding, decode

_STEPS = 32  # plain steps that are timed of an answer: its middle, if it is longer
_ROUNDS = 10  # rounds of a setting that are timed of it


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine.

    draft: one draft token (layers 0..E-1 and the head). verify: the verification of a round, with the first layers of its last
    draft, or of all tokens after low-bit drafts. other: the rest of a round. plain: an autoregressive step, timed next to it.
    """

    draft: float
    verify: float
    other: float
    plain: float

    @property
    def rest(self) -> float:
        """Of a round: all but its drafts."""
        return self.verify + self.other


class Stretch(NamedTuple):
    """The tokens of an answer that are decoded to time passes: `new_tokens` after these ids, as far as the context has room."""

    ids: list[int]
    new_tokens: int


def stretch_of(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Stretch:
    """A whole answer, or one from where `_STEPS` steps are its middle.

    From its prefill on, because the first steps after one take longer: they find caches that another pass has filled.
    """
    start = max(0, (len(output_ids) - _STEPS) // 2)
    return Stretch([*prompt_ids, *output_ids[:start]], len(output_ids) - start)


def plain_seconds(loaded: Decoder, stretch: Stretch) -> float | None:
    """Mean time of an autoregressive step along an answer. None if the answer has one token, which the prefill gives."""
    config = DecodingConfig("autoregressive", max_new_tokens=_limit(loaded, stretch))
    steps = list(islice(_step_times(decode(loaded.backend, stretch.ids, config)), 1, 1 + _STEPS))
    return fmean(step.total for step in steps) if steps else None


def pass_times(loaded: Decoder, stretch: Stretch, setting: DecodingConfig, plain: float | None) -> list[PassTimes]:
    """Mean times of the passes of a setting along an answer, in greedy rounds of the real decoding loop.

    So no part of a round is left out, and the first rounds count as much as they do in use, as do the short ones at the end.
    `plain`: `plain_seconds` of the same answer. Empty if the answer has no room for a round.
    """
    limit = _limit(loaded, stretch)
    greedy = replace(setting, max_new_tokens=limit, stop=(), sampling=SamplingConfig(), draft_confidence=0.0, lookup=0)
    decoding = decode(loaded.backend, stretch.ids, greedy)  # the answer's end is known, so EOS ids are not needed
    rounds = [step for step in islice(_step_times(decoding), 1 + _ROUNDS) if step.drafted]
    if not rounds or plain is None:
        return []
    draft = sum(step.draft for step in rounds) / sum(step.drafted for step in rounds)
    other = fmean(step.total - step.draft - step.verify for step in rounds)
    return [PassTimes(draft, fmean(step.verify for step in rounds), other, plain)]


def averages(times: Sequence[PassTimes]) -> PassTimes:
    """Means without the lowest and the highest tenth.

    On a busy machine most rounds run undisturbed, and a few wait for long. What is measured afterwards has both, so medians
    would predict too high a speed.
    """
    return PassTimes(
        _trimmed_mean([passes.draft for passes in times]),
        _trimmed_mean([passes.verify for passes in times]),
        _trimmed_mean([passes.other for passes in times]),
        _trimmed_mean([passes.plain for passes in times]),
    )


def _trimmed_mean(seconds: list[float]) -> float:
    left_out = len(seconds) // 10
    return fmean(sorted(seconds)[left_out : len(seconds) - left_out])


def _limit(loaded: Decoder, stretch: Stretch) -> int:
    """One token more than the answer has, so that its last token can be a draft; at least the one that `decode` asks for."""
    return max(1, min(stretch.new_tokens + 1, loaded.backend.max_positions - len(stretch.ids)))


class _StepTime(NamedTuple):
    """The number of drafts of a step, and its seconds for drafting, verifying and in total."""

    drafted: int
    draft: float
    verify: float
    total: float


def _step_times(decoding: Decoding) -> Iterator[_StepTime]:
    before, started = DecodeStats(), time.perf_counter()
    for _ in decoding:
        total, now = time.perf_counter() - started, decoding.stats
        draft, verify = now.draft_seconds - before.draft_seconds, now.verify_seconds - before.verify_seconds
        yield _StepTime(now.drafted - before.drafted, draft, verify, total)
        before, started = now, time.perf_counter()
