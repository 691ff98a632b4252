"""Where GGUF files lay out weights differently from transformers."""

import re

import torch
from torch import Tensor

from ..model.blocks import BlockForm
from ..model.configuration import ExpertsSpec, RecurrenceSpec
from ..model.spec import ModelSpec

_RENAMED = (  # names in transformers, and in the library gguf
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"\.(sinks|layer_scalar)$", r".\1.weight"),
    (r"experts\.(\w+_proj)_bias$", r"experts.\1.bias"),
    (r"experts\.(\w+_proj)$", r"experts.\1.weight"),
)


def gguf_parts(name: str) -> list[str]:
    """A weight's tensors in GGUF files, by names that the library gguf maps: one, or gate and up of
    experts.
    """
    for pattern, other in _RENAMED:
        name = re.sub(pattern, other, name)
    if ".experts.gate_up" not in name:
        return [name]
    return [name.replace("gate_up", part) for part in ("gate", "up")]


def from_gguf_shape(name: str, shapes: list[tuple[int, ...]], spec: ModelSpec) -> tuple[int, ...]:
    """A weight's shape in transformers, from those of its parts."""
    experts = spec.experts
    shape = shapes[0]
    if spec.recurrence is not None:
        convolution = spec.recurrence.mixer.convolution
        if name.endswith(f".{convolution}.weight"):
            return shape[0], 1, *shape[1:]
    if experts is None or experts.names.prefix not in name:
        return shape
    joined = shape[0], shape[1] * len(shapes), *shape[2:]
    if experts.names.by_inputs:
        return joined[:1] + joined[:0:-1]
    return joined


def from_gguf(
    name: str,
    parts: list[Tensor],
    spec: ModelSpec,
    interleaved: bool,
    form: BlockForm | None = None,
) -> Tensor | None:
    """A weight in transformers' order; None if reordering would split blocks.

    `interleaved`: whether the file's rope is. `form`: of rows of blocks; experts stay (experts,
    outputs, bytes).
    """
    sizes = spec.recurrence
    weight = parts[0]
    kind = name.split(".")[-2]
    if spec.experts is not None and spec.experts.names.prefix in name:
        return _experts(name, parts, spec.experts, form)
    if interleaved and kind in ("q_proj", "k_proj"):
        heads = spec.heads if kind == "q_proj" else spec.kv_heads
        return weight.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
    if sizes is None or ".linear_attn." not in name or kind == "norm":
        return weight
    if sizes.heads == sizes.key_heads:
        return weight
    if kind == "out_proj":  # its inputs are the value heads
        if form is not None and sizes.value_dim % form.inputs:
            return None
        return _by_key_head(weight.T, sizes).T.contiguous()
    before = 0  # rows of queries and keys, which stay
    if kind in ("in_proj_qkv", "conv1d"):
        before = 2 * sizes.key_width
    return torch.cat([weight[:before], _by_key_head(weight[before:], sizes)])


def _experts(
    name: str, parts: list[Tensor], experts: ExpertsSpec, form: BlockForm | None
) -> Tensor:
    if not experts.names.by_inputs:
        return torch.cat(parts, 1)
    weight = parts[0]
    if ".gate_up_" in name:
        gate, up = parts if len(parts) > 1 else weight.chunk(2, 1)
        weight = torch.stack([gate, up], 2).flatten(1, 2)  # in turns
    if form is None and weight.dim() > 2:
        return weight.transpose(1, 2)
    return weight


def _by_key_head(rows: Tensor, sizes: RecurrenceSpec) -> Tensor:
    """Groups rows of value heads by key head; the file interleaves them over key heads."""
    turns = rows.reshape(sizes.heads // sizes.key_heads, sizes.key_heads, -1, *rows.shape[1:])
    return turns.transpose(0, 1).reshape(rows.shape)
