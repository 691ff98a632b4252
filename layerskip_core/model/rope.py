"""Rotary position embeddings, for the layers on PyTorch's and on our own kernels."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration import RopeSpec
from .spec import ModelSpec


def cosines_and_sines(spec: ModelSpec, count: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of positions 0..count-1, each (count, rotary / 2) in the precision of `like`, for each of
    `spec.ropes`.
    """
    tables = []
    for rope in spec.ropes:
        of_layer = spec
        if rope.kind is not None:
            of_layer = spec.of_layer(spec.kinds.index(rope.kind))
        frequencies, scaling = rope_frequencies(of_layer, rope)
        angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies)
        cos = (angles.cos() * scaling).to(like, non_blocking=True)
        sin = (angles.sin() * scaling).to(like, non_blocking=True)
        tables.append((cos, sin))
    return tables


def rope_frequencies(spec: ModelSpec, rope: RopeSpec) -> tuple[Tensor, float]:
    """Radians per position of each rotating pair of a head, (rotary / 2,) in fp32, and the factor
    of cosine and sine.
    """
    if rope.type in ("default", "proportional"):  # without transformers, whose import takes seconds
        base = float(rope.parameters["rope_theta"])
        alpha = rope.parameters.get("alpha")
        size = spec.rotary
        if alpha:  # Hunyuan's NTK-aware scaling
            base *= alpha ** (size / (size - 2))
        found = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
        if rope.type == "proportional":
            found[int(size * float(rope.parameters.get("partial_rotary_factor") or 1.0) // 2) :] = 0
            found /= float(rope.parameters.get("factor") or 1.0)
        return found, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = {} if rope.kind is None else {"layer_type": rope.kind}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.type](spec.config, torch.device("cpu"), **kind)
    return frequencies, scaling


def llama3_factors(values: Mapping[str, Any], head_dim: int) -> Tensor:
    """The divisors (head_dim / 2,) of the frequencies in the rope `llama3`, in fp64: `factor` for
    long waves, 1 for short ones.

    `values`: rope parameters in transformers' names.
    """
    factor = float(values["factor"])
    original = float(values["original_max_position_embeddings"])
    low = float(values["low_freq_factor"])
    high = float(values["high_freq_factor"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    # How often each pair turns within the original context
    turns = original / (2 * math.pi * float(values["rope_theta"]) ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
