"""A decoder layer as the C kernels read it."""

from ...config.packing import Quantization
from ..layer_weights import NormWeights, Projection, layer_weights, stacked
from ..spec import ModelSpec
from ..weights import Weights
from .compiled import CLayer, CNorm, Kernels
from .matrix import NativeMatrix


class NativeLayer:
    """A layer's weights and the C structure with their addresses."""

    def __init__(
        self, kernels: Kernels, weights: Weights, spec: ModelSpec, index: int, quantization: Quantization | None
    ) -> None:
        parts = layer_weights(weights, spec)

        def matrix(*projections: Projection) -> NativeMatrix:
            biases = [projection.bias for projection in projections if projection.bias is not None]
            return NativeMatrix(kernels, [projection.weight for projection in projections], biases or None, quantization)

        self._matrices = [
            matrix(stacked([parts.query, parts.key, parts.value])),
            matrix(parts.output),
            matrix(parts.up) if parts.gate is None else matrix(parts.gate, parts.up),
            matrix(parts.down),
        ]
        around = (parts.before_attention, parts.after_attention, parts.before_mlp, parts.after_mlp)
        self._norms = [NativeNorm(norm) for norm in (*around, parts.query_norm, parts.key_norm)]
        rope = spec.rope_of[index]
        self.structure = CLayer(
            *(matrix.structure for matrix in self._matrices),
            *(norm.structure for norm in self._norms),
            -1 if rope is None else rope,
            spec.window_of(index) or 0,
        )


class NativeNorm:
    """A norm's weights in fp32, or none, and the C structure with their addresses."""

    def __init__(self, norm: NormWeights | None) -> None:
        stored = (None, None) if norm is None else (norm.weight, norm.bias)
        self._parts = [None if part is None else part.float().contiguous() for part in stored]
        self.structure = CNorm(*(None if part is None else part.data_ptr() for part in self._parts))
