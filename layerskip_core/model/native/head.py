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


class NativeProduct:
    """A matrix, after a norm if there is one."""

    def __init__(
        self, kernels: Kernels, shape: CShape, pool: BufferPool, norm: NormWeights | None, matrix: NativeMatrix
    ) -> None:
        self._kernels, self._shape, self._pool = kernels, shape, pool
        self.norm, self.matrix = NativeNorm(norm), matrix

    def with_norm(self, norm: NormWeights) -> "NativeProduct":
        """The same matrix after another norm."""
        return NativeProduct(self._kernels, self._shape, self._pool, norm, self.matrix)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs) in fp32."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size).to(torch.float32).contiguous()
        count = len(rows)
        outputs = torch.empty(count, self.matrix.outputs)
        most = rows_at_once(count, self._pool.row_bytes)
        if count <= most:
            self._score(rows, outputs)
        else:
            for part, out in zip(torch.split(rows, most), torch.split(outputs, most), strict=True):
                self._score(part, out)
        return outputs.view(*shape, self.matrix.outputs)

    def _score(self, rows: Tensor, out: Tensor) -> None:
        buffers = self._pool.of(len(rows))
        buffers.call.hidden = rows.data_ptr()
        self._kernels.score(
            self._shape, self.norm.structure, self.matrix.structure, buffers.call, out.data_ptr(), buffers.threads
        )


class NativeHead:
    """Final norm and head (N, D)."""

    def __init__(self, product: NativeProduct, spec: ModelSpec) -> None:
        self.product, self._spec = product, spec
        self.logits_scale, self.logits_cap = 1 / spec.logits_divisor, spec.logits_cap or 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the logits are the product itself: rounding in a scale or a cap could make two of them equal."""
        return self.logits_scale == 1 and not self.logits_cap

    def with_norm(self, norm: NormWeights) -> "NativeHead":
        """The same matrix after another norm."""
        return NativeHead(self.product.with_norm(norm), self._spec)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N) in fp32."""
        return scaled_logits(self.product(hidden), self._spec)
