"""What a sweep stores for adaptive drafting."""

import pytest
from evaluating import tiny_loaded

from layerskip_core.config.decoding import DraftProfile
from layerskip_core.config.packing import PackingConfig
from layerskip_core.evaluation.measure.pass_times import draft_profile
from layerskip_core.evaluation.results import Result


def test_acceptance_and_times_are_those_of_the_exits_and_copies_that_drafted():
    def row(strategy, exit_layer=None, **changes):
        return Result(strategy, exit_layer, 2, {}, **changes)

    rows = (
        row("self-speculative", 2, acceptance_by_position=(0.5, 0.75), pass_times_ms={"draft": 0.5}),
        row("self-speculative", 6, draft_weights="int8", acceptance_by_position=(1.0, 0.5), pass_times_ms={"draft": 0.25}),
        row("lookup", acceptance_by_position=(0.25, 0.25)),
    )
    profile = draft_profile(tiny_loaded(), rows, PackingConfig(draft_vocab=9), [])
    assert profile == DraftProfile({"exit 2": 0.625, "int8": 0.75}, (), {"exit 2": 0.5, "int8": 0.25}, draft_vocab=9)


@pytest.mark.parametrize("length", [40, 10_000])
def test_passes_are_timed_after_the_context_as_far_as_there_is_room(monkeypatch, length):
    loaded = tiny_loaded()
    backend = loaded.backend
    start, places, run_layers = min(length, backend.max_positions - 17), [], type(backend).run_layers

    def recorded(self, hidden, first, last, positions, cache=None):
        places.append(positions[0].tolist())
        return run_layers(self, hidden, first, last, positions, cache)

    monkeypatch.setattr(type(backend), "run_layers", recorded)
    profile = draft_profile(loaded, (), PackingConfig(), [5] * length)
    assert len(profile.passes) == 17 and all(time > 0 for time in profile.passes)
    assert places[0] == list(range(start))
    assert places[1:18] == [list(range(start, start + rows)) for rows in range(1, 18)]
