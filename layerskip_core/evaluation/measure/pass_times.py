"""Times the forward passes of decoding: in use, along answers, for the cost model; and by rows, for adaptive drafting."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from statistics import fmean, median
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, DraftProfile
from ...config.packing import PackingConfig, Quantization
from ...decoding import DecodeStats, Decoding, decode
from ...decoding.drafters.exit import drafter_name
from ...model.drafting import most_probable
from ..results import Result

_STEPS = 32  # plain steps that are timed of an answer: its middle, if it is longer
_ROUNDS = 10  # rounds of a setting that are timed of it
_ROWS = 17  # of the longest pass that is timed for adaptive drafting
_TIMES = 5  # per number of rows


Side = tuple[Quantization | None, int]
"""What drafts: the weights (None: the model's own) and how many of their layers."""


def side_of(setting: DecodingConfig) -> Side:
    """What drafts in self-speculative decoding; for an early exit, the layers that answer. 0 layers of other strategies."""
    return setting.draft_weights, setting.exit_layer or 0


class PassTimes(NamedTuple):
    """Seconds on this machine.

    draft: one draft token (layers 0..E-1 and the head). verify: the verification of a round, with the first layers of its last
    draft, or of all tokens after low-bit drafts. other: the rest of a round. plain: an autoregressive step, timed next to it.
    """

    draft: float
    verify: float
    other: float
    plain: float


class TimedPart(NamedTuple):
    """The tokens of an answer that are decoded to time passes: at most `limit` tokens after these ids."""

    ids: list[int]
    limit: int


def timed_part(loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> TimedPart:
    """A whole answer, or one from where `_STEPS` steps are its middle.

    From its prefill on, because the first steps after one take longer: they find caches that another pass has filled. There is
    room for one token more than the answer has, so that its last token can be a draft.
    """
    start = max(0, (len(output_ids) - _STEPS) // 2)
    ids = [*prompt_ids, *output_ids[:start]]
    return TimedPart(ids, max(1, min(len(output_ids) - start + 1, loaded.backend.max_positions - len(ids))))


def plain_seconds(loaded: Decoder, part: TimedPart) -> float | None:
    """Mean time of an autoregressive step along an answer. None if the answer has one token, which the prefill gives."""
    config = DecodingConfig("autoregressive", max_new_tokens=part.limit)
    steps = list(islice(_step_times(decode(loaded.backend, part.ids, config)), 1, 1 + _STEPS))
    return fmean(total for *_, total in steps) if steps else None


def pass_times(loaded: Decoder, part: TimedPart, setting: DecodingConfig, plain: float) -> PassTimes | None:
    """Mean times of the passes of a setting along an answer, in greedy rounds of the real decoding loop.

    So no part of a round is left out, and the first rounds count as much as they do in use, as do the short ones at the end.
    `plain`: `plain_seconds` of the same answer. None if the answer has no room for a round.
    """
    greedy = replace(setting, max_new_tokens=part.limit, stop=(), temperature=0.0, draft_confidence=0.0, lookup=0)
    decoding = decode(loaded.backend, part.ids, greedy)  # the answer's end is known, so EOS ids are not needed
    rounds = [step for step in islice(_step_times(decoding), 1 + _ROUNDS) if step[0]]
    if not rounds:
        return None
    drafted, draft, verify, total = map(sum, zip(*rounds, strict=True))
    return PassTimes(draft / drafted, verify / len(rounds), (total - draft - verify) / len(rounds), plain)


def timed_visits(
    loaded: Decoder, parts: Iterable[TimedPart], settings: Sequence[DecodingConfig]
) -> Iterator[dict[DecodingConfig, PassTimes]]:
    """Times rounds of each setting along each part, except where the part has no room for a round.

    Settings that draft with the same layers stand together. Plain steps are timed beside each such group, and averaged: beside
    those of its own group, a setting would be ranked by the noise of these few.
    """
    for visit, part in enumerate(parts):
        timed: dict[DecodingConfig, PassTimes] = {}
        for _, alike in groupby(settings[:: -1 if visit % 2 else 1], key=side_of):
            plain = plain_seconds(loaded, part)
            for setting in alike:
                if plain is not None and (passes := pass_times(loaded, part, setting, plain)) is not None:
                    timed[setting] = passes
        yield {
            setting: passes._replace(plain=fmean(each.plain for each in timed.values())) for setting, passes in timed.items()
        }


def averages(times: Sequence[PassTimes]) -> PassTimes:
    """Means without the lowest and the highest tenth.

    On a busy machine most rounds run undisturbed, and a few wait for long. What is measured afterwards has both, so medians
    would predict too high a speed.
    """
    left_out = len(times) // 10
    return PassTimes(*(fmean(sorted(seconds)[left_out : len(times) - left_out]) for seconds in zip(*times, strict=True)))


def _step_times(decoding: Decoding) -> Iterator[tuple[int, float, float, float]]:
    """Of each step the number of its drafts, and its seconds for drafting, verifying and in total."""
    before, started = DecodeStats(), time.perf_counter()
    for _ in decoding:
        total, now = time.perf_counter() - started, decoding.stats
        draft, verify = now.draft_seconds - before.draft_seconds, now.verify_seconds - before.verify_seconds
        yield now.drafted - before.drafted, draft, verify, total
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
