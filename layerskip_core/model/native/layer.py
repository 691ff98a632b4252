"""A decoder layer as the C kernels read it."""

from collections.abc import Callable, Iterable

from ..layer_weights import (
    NormWeights,
    Projection,
    attention_inputs,
    attention_output,
    layer_norms,
    mlp_inputs,
    mlp_output,
    stacked,
)
from ..spec import ModelSpec
from ..weights import Weights
from .compiled import CLayer, CNorm
from .matrix import Matrices, MatrixForm, NativeMatrix


class NativeLayer:
    """A layer's weights and the C structure with their addresses."""

    def __init__(self, matrices: Matrices, weights: Weights, spec: ModelSpec, index: int, kind: str) -> None:
        """`weights` are those of the layer; of its matrices only those that `matrices` asks for are read."""
        architecture = spec.architecture
        biased, gates = spec.attention_bias, 1 + architecture.gated
        first, *_, last = architecture.attention_projections

        def matrix(name: str, form: MatrixForm, read: Callable[[], Iterable[Projection]]) -> NativeMatrix:
            return matrices.matrix(f"layers.{index}.{name}", form, read)

        self._matrices = [
            matrix(
                "qkv",
                MatrixForm(kind, spec.hidden, spec.queries + 2 * spec.keys, biased=first in biased),
                lambda: [stacked(attention_inputs(weights, spec))],
            ),
            matrix(
                "output",
                MatrixForm(kind, spec.queries, spec.hidden, biased=last in biased),
                lambda: [attention_output(weights, spec)],
            ),
            matrix("up", MatrixForm(kind, spec.hidden, spec.inner, gates, spec.mlp_bias), lambda: mlp_inputs(weights, spec)),
            matrix(
                "down", MatrixForm(kind, spec.inner, spec.hidden, biased=spec.mlp_bias), lambda: [mlp_output(weights, spec)]
            ),
        ]
        norms = layer_norms(weights, spec)
        around = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
        self._norms = [NativeNorm(norm) for norm in (*around, norms.query, norms.key)]
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
