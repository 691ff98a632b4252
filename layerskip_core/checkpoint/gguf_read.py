"""A model in a GGUF file as transformers has it: configuration, weights and tokenizer. The header is read once."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..model import ModelSpec
from ..model.config_values import check_named
from ..model.generic import attention_for
from .gguf_header import GgufTensor, read_gguf_header
from .gguf_rope import scaled_rope

# The keys of every architecture, without its name before them, and those of config.json that they become.
_VALUES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_ROPE, _RMS = {"rope.freq_base": "rope_theta"}, {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD, _WINDOW = {"attention.key_length": "head_dim"}, {"attention.sliding_window": "sliding_window"}
_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_VOCABULARY = "tokenizer.ggml.tokens"
_HEAD_WEIGHT = "output.weight"


class _Form(NamedTuple):
    """How an architecture of GGUF is one of transformers."""

    model_type: str
    tokenizer: str  # its class in transformers
    values: dict[str, str]  # as _VALUES
    rotates_neighbours: bool = False  # the rows of a head are in the order of llama.cpp's rope, not in halves


_FORMS = {
    "llama": _Form("llama", "PreTrainedTokenizerFast", _ROPE | _RMS | {"rope.dimension_count": "head_dim"} | _HEAD, True),
    "qwen2": _Form("qwen2", "Qwen2Tokenizer", _ROPE | _RMS),
    "qwen3": _Form("qwen3", "Qwen2Tokenizer", _ROPE | _RMS | _HEAD),
    "phi3": _Form("phi3", "PreTrainedTokenizerFast", _ROPE | _RMS),
    "gemma2": _Form("gemma2", "GemmaTokenizer", _ROPE | _RMS | _HEAD | _WINDOW),
    "gemma3": _Form("gemma3_text", "GemmaTokenizer", _ROPE | _RMS | _HEAD | _WINDOW),
    "starcoder2": _Form("starcoder2", "GPT2Tokenizer", {"attention.layer_norm_epsilon": "norm_epsilon"}),
}


class GgufModel:
    """A GGUF file whose header was read and checked; no weight was."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a damaged file, an unsupported architecture, and values missing or out of range."""
        self._path = path
        self._header = read_gguf_header(path)
        name = self._header.architecture
        if name not in _FORMS:
            raise CheckpointError(f"the GGUF architecture must be one of {', '.join(_FORMS)}, found {name}")
        self._form = _FORMS[name]
        self.config = self._config()
        self.spec = ModelSpec.of(self.config)
        if self.spec.parameters > self._header.parameters:
            raise CheckpointError(f"needed {self.spec.parameters} weights, by its sizes; found {self._header.parameters}")

    def _config(self) -> Any:
        """transformers' configuration."""
        from transformers import AutoConfig

        header, form = self._header, self._form
        name = header.architecture
        for key in _NEEDED:
            if f"{name}.{key}" not in header.values:
                raise CheckpointError(f"{self._path.name} has no {name}.{key}")
        keys = {f"{name}.{key}": known for key, known in (_VALUES | form.values).items()}
        check_named(header.values, keys)
        keys |= {f"tokenizer.ggml.{key}_token_id": known for key, known in _TOKENS.items()}
        keys["general.name"] = "_model_name_or_path"
        values = {known: header.values[key] for key, known in keys.items() if key in header.values}
        if (pieces := header.lengths.get(_VOCABULARY)) is not None:
            values.setdefault("vocab_size", pieces)
            self._check_tokens(pieces)
        tied = _HEAD_WEIGHT not in header.tensors
        # llama.cpp has no architecture of its own for Mistral
        is_mistral = form.model_type == "llama" and header.values.get("general.name") == "mistral"
        model_type = "mistral" if is_mistral else form.model_type
        config = AutoConfig.for_model(model_type, tie_word_embeddings=tied, **values)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope |= scaled_rope(self._path, header, rope, head_dim, config.max_position_embeddings)
        return config

    def _check_tokens(self, pieces: int) -> None:
        """Raises CheckpointError for a special token that is not in the vocabulary."""
        for key in _TOKENS:
            name = f"tokenizer.ggml.{key}_token_id"
            token = self._header.values.get(name, 0)
            if not isinstance(token, int) or not 0 <= token < pieces:
                raise CheckpointError(f"{self._path.name}: {name} must be one of {pieces} tokens, got {token}")

    def tokenizer(self) -> Any:
        """transformers' tokenizer. Raises CheckpointError for a file without one."""
        import transformers

        if _VOCABULARY not in self._header.lengths:
            raise CheckpointError(f"{self._path.name} has no tokenizer: {_VOCABULARY} is missing")
        kind = getattr(transformers, self._form.tokenizer)
        return kind.from_pretrained(self._path.parent, gguf_file=self._path.name)

    def check_weights(self) -> None:
        """Reads no weight.

        Raises CheckpointError for one that is missing, has another shape, is stored in an unknown way or goes beyond the file,
        and ConfigError if the library `gguf` is missing.
        """
        tensors, there = self._header.tensors, self._path.stat().st_size
        stored = {name: tensors[known] for name, known in self._names().items() if known in tensors}
        self.spec.check_weights({name: tensor.shape for name, tensor in stored.items()})
        for name, tensor in stored.items():
            end = tensor.start + math.prod(_stored_as(name, tensor)[1])
            if end > there:
                raise CheckpointError(f"{self._path.name} is damaged: {name} ends at byte {end} of {there}")

    def model(self) -> Any:
        """A transformers model in fp32 with the values as the file has them. `check_weights` comes first."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kernels = attention_for(self.spec)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].from_pretrained(
            None, config=self.config, state_dict=self.weights(), dtype=torch.float32, attn_implementation=kernels
        )
        model.config.name_or_path = str(self._path)
        return model

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32 by their names in transformers. `check_weights` comes first."""
        from gguf import dequantize

        content = np.memmap(self._path, mode="r")

        def read(name: str, tensor: GgufTensor) -> Tensor:
            kind, size = _stored_as(name, tensor)
            values = dequantize(content[tensor.start : tensor.start + math.prod(size)].reshape(size), kind)
            return self._in_transformers(name, torch.from_numpy(np.array(values, np.float32).reshape(tensor.shape)))

        return {name: read(name, self._header.tensors[known]) for name, known in self._names().items()}

    def _names(self) -> dict[str, str]:
        """The names of all weights in the file, by those in transformers."""
        try:
            from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        except ImportError:
            raise ConfigError("a .gguf file needs the library gguf: pip install 'layerskip[gguf]'") from None
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(kinds[self._header.architecture], self.spec.layers)
        return {name: str(names.get_name(name, try_suffixes=(".weight", ".bias"))) for name in self.spec.shapes}

    def _in_transformers(self, name: str, weight: Tensor) -> Tensor:
        """A weight as transformers has it; the reverse of what `export.gguf_file` does."""
        spec = self.spec
        if self._form.rotates_neighbours and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
            heads = spec.heads if part == "q_proj" else spec.kv_heads
            return weight.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        if spec.architecture.norm == "rms_plus_one" and name.endswith("norm.weight"):
            return weight - 1
        return weight


def _stored_as(name: str, tensor: GgufTensor) -> tuple[Any, tuple[int, ...]]:
    """gguf's kind of a weight, and the bytes of its dimensions. Raises CheckpointError for one that the library cannot read."""
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quant_shape_to_byte_shape

    try:
        kind = GGMLQuantizationType(tensor.kind)
        size = quant_shape_to_byte_shape(tensor.shape, kind)
        dequantize(np.zeros((1, size[-1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{name} is stored in a way that the library gguf does not read: {error}") from None
    return kind, size
