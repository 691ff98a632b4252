"""A model in a GGUF file as transformers has it: configuration, weights and tokenizer. The package `gguf` reads the file."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, first_line
from ..model import ModelSpec
from ..model.rope import llama3_factors
from ..model.transformers_backend import attention_for

_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_VOCABULARY = "tokenizer.ggml.tokens"
_HEAD_WEIGHT = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPES = ("rope_factors_long.weight", "rope_factors_short.weight")  # the file does not say for which lengths
# YaRN's further numbers, which transformers sets as well: others are refused.
_YARN = {"yarn_ext_factor": 1.0, "attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}


# Architectures of GGUF: the model type in transformers, and the class of its tokenizer there.
_FORMS = {
    "llama": ("llama", "PreTrainedTokenizerFast"),
    "qwen2": ("qwen2", "Qwen2Tokenizer"),
    "qwen3": ("qwen3", "Qwen2Tokenizer"),
    "phi3": ("phi3", "PreTrainedTokenizerFast"),
    "gemma2": ("gemma2", "GemmaTokenizer"),
    "gemma3": ("gemma3_text", "GemmaTokenizer"),
    "starcoder2": ("starcoder2", "GPT2Tokenizer"),
}
_HEAD_SIZES = ("llama", "qwen3")  # whose files name the size of a head where transformers does not look


class GgufFile:
    """A GGUF file, whose tensors are mapped. `layers` and `tokens`: their numbers, None where the file does not say.

    `config` and `spec` raise CheckpointError for an unsupported architecture, and for values that are missing or out of range.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a damaged file, and ConfigError if the package `gguf` is missing."""
        try:
            from gguf import GGUFReader, GGUFValueType
        except ImportError:
            raise ConfigError("a .gguf file needs the library gguf: pip install 'layerskip[gguf]'") from None
        try:
            reader = GGUFReader(path)
            fields = {name: field for name, field in reader.fields.items() if field.types}
            arrays = {name: field for name, field in fields.items() if field.types[0] == GGUFValueType.ARRAY}
            self._values = {name: field.contents() for name, field in fields.items() if name not in arrays}
        except Exception as error:
            raise CheckpointError(f"{path.name} is damaged, or no GGUF file: {first_line(error)}") from error
        self._path, self._tensors = path, {tensor.name: tensor for tensor in reader.tensors}
        self._architecture = str(self._values.get("general.architecture"))
        self.layers: int | None = self._values.get(f"{self._architecture}.block_count")
        self.tokens = len(arrays[_VOCABULARY].data) if _VOCABULARY in arrays else None

    @cached_property
    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import AutoConfig
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        values, name = self._values, self._architecture
        if name not in _FORMS:
            raise CheckpointError(f"the GGUF architecture must be one of {', '.join(_FORMS)}, found {name}")
        heads = {"attention.key_length": "head_dim"} if name in _HEAD_SIZES else {}
        keys = {f"{name}.{key}": known for key, known in (GGUF_CONFIG_MAPPING[name] | heads).items() if known}
        keys |= {f"tokenizer.ggml.{key}_token_id": known for key, known in _TOKENS.items()}
        keys["general.name"] = "_model_name_or_path"
        settings = {known: values[key] for key, known in keys.items() if key in values}
        if self.tokens is not None:
            settings.setdefault("vocab_size", self.tokens)
        # llama.cpp has no architecture of its own for Mistral
        model_type = "mistral" if name == "llama" and values.get("general.name") == "mistral" else _FORMS[name][0]
        config = AutoConfig.for_model(model_type, tie_word_embeddings=_HEAD_WEIGHT not in self._tensors, **settings)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope |= self._scaled_rope(rope, head_dim, config.max_position_embeddings)
        return config

    @property
    def vocab(self) -> int:
        return self.spec.vocab

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.of(self.config)

    def _scaled_rope(self, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
        """The entries to change in `rope`, which is not scaled. Raises CheckpointError for a scaling of another kind.

        Linear and YaRN are named in the header. For Llama 3 the file has only what each frequency is divided by: the original
        context is then one that gives these factors.
        """
        prefix = f"{self._architecture}.rope."
        named = {key.removeprefix(prefix): value for key, value in self._values.items() if key.startswith(prefix)}
        found = str(named.get("scaling.type", "linear"))
        factor = float(named.get("scaling.factor", named.get("scale_linear", 1.0)) or 1.0)
        unusual = [key for key, value in _YARN.items() if named.get(f"scaling.{key}", value) != value]
        if unusual:
            found = unusual[0]
        elif found in ("none", "linear", "yarn") and self._tensors.keys().isdisjoint(_LONG_ROPES):
            if _ROPE_FACTORS not in self._tensors:
                original = {"original_max_position_embeddings": int(named.get("scaling.original_context_length", context))}
                scaled = {"rope_type": found, "factor": factor} | (original if found == "yarn" else {})
                return {} if found == "none" or factor == 1.0 else scaled
            factors = torch.from_numpy(np.array(self._tensors[_ROPE_FACTORS].data, np.float64))
            if (factors == 1).all():
                return {}
            # All of Llama 3 has these further factors, and so far 8192 as the original context.
            llama3 = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            for exponent in (13, *range(3, context.bit_length())):
                scaled = {**llama3, "original_max_position_embeddings": 2**exponent}
                expected = llama3_factors({**rope, **scaled}, head_dim)
                if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4, atol=0):
                    return scaled
            found = f"{_ROPE_FACTORS} with other factors than those of Llama 3"
        known = "plain, or scaled as linear, yarn or llama3"
        raise CheckpointError(f"{self._path.name}: its rope must be {known}; found {found}; use the original checkpoint")

    def tokenizer(self) -> Any:
        """transformers' tokenizer. Raises CheckpointError for a file without one."""
        import transformers

        if self.tokens is None:
            raise CheckpointError(f"{self._path.name} has no tokenizer: {_VOCABULARY} is missing")
        kind = getattr(transformers, _FORMS[self._architecture][1])
        return kind.from_pretrained(self._path.parent, gguf_file=self._path.name)

    def model(self) -> Any:
        """A transformers model in fp32 with the values as the file has them. Raises CheckpointError as `weights` does."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kernels = attention_for(self.config)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].from_pretrained(
            None, config=self.config, state_dict=self.weights(), dtype=torch.float32, attn_implementation=kernels
        )
        model.config.name_or_path = str(self._path)
        return model

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32 by their names in transformers.

        Raises CheckpointError, before any is read, for one that is missing or has another shape; and for one that is stored in
        a way that the package `gguf` does not read.
        """
        from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        known = get_tensor_name_map(kinds[self._architecture], self.spec.layers)
        names = {name: str(known.get_name(name, try_suffixes=(".weight", ".bias"))) for name in self.spec.shapes}
        tensors = {name: self._tensors[known] for name, known in names.items() if known in self._tensors}
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
        self.spec.check_weights(shapes)
        weights = {}
        for name, tensor in tensors.items():
            try:
                values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            except (ValueError, NotImplementedError) as error:
                raise CheckpointError(f"{name} is stored in a way that the library gguf does not read: {error}") from None
            weights[name] = self._in_transformers(name, torch.from_numpy(values.reshape(shapes[name])))
        return weights

    def _in_transformers(self, name: str, weight: Tensor) -> Tensor:
        """A weight in transformers' layout; the inverse of the export to GGUF."""
        spec = self.spec  # Llama's heads are in the order of llama.cpp's rope, which rotates neighbours, not halves
        if self._architecture == "llama" and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
            heads = spec.heads if part == "q_proj" else spec.kv_heads
            return weight.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        return weight - 1 if spec.architecture.norm == "rms_plus_one" and name.endswith("norm.weight") else weight
