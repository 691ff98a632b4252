"""What a drafter would gain, by the times of rounds that a stand-in gives, and of real ones."""

import pytest
import torch
from conftest import tiny_model

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.model import TransformersBackend
from layerskip_core.training import verdict


@pytest.mark.parametrize(("accepted", "drafts"), [(0.3, 1), (0.8, 2), (0.99, 8)])
def test_speed_is_that_of_rounds_of_decoding(monkeypatch, accepted, drafts):
    """A plain step takes 10 seconds, a round with d drafts 3 d + 8. A block to come counts as a layer."""
    asked = list[DecodingConfig]()
    seconds = {"autoregressive": lambda config: 10.0, "self-speculative": lambda config: 3.0 * config.num_draft_tokens + 8}
    monkeypatch.setattr(verdict, "_round", lambda _, config: asked.append(config) or seconds[config.strategy](config))
    backend = TransformersBackend(tiny_model())
    found = verdict.exit_speedup(backend, 2, True)
    assert {config.exit_layer for config in asked[1:]} == {3} and (found.step, found.draft) == (10.0, pytest.approx(0.3))
    tokens = sum(accepted**number for number in range(drafts + 1))
    assert found.speed(accepted) == (pytest.approx(10 * tokens / (3 * drafts + 8)), drafts)


def test_rounds_are_timed_where_the_context_is_short():
    backend = TransformersBackend(tiny_model(dtype=torch.float32, max_position_embeddings=12))
    assert verdict.exit_speedup(backend, 2, False).step > 0
