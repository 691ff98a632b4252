"""Rotary position embeddings, for the layers on PyTorch's and on our own kernels."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration import RopeSpec
from .row_cache import SpanWriter
from .spec import ModelSpec


class Rope:
    """Rotations by position as complex numbers, for the slots of a key head: its G queries, the key
    and the value.

    Those of queries include the attention scale; values, and the part of a head without rope, are
    not rotated. There is one table for each of `spec.ropes`; it grows with the text.
    """

    def __init__(self, spec: ModelSpec, like: Tensor) -> None:
        self._spec = spec
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._lengths = self._like.new_tensor([spec.attention_scale] * spec.groups + [1.0])[:, None]
        ones = torch.ones(
            1, spec.head_dim // 2, dtype=self._lengths.dtype.to_complex(), device=like.device
        )
        self.still = self._slots(ones)  # (T = 1, 1, G+2, half a head), for layers without rope
        self._length, self._tables = 0, self._grown(0)
        self._outgrown: list[list[Tensor]] = []  # CUDA graphs still read them

    def at(self, writer: SpanWriter, positions: Tensor) -> list[Tensor]:
        """Rotations by rotary embedding, (B, T, 1, G+2, half a head), without B for rows at the
        same positions.
        """
        if self._length < writer.stop:
            self._outgrown.append(self._tables)
            self._length = 2 * writer.stop
            self._tables = self._grown(self._length)
        if writer.contiguous:
            return [table[writer.start : writer.stop] for table in self._tables]
        return [table[positions] for table in self._tables]

    def _grown(self, count: int) -> list[Tensor]:
        rotations = [
            torch.complex(*pair) for pair in cosines_and_sines(self._spec, count, self._like)
        ]
        fixed = (self._spec.head_dim - self._spec.rotary) // 2  # pairs that do not rotate
        return [
            self._slots(torch.cat([table, table.new_ones(count, fixed)], dim=1))
            for table in rotations
        ]

    def _slots(self, rotations: Tensor) -> Tensor:
        """Rotations (positions, half a head) as (positions, 1, G+2, half a head)."""
        rotating = rotations[:, None, None] * self._lengths
        return torch.cat([rotating, torch.ones_like(rotating[:, :, :1])], dim=2)


def cosines_and_sines(spec: ModelSpec, count: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of positions 0..count-1, each (count, rotary / 2) in the precision of `like`, for each of
    `spec.ropes`.
    """
    tables = []
    for rope in spec.ropes:
        of_layer = spec if rope.kind is None else spec.of_layer(spec.kinds.index(rope.kind))
        frequencies, scaling = rope_frequencies(of_layer, rope)
        angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies)
        cos, sin = (
            (values * scaling).to(like, non_blocking=True)
            for values in (angles.cos(), angles.sin())
        )
        tables.append((cos, sin))
    return tables


def rope_frequencies(spec: ModelSpec, rope: RopeSpec) -> tuple[Tensor, float]:
    """Radians per position of each rotating pair of a head, (rotary / 2,) in fp32, and the factor
    of cosine and sine.
    """
    # Without the import of transformers, which takes seconds
    if rope.type in ("default", "proportional"):
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
    # Within the original context
    turns = original / (2 * math.pi * float(values["rope_theta"]) ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
