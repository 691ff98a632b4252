"""Rotary embeddings as complex numbers."""

from typing import Any

import torch
from torch import Tensor

from .cache import SpanWriter
from .spec import ModelSpec


class Rope:
    """Rotations by position as complex numbers, for a key head's slots: its G queries, the key and the value.

    The queries' have the length that attention scales scores by, those of values are 1. The table grows with the text.
    """

    def __init__(self, config: Any, spec: ModelSpec, like: Tensor) -> None:
        self._frequencies, self._scaling = _rope_frequencies(config, spec.head_dim)
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        groups = spec.heads // spec.kv_heads
        self._lengths = self._like.new_tensor([spec.head_dim**-0.5] * groups + [1.0])[:, None]
        self.still = self._slots(torch.ones_like(self.angles(1)))  # (T = 1, 1, G+2, half a head), of layers without rope
        self._table = self._slots(self.angles(0))

    def at(self, writer: SpanWriter, places: Tensor) -> Tensor:
        """(B, T, 1, G+2, half a head), without B for rows that stand at the same positions."""
        if len(self._table) < writer.stop:
            self._table = self._slots(self.angles(2 * writer.stop))
        return self._table[writer.start : writer.stop] if writer.contiguous else self._table[places]

    def angles(self, count: int) -> Tensor:
        """Rotations of the first positions, (positions, half a head), complex."""
        angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
        cos, sin = ((part * self._scaling).to(self._like) for part in (angles.cos(), angles.sin()))
        return torch.complex(cos, sin)

    def _slots(self, rotations: Tensor) -> Tensor:
        rotating = rotations[:, None, None] * self._lengths
        return torch.cat([rotating, torch.ones_like(rotating[:, :, :1])], dim=2)


def _rope_frequencies(config: Any, size: int) -> tuple[Tensor, float]:
    """Radians a position of each pair of a head, (half a head,) in fp32, and what cosine and sine are multiplied by."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":  # transformers has this one in each model's own module, which takes seconds to import
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))  # type: ignore[no-any-return]
