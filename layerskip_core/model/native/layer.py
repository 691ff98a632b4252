"""A decoder layer as the C kernels read it."""

import torch

from ...config.packing import Quantization
from ..spec import ModelSpec
from ..weights import Weights
from .compiled import CLayer
from .matrix import NativeMatrix


class NativeLayer:
    """A layer's weights and the C structure that says where they are."""

    def __init__(self, weights: Weights, spec: ModelSpec, index: int, quantization: Quantization | None) -> None:
        attention, mlp = weights.below("self_attn."), weights.below("mlp.")
        qkv, qkv_bias = attention.together(("q_proj", "k_proj", "v_proj"))
        gate_up, gate_up_bias = mlp.together(("gate_proj", "up_proj"))
        self.matrices = [
            NativeMatrix([torch.cat(qkv)], None if qkv_bias is None else [torch.cat(qkv_bias)], quantization),
            _single(attention, "o_proj", quantization),
            NativeMatrix(gate_up, gate_up_bias, quantization),
            _single(mlp, "down_proj", quantization),
        ]
        self.norms = [
            None if norm is None else norm.float()
            for norm in (
                weights.of("input_layernorm.weight"),
                weights.of("post_attention_layernorm.weight"),
                attention.get("q_norm.weight"),
                attention.get("k_norm.weight"),
            )
        ]
        self.structure = CLayer(
            *(matrix.structure for matrix in self.matrices),
            *(None if norm is None else norm.data_ptr() for norm in self.norms),
            int(spec.rotates[index]),
            spec.window_of(index) or 0,
        )


def _single(weights: Weights, name: str, quantization: Quantization | None) -> NativeMatrix:
    bias = weights.get(f"{name}.bias")
    return NativeMatrix([weights.of(f"{name}.weight")], None if bias is None else [bias], quantization)
