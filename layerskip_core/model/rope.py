"""Rotary embeddings as complex numbers."""

from typing import Any

import torch
from torch import Tensor

from .cache import SpanWriter
from .weights import head_dim


class Rope:
    """Rotations by position as complex numbers; the table grows with the text."""

    def __init__(self, config: Any, like: Tensor) -> None:
        self._frequencies, self._scaling = _rope_frequencies(config)
        self._like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self._table = self._angles(0)  # (positions, 2, 1, half a head): the rotation, and 1 for what does not rotate

    def at(self, writer: SpanWriter, places: Tensor, groups: int) -> Tensor:
        """(B or 1, T, G+2, 1, half a head); 1 for rows that stand at the same positions."""
        if len(self._table) < writer.stop:
            self._table = self._angles(2 * writer.stop)
        rotations = self._table[None, writer.start : writer.stop] if writer.contiguous else self._table[places]
        one, kept = rotations[:, :, :1], rotations[:, :, 1:]
        return torch.cat([one.expand(-1, -1, groups + 1, -1, -1), kept], dim=2)

    def _angles(self, count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
        cos, sin = ((part * self._scaling).to(self._like) for part in (angles.cos(), angles.sin()))
        rotation = torch.complex(cos, sin)
        return torch.stack([rotation, torch.ones_like(rotation)], dim=1)[:, :, None]


def _rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """Radians a position of each pair of a head, (half a head,) in fp32, and what cosine and sine are multiplied by."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":  # transformers has this one in each model's own module, which takes seconds to import
        size = head_dim(config)
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))  # type: ignore[no-any-return]
