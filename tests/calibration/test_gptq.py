"""GPTQ against rounding to nearest."""

import torch

from layerskip_core.calibration.gptq import Moments, gptq, searched
from layerskip_core.model.int4 import int4_of

OUTPUTS, INPUTS = 24, 160


def weight():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def inputs(count=600, rank=40):
    """Inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, INPUTS, generator=generator)
    return mixed + 0.3 * torch.randn(count, INPUTS, generator=generator)


def moments(given, original=None):
    made = Moments.zero(INPUTS)
    for part, reference in zip(given.chunk(3), (given if original is None else original).chunk(3), strict=True):
        made.add(part, reference)
    return made


def output_error(made, given, original=None):
    original = given if original is None else original
    return (given @ made.weight.T - original @ weight().T).square().mean().item()


def test_gptq_keeps_outputs_far_better_than_rounding():
    given = inputs()
    assert output_error(gptq(weight(), moments(given)), given) < 0.25 * output_error(int4_of(weight()), given)


def test_with_inputs_that_do_not_depend_on_each_other_it_rounds_to_nearest():
    made = gptq(weight(), Moments(3 * torch.eye(INPUTS), torch.zeros(INPUTS, INPUTS)))
    groups = weight().view(OUTPUTS, -1, 32)
    for number in range(INPUTS // 32):
        scale, low = searched(groups[:, number], torch.ones(32))
        assert torch.equal(made.scale[:, number], scale) and torch.equal(made.low[:, number], low)
        expected = ((groups[:, number] - low[:, None]) / scale[:, None]).round().clamp(0, 15)
        assert torch.equal(made.levels.view(OUTPUTS, -1, 32)[:, number].float(), expected)


def test_the_searched_range_is_better_than_the_whole_one():
    whole, made = int4_of(weight()), gptq(weight(), Moments(torch.eye(INPUTS), torch.zeros(INPUTS, INPUTS)))
    assert (made.weight - weight()).square().sum() < 0.95 * (whole.weight - weight()).square().sum()
    assert torch.equal(made.scale.bfloat16().float(), made.scale) and torch.equal(made.low.bfloat16().float(), made.low)


def test_inputs_of_quantised_layers_are_corrected_towards_the_original_outputs():
    original = inputs()
    given = original + 0.2 * original.roll(1, dims=1)
    corrected, plain = (gptq(weight(), moments(given, reference)) for reference in (original, given))
    assert output_error(corrected, given, original) < 0.5 * output_error(plain, given, original)


def test_inputs_that_are_always_zero_do_no_harm():
    given = inputs()
    given[:, 7] = 0
    made = gptq(weight(), moments(given))
    assert made.weight.isfinite().all() and output_error(made, given) < 0.25 * output_error(int4_of(weight()), given)
