from itertools import chain

import pytest
import torch
from conftest import tiny_model

from layerskip_core.errors import ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.training.module import run_layer_on
from layerskip_core.training.recipe import depth_scale, dropout_rates, kept_rows, time_scale


def test_the_literal_rates():
    """RECIPE: L = 5, p_max = 0.2."""
    assert [depth_scale(layer, 5) for layer in range(5)] == pytest.approx([0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6)
    assert dropout_rates(0.2, 5) == pytest.approx([0, 0.037841, 0.082843, 0.136359, 0.2], abs=1e-6)
    assert sum(dropout_rates(0.2, 24)) / 24 == pytest.approx(0.089, abs=5e-4)


def test_constant_dropout_has_the_mean_of_the_exponential():
    """L = 5, p_max = 0.2: (0 + 0.037841 + 0.082843 + 0.136359 + 0.2) / 5 at every layer; S(t) scales it too."""
    assert dropout_rates(0.2, 5, profile="constant") == pytest.approx([0.0914086] * 5, abs=1e-6)
    assert dropout_rates(0.2, 5, 0.5, "constant") == pytest.approx([0.0457043] * 5, abs=1e-6)
    assert dropout_rates(0.0, 1, profile="constant") == [0.0]


def test_the_schedule_from_scratch():
    assert [time_scale(step, 5, True) for step in range(5)] == pytest.approx([0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6)
    assert time_scale(0, 1, False) == 1
    with pytest.raises(ConfigError, match="`steps` must be at least 2"):
        time_scale(0, 1, True)
    with pytest.raises(ConfigError, match="at least 2 layers, got 1"):
        depth_scale(0, 1)


def test_rows_depend_on_the_moment_and_on_nothing_else():
    draws = [
        kept_rows(0.5, 64, seed, step, first, layer)
        for seed, step, first, layer in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 64, 0), (0, 0, 0, 1)]
    ]
    assert len({tuple(draw) for draw in draws}) == 5
    torch.manual_seed(123)
    assert kept_rows(0.5, 64, 0, 0, 0, 0) == draws[0]
    assert kept_rows(0.0, 3, 0, 0, 0, 0) == [0, 1, 2]


def test_a_rows_draw_does_not_depend_on_how_the_step_is_divided():
    whole = kept_rows(0.5, 64, 1, 2, 0, 3)
    parts = [[first + row for row in kept_rows(0.5, 16, 1, 2, first, 3)] for first in (0, 16, 32, 48)]
    assert list(chain(*parts)) == whole and len({tuple(row % 16 for row in part) for part in parts}) == 4


def test_the_rate_is_the_share_of_dropped_rows():
    kept = sum(len(kept_rows(0.2, 50, 0, step, 0, 3)) for step in range(200))
    assert kept / 10_000 == pytest.approx(0.8, abs=0.012)  # 3 standard deviations


def test_dropped_rows_are_not_computed_and_come_back_in_place():
    backend = TransformersBackend(tiny_model())
    hidden = torch.randn(4, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 5, [False, False, True, True, True], [True] * 5, [False, True, True, True, True]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = backend.prepare(hidden, positions, key_mask=mask)
    seen = []
    hook = backend.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    mixed = run_layer_on(backend, 2, hidden, inputs, [1, 3])
    hook.remove()
    assert seen == [2]
    full = backend.run_layer(2, hidden, inputs)
    torch.testing.assert_close(mixed, torch.stack([hidden[0], full[1], hidden[2], full[3]]))
    assert not torch.allclose(full[0], hidden[0])


def test_a_layer_without_rows_still_gets_a_zero_gradient():
    backend = TransformersBackend(tiny_model())
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    output = run_layer_on(backend, 1, hidden, backend.prepare(hidden, torch.arange(3)[None]), [])
    torch.testing.assert_close(output, hidden)
    output.sum().backward()
    gradient = backend.layers[1].mlp.up_proj.weight.grad
    assert gradient is not None and gradient.abs().sum() == 0
