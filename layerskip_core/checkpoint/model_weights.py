"""Weights of transformers models as modules: checked, overwritten, and in the precision in which
transformers loads them.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..model.spec import ModelSpec
from ..model.weights import check_finite, named_weights


def check_model(model: nn.Module, spec: ModelSpec | None) -> None:
    """Raises CheckpointError for a weight that is not finite or, by `spec`, missing or of another
    shape.
    """
    named = named_weights(model).items()
    weights = {name: weight for name, weight in named if weight.dtype.itemsize > 1}  # not quantised
    if spec is not None:
        spec.check_weights({name: tuple(weight.shape) for name, weight in weights.items()})
    for name, weight in weights.items():
        check_finite(name, weight)


@torch.no_grad()
def copy_into(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrites the weights that have `values`, in place."""
    for name, value in values.items():
        weights[name].copy_(value)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Gives a transformers model's weights the precision in which transformers loads them for
    `dtype`.

    That is `dtype` but for weights that the model's code creates in fp32 or keeps in fp32.
    Quantised weights with their scales keep their precision, and so do buffers that are not stored,
    such as rotary frequencies.
    """
    with torch.device("meta"):
        plain = type(model)._from_config(deepcopy(model.config), dtype=dtype)
    created = {name: weight.dtype for name, weight in plain.state_dict().items()}
    is_fp32 = _kept_in_fp32(model, dtype)
    for name, weight in model.state_dict(keep_vars=True).items():
        is_quantised = weight.dtype.itemsize == 1
        if name in created and not is_quantised:
            weight.data = weight.data.to(torch.float32 if is_fp32(name) else created[name])


def block_weights(
    model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights of blocks (copies of the model's layers) on the CPU, in `dtype` but for those that
    are fp32 in the model.
    """
    is_fp32 = _kept_in_fp32(model, dtype)
    return {
        name: weight.to("cpu", torch.float32 if is_fp32(name) else dtype)
        for name, weight in weights.items()
    }


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers loads the weight of a name in fp32 though the model is loaded in
    `dtype`.
    """
    # transformers searches names for these patterns in the same way
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)
