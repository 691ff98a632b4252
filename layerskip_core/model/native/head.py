"""The final norm and the head by the C kernels."""

import torch
from torch import Tensor

from ..layer_weights import NormWeights
from ..logits import scaled_logits
from ..spec import ModelSpec
from ..splitting import rows_at_once
from .buffers import BufferPool
from .compiled import CShape, Kernels
from .layer import NativeNorm
from .matrix import NativeMatrix


class NativeHead:
    def __init__(
        self, kernels: Kernels, shape: CShape, pool: BufferPool, spec: ModelSpec, norm: NormWeights, matrix: NativeMatrix
    ) -> None:
        """Final norm and head (N, D)."""
        self._kernels, self._shape, self._pool, self._spec = kernels, shape, pool, spec
        self.norm, self.matrix = NativeNorm(norm), matrix
        self.logits_scale, self.logits_cap = 1 / spec.logits_divisor, spec.logits_cap or 0.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N) in fp32."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size).to(torch.float32).contiguous()
        count = len(rows)
        logits = torch.empty(count, self.matrix.outputs)
        most = rows_at_once(count, self._pool.row_bytes)
        if count <= most:
            self._score(rows, logits)
        else:
            for part, out in zip(torch.split(rows, most), torch.split(logits, most), strict=True):
                self._score(part, out)
        return scaled_logits(logits.view(*shape, self.matrix.outputs), self._spec)

    def _score(self, rows: Tensor, out: Tensor) -> None:
        buffers = self._pool.of(len(rows))
        buffers.call.hidden = rows.data_ptr()
        self._kernels.score(
            self._shape, self.norm.structure, self.matrix.structure, buffers.call, out.data_ptr(), buffers.threads
        )
