"""What a sweep learnt of drafting with a model: where adaptive drafting starts, and all that it knows for sampled outputs."""

import time
from collections.abc import Sequence
from statistics import fmean, median

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DraftProfile
from ...config.packing import PackingConfig
from ...decoding.drafters.exit import drafter_name
from ...model.drafting import most_probable
from ..results import Result

_ROWS = 17  # of the longest pass that is timed
_TIMES = 5  # per number of rows


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
    return DraftProfile(acceptance, _pass_times(loaded, context), drafts, packing.draft_head, packing.draft_vocab)


@torch.inference_mode()
def _pass_times(loaded: Decoder, context: Sequence[int]) -> tuple[float, ...]:
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
