"""Weights are finite."""

import pytest
import torch

from layerskip_core.errors import CheckpointError
from layerskip_core.model.weights import check_finite


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
