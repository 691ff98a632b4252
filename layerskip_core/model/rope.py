"""Rotary position embeddings, in the forms that the packed and the native layers take."""

from typing import Any

import torch
from torch import Tensor

from .cache import SpanWriter
from .spec import ModelSpec


class Rope:
    """Rotations by position as complex numbers, for the slots of a key head: its G queries, the key and the value.

    Those of the queries have the length that attention scales scores by; those of values are 1. The table grows with the text.
    """

    def __init__(self, config: Any, spec: ModelSpec, like: Tensor) -> None:
        self._frequencies, self._scaling = rope_frequencies(config, spec.head_dim)
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        groups = spec.heads // spec.kv_heads
        self._lengths = self._like.new_tensor([spec.head_dim**-0.5] * groups + [1.0])[:, None]
        self.still = self._slots(torch.ones_like(self._rotations(1)))  # (T = 1, 1, G+2, half a head), of layers without rope
        self._table = self._slots(self._rotations(0))

    def at(self, writer: SpanWriter, positions: Tensor) -> Tensor:
        """(B, T, 1, G+2, half a head), without B for rows that stand at the same positions."""
        if len(self._table) < writer.stop:
            self._table = self._slots(self._rotations(2 * writer.stop))
        return self._table[writer.start : writer.stop] if writer.contiguous else self._table[positions]

    def _rotations(self, count: int) -> Tensor:
        """Of the first positions, (positions, half a head), complex."""
        return torch.complex(*cos_and_sin(self._frequencies, self._scaling, count, self._like))

    def _slots(self, rotations: Tensor) -> Tensor:
        """(positions, 1, G+2, half a head)."""
        rotating = rotations[:, None, None] * self._lengths
        return torch.cat([rotating, torch.ones_like(rotating[:, :, :1])], dim=2)


class RopeTables:
    """Cosines and sines of the first positions in fp32, as the C kernels read them."""

    def __init__(self, config: Any, spec: ModelSpec) -> None:
        self._frequencies, self._scaling = rope_frequencies(config, spec.head_dim)
        self.cos = self.sin = torch.empty(0, spec.head_dim // 2)

    def grow(self, stop: int) -> None:
        """Makes room for positions before `stop`."""
        if len(self.cos) < stop:
            self.cos, self.sin = cos_and_sin(self._frequencies, self._scaling, 2 * stop, self.cos)


def cos_and_sin(frequencies: Tensor, scaling: float, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angles of the first positions, each (positions, half a head), times `scaling`."""
    angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies)
    return (angles.cos() * scaling).to(like), (angles.sin() * scaling).to(like)


def rope_frequencies(config: Any, size: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of a head, (half a head,) in fp32, and the factor of cosine and sine."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":  # transformers computes this one in each model's own module, which takes seconds to import
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, scaling
