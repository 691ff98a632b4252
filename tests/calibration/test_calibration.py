"""Calibration: a weight by GPTQ and the descent after it; the whole model, layer by layer, then the tuning of its scales."""

import pytest
import torch
from conftest import tiny_model

from layerskip_core.calibration.model import (
    Aim,
    descended,
    gptq,
    quantize,
    searched,
    tune,
    with_best_levels,
    with_best_scales,
)
from layerskip_core.checkpoint.beside import matrix_names
from layerskip_core.model import TransformersBackend
from layerskip_core.model.weights import int4_of

TEXTS = torch.randint(3, 67, (48, 32), generator=torch.Generator().manual_seed(0))
UNSEEN = torch.randint(3, 67, (8, 32), generator=torch.Generator().manual_seed(1))
WIDE = {"intermediate_size": 96, "hidden_size": 64}


def backend_of(model_type):
    return TransformersBackend(tiny_model(model_type, torch.float32, **WIDE))


def logarithms(backend, texts):
    with torch.no_grad():
        hidden = backend.run_layers(backend.embed(texts), 0, backend.num_layers, torch.arange(texts.shape[1])[None])
        return backend.unembed(hidden).log_softmax(-1)


def divergence(backend, model_type, texts):
    expected, actual = logarithms(backend_of(model_type), texts), logarithms(backend, texts)
    return torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item() / texts.numel()


def with_weights(model_type, weights):
    backend = backend_of(model_type)
    with torch.no_grad():
        for name, weight in weights.items():
            if name != backend.spec.head_name:
                backend.model.get_parameter(name).copy_(weight.weight)
    return backend


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_each_step_brings_predictions_nearer_to_the_original(model_type):
    backend = backend_of(model_type)
    names = matrix_names(backend.spec)
    parameters = {name: backend.model.get_parameter(name).detach() for name in names}
    nearest = with_weights(model_type, {name: int4_of(weight) for name, weight in parameters.items()})
    done = []
    weights, original = quantize(backend, TEXTS, done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7] and sorted(weights) == sorted(names)
    calibrated = divergence(with_weights(model_type, weights), model_type, TEXTS)
    assert calibrated == pytest.approx(divergence(backend, model_type, TEXTS))
    steps = []
    tuned = tune(backend, weights, original, TEXTS, 40, 0, lambda step, value: steps.append((step, value)))
    assert [step for step, _ in steps] == list(range(1, 41)) and steps[0][1] == pytest.approx(calibrated, rel=0.01)
    again = with_weights(model_type, tuned)
    assert divergence(again, model_type, TEXTS) < 0.95 * calibrated < 0.8 * divergence(nearest, model_type, TEXTS)
    assert divergence(again, model_type, UNSEEN) < 0.8 * divergence(nearest, model_type, UNSEEN)
    for name in names:
        assert torch.equal(tuned[name].levels, weights[name].levels)
        assert torch.equal(tuned[name].scale.bfloat16().float(), tuned[name].scale)


def test_the_original_states_are_those_of_the_original_model():
    backend = backend_of("llama")
    with torch.no_grad():
        expected = backend.run_layers(backend.embed(TEXTS), 0, 6, torch.arange(32)[None])
    torch.testing.assert_close(quantize(backend, TEXTS, lambda _: None)[1], expected)


OUTPUTS, INPUTS = 24, 160


def weight():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def inputs(count=600, rank=40):
    """Inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, INPUTS, generator=generator)
    return mixed + 0.3 * torch.randn(count, INPUTS, generator=generator)


def aim(given, original=None):
    return Aim.of(weight(), zip(given.chunk(3), (given if original is None else original).chunk(3), strict=True))


def output_error(made, given, original=None):
    original = given if original is None else original
    return (given @ made.weight.T - original @ weight().T).square().mean().item()


def test_gptq_keeps_outputs_far_better_than_rounding():
    given = inputs()
    assert output_error(gptq(aim(given)), given) < 0.25 * output_error(int4_of(weight()), given)


def test_with_inputs_that_do_not_depend_on_each_other_it_rounds_to_nearest():
    made = gptq(Aim(weight(), 3 * torch.eye(INPUTS)))
    groups = weight().view(OUTPUTS, -1, 32)
    for number in range(INPUTS // 32):
        scale, low = searched(groups[:, number], torch.ones(32))
        assert torch.equal(made.scale[:, number], scale) and torch.equal(made.low[:, number], low)
        expected = ((groups[:, number] - low[:, None]) / scale[:, None]).round().clamp(0, 15)
        assert torch.equal(made.levels.view(OUTPUTS, -1, 32)[:, number].float(), expected)


def test_the_searched_range_is_better_than_the_whole_one():
    whole, made = int4_of(weight()), gptq(Aim(weight(), torch.eye(INPUTS)))
    assert (made.weight - weight()).square().sum() < 0.95 * (whole.weight - weight()).square().sum()
    assert torch.equal(made.scale.bfloat16().float(), made.scale) and torch.equal(made.low.bfloat16().float(), made.low)


def test_inputs_of_quantised_layers_are_corrected_towards_the_original_outputs():
    original = inputs()
    given = original + 0.2 * original.roll(1, dims=1)
    corrected, plain = (gptq(aim(given, reference)) for reference in (original, given))
    assert output_error(corrected, given, original) < 0.5 * output_error(plain, given, original)


def test_the_correction_does_not_learn_the_noise_of_the_inputs():
    given, unseen = inputs(count=2400)[:240], inputs(count=2400)[-1200:]
    generator = torch.Generator().manual_seed(2)
    original = given + 0.5 * torch.randn(given.shape, generator=generator)
    corrected, plain = gptq(aim(given, original)), gptq(aim(given))
    assert output_error(corrected, given, original) < output_error(plain, given, original)
    assert output_error(corrected, unseen) < 1.8 * output_error(plain, unseen)


def test_inputs_that_are_always_zero_do_no_harm():
    given = inputs()
    given[:, 7] = 0
    made = descended(aim(given))
    assert made.weight.isfinite().all() and output_error(made, given) < 0.25 * output_error(int4_of(weight()), given)


def test_each_part_of_the_descent_lowers_the_error():
    goal = aim(inputs())
    made = gptq(goal)
    scaled = with_best_scales(made, goal)
    moved = with_best_levels(scaled, goal)
    assert goal.error(moved) < goal.error(scaled) < goal.error(made)
    assert torch.equal(scaled.levels, made.levels) and torch.equal(moved.scale, scaled.scale)
    assert goal.error(descended(goal)) < 0.97 * goal.error(moved)
    assert moved.levels.max() == 15 and moved.levels.min() == 0


def test_the_best_scales_are_a_minimum():
    goal = aim(inputs())
    best = with_best_scales(gptq(goal), goal)
    for factor in (0.97, 1.03):
        for changed in (best._replace(scale=best.scale * factor), best._replace(low=best.low * factor)):
            assert goal.error(changed) > goal.error(best)


def test_a_weight_without_an_error_stays_as_it_is():
    exact = int4_of(weight())
    goal = Aim(exact.weight, aim(inputs()).square)
    assert torch.equal(descended(goal).weight, exact.weight)
    constant = torch.full((3, 64), 0.5)  # groups of equal weights
    goal = Aim(constant, torch.eye(64))
    assert torch.equal(descended(goal).weight, constant)
