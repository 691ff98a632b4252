"""Times the forward passes of decoding: in use, along answers, for the cost model; and by rows, for adaptive drafting."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean, median
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, DraftProfile
from ...config.packing import PackingConfig
from ...decoding import DecodeStats, Decoding, decode
from ...decoding.drafters.exit import drafter_name
from ...model.drafting import most_probable
from ..results import Result

_STEPS = 32  # plain steps that are timed of an answer: its middle, if it is longer
_ROUNDS = 10  # rounds of a setting that are timed of it
_ROWS = 17  # of the longest pass that is timed for adaptive drafting
_TIMES = 5  # per number of rows


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
        """Seconds of a round without its drafts."""
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
    greedy = replace(setting, max_new_tokens=limit, stop=(), temperature=0.0, draft_confidence=0.0, lookup=0)
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


def draft_profile(loaded: Decoder, results: Sequence[Result], packing: PackingConfig, context: Sequence[int]) -> DraftProfile:
    """Acceptance and draft times of the rows that drafted by an exit or a copy, and the times of passes, measured here.

    `packing`: how the drafts of these rows were stored. `context`: the tokens after which they were timed, because attention
    takes longer after many.
    """
    acceptance: dict[str, float] = {}
    drafts: dict[str, float] = {}
    for result in results:  # of several draft lengths the last one counts, which is the longest
        if result.strategy == "self-speculative" and result.exit_layer is not None:
            name = drafter_name(result.draft_weights, result.exit_layer, loaded.backend.num_layers)
            if result.acceptance_by_position:
                acceptance[name] = fmean(result.acceptance_by_position)
            if result.pass_times_ms:
                drafts[name] = result.pass_times_ms["draft"]
    return DraftProfile(acceptance, _times_by_rows(loaded, context), drafts, packing.draft_head, packing.draft_vocab)


@torch.inference_mode()
def _times_by_rows(loaded: Decoder, context: Sequence[int]) -> tuple[float, ...]:
    """Milliseconds of a pass of the target by its rows, medians, after as much of the context as leaves room for them."""
    backend = loaded.backend
    before = context[: max(backend.max_positions - _ROWS, 0)]
    if not before:
        return ()
    start, end = len(before), len(before) + _ROWS
    cache, ids = backend.new_cache(1, end), torch.tensor([before], device=backend.device)
    backend.run_layers(backend.embed(ids), 0, backend.num_layers, torch.arange(start)[None], cache)
    times: list[list[float]] = [[] for _ in range(_ROWS)]
    for _ in range(_TIMES + 1):
        for rows in range(1, _ROWS + 1):
            places = torch.arange(start, start + rows)[None]
            started = time.perf_counter()
            hidden = backend.run_layers(backend.embed(ids[:, -1:].expand(1, rows)), 0, backend.num_layers, places, cache)
            most_probable(backend.unembed(hidden)).tolist()  # waits for the device
            times[rows - 1].append(1000 * (time.perf_counter() - started))
    return tuple(median(of_rows[1:]) for of_rows in times)
