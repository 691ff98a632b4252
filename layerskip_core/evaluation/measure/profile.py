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
from ..results import ExitResult

_ROWS = 17  # of the longest pass that is timed
_TIMES = 5  # per number of rows
_CONTEXT = 64  # tokens before those of a pass


def draft_profile(loaded: Decoder, results: Sequence[ExitResult], packing: PackingConfig) -> DraftProfile:
    """Acceptance and draft times of the rows that drafted by an exit or a copy, and the times of passes, measured here.

    `packing`: how the drafts of these rows were stored.
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
    return DraftProfile(acceptance, _pass_times(loaded), drafts, packing.draft_head, packing.draft_vocab)


@torch.inference_mode()
def _pass_times(loaded: Decoder) -> tuple[float, ...]:
    """Milliseconds of a pass of the target by its rows, medians; empty if the context is too short."""
    backend = loaded.backend
    if backend.max_positions < _CONTEXT + _ROWS:
        return ()
    cache, ids = backend.new_cache(1, _CONTEXT + _ROWS), torch.arange(_CONTEXT + _ROWS, device=backend.device)[None]
    ids = ids % backend.vocab_size
    backend.run_layers(backend.embed(ids[:, :_CONTEXT]), 0, backend.num_layers, torch.arange(_CONTEXT)[None], cache)
    times: list[list[float]] = [[] for _ in range(_ROWS)]
    for _ in range(_TIMES + 1):
        for rows in range(1, _ROWS + 1):
            places = torch.arange(_CONTEXT, _CONTEXT + rows)[None]
            started = time.perf_counter()
            hidden = backend.run_layers(backend.embed(ids[:, :rows]), 0, backend.num_layers, places, cache)
            most_probable(backend.unembed(hidden)).tolist()  # waits for the device
            times[rows - 1].append(1000 * (time.perf_counter() - started))
    return tuple(median(of_rows[1:]) for of_rows in times)
