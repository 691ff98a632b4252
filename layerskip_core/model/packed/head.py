"""The final norm and the head on repacked weights."""

from functools import partial

import torch
from torch import Tensor

from ...config.packing import EXACT_TOKENS, Quantization
from ..layer_weights import NormWeights
from ..logits import scaled_logits
from ..spec import ModelSpec
from .exact import ExactRows
from .layer import Norm
from .linear import linear


class PackedHead:
    def __init__(
        self, norm: NormWeights, weight: Tensor, spec: ModelSpec, quantization: Quantization | None, exact: bool
    ) -> None:
        """Final norm and head (N, D)."""
        self._spec = spec
        self._norm = Norm(norm, spec.eps, quantization is None and weight.dtype.itemsize >= 4)
        self.linear = linear(self._norm.folded_into(weight), None, quantization, exact)
        self._exact = ExactRows() if exact else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N)."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size)
        if self._exact is not None and 1 < len(rows) <= EXACT_TOKENS:
            most = self._exact.at_once(partial(self._same_alone, rows))
            logits = torch.cat([self._logits(part) for part in torch.split(rows, most)])
        else:
            logits = self._logits(rows)
        return logits.view(*shape, logits.shape[-1])

    def _logits(self, rows: Tensor) -> Tensor:
        return scaled_logits(self.linear(self._norm(rows)), self._spec)

    def _same_alone(self, like: Tensor, count: int) -> bool:
        generator = torch.Generator(like.device).manual_seed(count)
        rows = torch.randn(count, like.shape[1], generator=generator, device=like.device).to(like.dtype)
        return torch.equal(self._logits(rows), torch.cat([self._logits(row[None]) for row in rows]))
