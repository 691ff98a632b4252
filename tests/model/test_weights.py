"""Weights are checked as they are taken, once each."""

import pytest
import torch

from layerskip_core.errors import CheckpointError
from layerskip_core.model.weights import Weights, check_finite, checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (40, 34)])
def test_a_number_that_is_not_finite_is_found_anywhere(shape, dtype):
    weight = torch.zeros(shape, dtype=dtype)
    weight.view(-1)[::2] = torch.finfo(dtype).max  # finite, though their sum is not
    check_finite("w", weight)
    for place in range(0, weight.numel(), 7):
        for number, what in ((torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")):
            damaged = weight.clone()
            damaged.view(-1)[place] = number
            with pytest.raises(CheckpointError, match=f"the weight w holds {what}"):
                check_finite("w", damaged)


def test_remembered_weights_are_taken_once():
    taken = []

    def take(name):
        taken.append(name)
        return torch.ones(2, 3)

    shapes = {"layer.a": (2, 3), "layer.b": (3, 2)}
    weights = Weights(checked(take, shapes), shapes).remembered("layer.")
    assert weights.of("a") is weights.of("a") and taken == ["layer.a"]
    with pytest.raises(CheckpointError, match=r"layer\.b"):
        weights.of("b")


def test_weights_that_come_first_are_those_of_their_names():
    shapes = {"a": (1,), "b": (1,), "c": (1,)}
    given = {"a": torch.zeros(1), "b": torch.zeros(1)}
    first = {"b": torch.ones(1)}
    weights = Weights(checked(given.get, shapes), shapes).after(first.get)
    assert weights.of("a") is given["a"] and weights.of("b") is first["b"]
    with pytest.raises(CheckpointError, match="the weight c is missing"):
        weights.of("c")
