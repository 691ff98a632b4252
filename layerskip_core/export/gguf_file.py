"""A model as a GGUF file, as llama.cpp reads it."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..model.rope import llama3_factors
from ..model.spec import ModelSpec, RopeSpec
from .gguf_tokenizer import add_tokenizer

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_GEMMA_PERIOD = 6  # llama.cpp gives every sixth layer of Gemma 3 full attention
_BLOCK = 32  # numbers of a row that share a scale in q8_0 and q4_0


def write_gguf(model: Any, tokenizer: Any, spec: ModelSpec, path: Path, kind: str) -> None:
    """Writes a transformers model in fp32. `kind`, of its matrices: f16, q8_0 or q4_0.

    Vectors stay in fp32. With q4_0 the embedding and the head are q8_0, and rows that are no multiple of 32 stay f16.

    Raises CheckpointError for a model or tokenizer that llama.cpp would not run alike, and ConfigError if the library `gguf` is
    missing.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("`format` gguf needs the library gguf: pip install 'layerskip[gguf]'", "format") from None
    name = _ARCHITECTURES.get(spec.model_type)
    if name is None:
        raise CheckpointError(f"for GGUF model_type must be one of {', '.join(_ARCHITECTURES)}, found {spec.model_type}")
    _check(spec)
    writer = gguf.GGUFWriter(path, name)
    try:
        _add_values(writer, spec, gguf, kind)
        add_tokenizer(writer, tokenizer, spec.vocab)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), spec.layers)
        for weight_name in spec.shapes:
            weight = _as_stored(weight_name, model.get_parameter(weight_name).detach(), spec)
            stored = names.get_name(weight_name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, weight_name
            _add(writer, stored, weight, _kind_of(weight_name, weight, kind), gguf)
        if (factors := rope_factors(spec)) is not None:
            _add(writer, "rope_freqs.weight", factors, "f32", gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_values(writer: Any, spec: ModelSpec, gguf: Any, kind: str) -> None:
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.inner)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_vocab_size(spec.vocab)
    full = _full_rope(spec)
    writer.add_rope_freq_base(float(full.parameters["rope_theta"]))
    if full.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(full.parameters["factor"]))
    if spec.window is not None:
        writer.add_sliding_window(spec.window)
        writer.add_rope_freq_base_swa(float(spec.ropes[spec.rope_of[0] or 0].parameters["rope_theta"]))
    if spec.logits_cap is not None:
        writer.add_final_logit_softcapping(spec.logits_cap)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _check(spec: ModelSpec) -> None:
    """Raises CheckpointError for what llama.cpp does not read from the file but takes from the architecture."""
    pattern = tuple((layer + 1) % _GEMMA_PERIOD != 0 for layer in range(spec.layers))
    windows = tuple(spec.window_of(layer) is not None for layer in range(spec.layers))
    gemma = spec.model_type == "gemma3_text"
    activation = "gelu_pytorch_tanh" if gemma else "silu"
    for holds, what in (
        (windows == pattern if gemma else not any(windows), "sliding windows in other layers than llama.cpp gives it"),
        (spec.activation == activation, f"the activation {spec.activation}, where llama.cpp has {activation}"),
        (math.isclose(spec.attention_scale, spec.head_dim**-0.5), "attention scores scaled otherwise than by its head size"),
        (_full_rope(spec).type in ("default", "linear", "llama3"), f"a rope of type {_full_rope(spec).type}"),
    ):
        if not holds:
            raise CheckpointError(f"this {spec.model_type} cannot be a GGUF file: it has {what}")


def _full_rope(spec: ModelSpec) -> RopeSpec:
    """The rope of layers with full attention; that of the sliding ones if there are no others."""
    places = [rope for layer, rope in enumerate(spec.rope_of) if spec.window_of(layer) is None] or list(spec.rope_of)
    return spec.ropes[places[0] or 0]


def _as_stored(name: str, weight: Tensor, spec: ModelSpec) -> Tensor:
    """llama.cpp's form of a weight: it rotates neighbours in a Llama's heads, not halves, and adds no 1 to Gemma's norms."""
    if _ARCHITECTURES[spec.model_type] == "llama" and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
        heads = spec.heads if part == "q_proj" else spec.kv_heads
        return weight.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
    if spec.architecture.norm == "rms_plus_one" and name.endswith("norm.weight"):
        return weight + 1
    return weight


def _kind_of(name: str, weight: Tensor, kind: str) -> str:
    if weight.dim() == 1:
        return "f32"
    if kind == "q4_0" and not name.startswith("model.layers."):
        kind = "q8_0"
    return kind if weight.shape[-1] % _BLOCK == 0 else "f16"


def _add(writer: Any, name: str, weight: Tensor, kind: str, gguf: Any) -> None:
    form = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, gguf.quants.quantize(weight.contiguous().float().numpy(), form), raw_dtype=form)


def rope_factors(spec: ModelSpec) -> Tensor | None:
    """What llama.cpp divides the frequencies of a Llama 3 by, (head_dim / 2,); None for other ropes."""
    rope = _full_rope(spec)
    return llama3_factors(rope.parameters, spec.head_dim) if rope.type == "llama3" else None
