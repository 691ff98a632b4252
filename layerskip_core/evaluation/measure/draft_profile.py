"""What adaptive drafting starts from: acceptance and times, from the results of a sweep."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DraftProfile
from ...config.model import PackingConfig
from ...decoding.drafters.submodel import drafter_name
from ...model.vocabulary import most_probable
from ..results import Result

_ROWS = 17  # of the longest pass timed
_TIMES = 5  # timed passes per number of rows


def draft_profile(
    loaded: Decoder, results: Sequence[Result], packing: PackingConfig, context: Sequence[int]
) -> DraftProfile:
    """Acceptance and draft times of rows that drafted by an exit or a copy, and pass times after
    `context`.
    """
    acceptance: dict[str, float] = {}
    drafts: dict[str, float] = {}
    for result in results:  # of several draft lengths the last one counts, which is the longest
        if result.strategy != "self-speculative" or result.exit_layer is None:
            continue
        name = drafter_name(result.draft_weights, result.exit_layer, loaded.backend.num_layers)
        if result.acceptance_by_position:
            acceptance[name] = _mean_acceptance(result.acceptance_by_position)
        if result.pass_times_ms:
            drafts[name] = result.pass_times_ms["draft"]
    passes = _times_by_rows(loaded, context)
    return DraftProfile(acceptance, passes, drafts, packing.draft_head, packing.draft_vocab)


def _mean_acceptance(by_position: Sequence[float]) -> float:
    """Each position weighted by the share of rounds that reach it."""
    reaching = 1.0
    tested = 0.0
    accepted = 0.0
    for share in by_position:
        tested += reaching
        reaching *= share
        accepted += reaching
    return accepted / tested


@torch.inference_mode()
def _times_by_rows(loaded: Decoder, context: Sequence[int]) -> tuple[float, ...]:
    """Median milliseconds of a target pass for each number of rows, after as much of the context as
    leaves room.
    """
    backend = loaded.backend
    before = context[: max(backend.spec.context - _ROWS, 0)]
    if not before:
        return ()
    start = len(before)
    end = len(before) + _ROWS
    cache = backend.new_cache(1, end)
    ids = torch.tensor(before, device=backend.device)
    backend.run_layers(backend.embed(ids), 0, backend.num_layers, cache.span(0, start))
    times: list[list[float]] = [[] for _ in range(_ROWS)]
    for _ in range(_TIMES + 1):  # the first is a warm-up
        for rows in range(1, _ROWS + 1):
            places = cache.span(start, start + rows)
            started = time.perf_counter()
            hidden = backend.run_layers(
                backend.embed(ids[-1:].expand(rows)), 0, backend.num_layers, places
            )
            most_probable(backend.unembed(hidden)).tolist()  # waits for the device
            times[rows - 1].append(1000 * (time.perf_counter() - started))
    return tuple(median(of_rows[1:]) for of_rows in times)
