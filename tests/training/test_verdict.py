"""What a drafter would gain, by the times of passes that a stand-in gives."""

from types import SimpleNamespace

import pytest

from layerskip_core.model.backend import DraftHead
from layerskip_core.training import verdict


class Passes:
    """Of a model of 8 layers: 1 second per layer, 2 for the head and 1 for that of exits, whatever the number of tokens."""

    num_layers = 8

    unembed = "head"
    draft_sides = {None: SimpleNamespace(at_exits=DraftHead("few"))}  # noqa: RUF012

    def __init__(self, backend):
        self.backend = backend

    def seconds(self, start, stop, tokens=1, head=None):
        return stop - start + {None: 0.0, "few": 1.0, "head": 2.0}[head]


@pytest.mark.parametrize(("accepted", "drafts"), [(0.5, 1), (0.8, 3)])
def test_speed_is_that_of_rounds_of_passes_through_a_block_or_the_head(monkeypatch, accepted, drafts):
    """A round of d drafts takes d + 1 times the 2 layers of the exit, its block and its head, and 6/8 of a pass."""
    monkeypatch.setattr(verdict, "_Passes", Passes)
    found = verdict.exit_speedup(Passes, 2, True)
    assert (found.step, found.draft) == (10.0, 0.4)
    tokens = sum(accepted**number for number in range(drafts + 1))
    assert found.speed(accepted) == (pytest.approx(10 * tokens / (4 * (drafts + 1) + 7.5)), drafts)
    assert verdict.exit_speedup(Passes, 2, False).draft == 0.3
