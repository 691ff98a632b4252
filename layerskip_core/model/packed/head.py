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
from .linear import Linear, linear


class PackedHead:
    """Norm and head (N, D)."""

    def __init__(self, norm: Norm, linear: Linear, unfolded: Linear | None, spec: ModelSpec, exact: bool) -> None:
        """`linear`: of the head with the norm folded into it; `unfolded`: the same without, for other norms."""
        self._spec = spec
        self._norm, self.linear, self._unfolded = norm, linear, unfolded
        self._exact = ExactRows() if exact else None

    def with_norm(self, norm: NormWeights) -> "PackedHead":
        """The same matrix after another norm."""
        assert self._unfolded is not None
        unfolded = Norm(norm, self._spec.eps, folds=False)
        return PackedHead(unfolded, self._unfolded, self._unfolded, self._spec, self._exact is not None)

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


def packed_head(
    weights: NormWeights, weight: Tensor, spec: ModelSpec, quantization: Quantization | None, exact: bool, renormed: bool
) -> PackedHead:
    """Of a norm and a matrix (N, D). `renormed`: other norms will follow, which need it without this one folded into it."""
    norm = Norm(weights, spec.eps, quantization is None and weight.dtype.itemsize >= 4)
    folded = norm.folded_into(weight)
    product = linear(folded, None, quantization, exact)
    unfolded = product if folded is weight else linear(weight, None, quantization, exact) if renormed else None
    return PackedHead(norm, product, unfolded, spec, exact)


class PackedJoin:
    """The map (D, 2D) before an exit block."""

    def __init__(self, weight: Tensor, quantization: Quantization | None) -> None:
        self._linear = linear(weight, None, quantization)

    def __call__(self, joined: Tensor) -> Tensor:
        """(..., 2D) to (..., D)."""
        *shape, size = joined.shape
        rows = self._linear(joined.reshape(-1, size))
        return rows.view(*shape, rows.shape[-1])
