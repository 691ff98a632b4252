"""The most probable tokens by the C kernels: layers, head and choice are one call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import KVCache
from .compiled import CChoice
from .head import NativeHead
from .span import NativeLayers

_MOST_ROWS = 64  # whose logits are kept


@dataclass(frozen=True)
class OneCallChoice:
    """A `Chooser` by a chain of layers and a head."""

    layers: NativeLayers
    head: NativeHead

    def __call__(
        self, tokens: Tensor, hidden: Tensor | None, start: int, stop: int, positions: Tensor, cache: KVCache
    ) -> Tensor | None:
        layers, head = self.layers, self.head
        batch, count = tokens.shape
        if batch * count > _MOST_ROWS or not layers.has(range(start, stop)) or cache.rows != batch:
            return None
        if hidden is None:
            tokens = tokens.contiguous()
            if not all(0 <= token < len(layers.embedding) for row in tokens.tolist() for token in row):
                raise ValueError("a token that the model does not have")
            rows = torch.empty(batch, count, layers.embedding.shape[1])
        else:
            rows = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place
        buffers, places = layers.pool.of(batch * count), positions.contiguous()
        layers.place(buffers, cache, cache.writer(positions).stop, places, start, stop)
        buffers.call.rows_per_sequence = count
        buffers.call.hidden = rows.data_ptr()
        chosen = torch.empty(batch, count, dtype=torch.long)
        choice = CChoice(
            layers.embedding.data_ptr(),
            tokens.data_ptr() if hidden is None else None,
            buffers.logits(head.product.matrix.outputs).data_ptr(),
            chosen.data_ptr(),
        )
        layers.kernels.choose(
            *(layers.shape, layers.address(start), stop - start, head.product.norm.structure),
            *(head.product.matrix.structure, buffers.call, choice, buffers.threads),
        )
        return chosen
