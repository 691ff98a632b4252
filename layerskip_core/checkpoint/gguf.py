"""A model in a GGUF file as transformers has it: configuration, weights and tokenizer. The package `gguf` reads the file."""

from collections.abc import Mapping
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
    """The content of a GGUF file; its tensors are mapped."""

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
            self.values = {name: field.contents() for name, field in fields.items() if name not in arrays}
        except Exception as error:
            raise CheckpointError(f"{path.name} is damaged, or no GGUF file: {first_line(error)}") from error
        self.path = path
        self.lengths = {name: len(field.data) for name, field in arrays.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.values.get("general.architecture"))

    @property
    def layers(self) -> int | None:
        return self.values.get(f"{self.architecture}.block_count")

    @property
    def tokens(self) -> int | None:
        return self.lengths.get(_VOCABULARY)


class GgufModel:
    """A model in a GGUF file; only its metadata is read yet."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a damaged file, an unsupported architecture, and values missing or out of range."""
        self._file = GgufFile(path)
        if self._file.architecture not in _FORMS:
            raise CheckpointError(f"the GGUF architecture must be one of {', '.join(_FORMS)}, found {self._file.architecture}")
        self._model_type, self._tokenizer = _FORMS[self._file.architecture]
        self.config = self._config()
        self.spec = ModelSpec.of(self.config)

    def _config(self) -> Any:
        """transformers' configuration."""
        from transformers import AutoConfig
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        values, name = self._file.values, self._file.architecture
        heads = {"attention.key_length": "head_dim"} if name in _HEAD_SIZES else {}
        keys = {f"{name}.{key}": known for key, known in (GGUF_CONFIG_MAPPING[name] | heads).items() if known}
        keys |= {f"tokenizer.ggml.{key}_token_id": known for key, known in _TOKENS.items()}
        keys["general.name"] = "_model_name_or_path"
        settings = {known: values[key] for key, known in keys.items() if key in values}
        if self._file.tokens is not None:
            settings.setdefault("vocab_size", self._file.tokens)
        tied = _HEAD_WEIGHT not in self._file.tensors
        # llama.cpp has no architecture of its own for Mistral
        is_mistral = name == "llama" and values.get("general.name") == "mistral"
        config = AutoConfig.for_model("mistral" if is_mistral else self._model_type, tie_word_embeddings=tied, **settings)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope |= self._scaled_rope(rope, head_dim, config.max_position_embeddings)
        return config

    def _scaled_rope(self, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
        """The entries to change in `rope`, which is not scaled. Raises CheckpointError for a scaling of another kind.

        Linear and YaRN are named in the header. For Llama 3 the file has only what each frequency is divided by: the original
        context is then one that gives these factors.
        """
        prefix, tensors = f"{self._file.architecture}.rope.", self._file.tensors
        named = {key.removeprefix(prefix): value for key, value in self._file.values.items() if key.startswith(prefix)}
        kind = str(named.get("scaling.type", "linear"))
        factor = float(named.get("scaling.factor", named.get("scale_linear", 1.0)) or 1.0)
        unusual = [key for key, value in _YARN.items() if named.get(f"scaling.{key}", value) != value]
        if unusual or not tensors.keys().isdisjoint(_LONG_ROPES) or kind not in ("none", "linear", "yarn"):
            raise self._unknown_rope(unusual[0] if unusual else kind)
        if _ROPE_FACTORS in tensors:
            return self._llama3_rope(rope, head_dim, context)
        if kind == "none" or factor == 1.0:
            return {}
        original = {"original_max_position_embeddings": int(named.get("scaling.original_context_length", context))}
        return {"rope_type": kind, "factor": factor} | (original if kind == "yarn" else {})

    def _llama3_rope(self, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
        factors = torch.from_numpy(np.array(self._file.tensors[_ROPE_FACTORS].data, np.float64))
        if (factors == 1).all():
            return {}
        for original in (2**exponent for exponent in (13, *range(3, context.bit_length()))):  # 8192 of every Llama 3 so far
            found = {
                "rope_type": "llama3", "factor": float(factors.max()), "original_max_position_embeddings": original,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,  # of every Llama 3
            }  # fmt: skip
            expected = llama3_factors({**rope, **found}, head_dim)
            if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4, atol=0):
                return found
        raise self._unknown_rope(f"{_ROPE_FACTORS} with other factors than those of Llama 3")

    def _unknown_rope(self, found: str) -> CheckpointError:
        known = "plain, or scaled as linear, yarn or llama3"
        return CheckpointError(f"{self._file.path.name}: its rope must be {known}; found {found}; use the original checkpoint")

    def tokenizer(self) -> Any:
        """transformers' tokenizer. Raises CheckpointError for a file without one."""
        import transformers

        path = self._file.path
        if self._file.tokens is None:
            raise CheckpointError(f"{path.name} has no tokenizer: {_VOCABULARY} is missing")
        return getattr(transformers, self._tokenizer).from_pretrained(path.parent, gguf_file=path.name)

    def model(self) -> Any:
        """A transformers model in fp32 with the values as the file has them. Raises CheckpointError as `weights` does."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kernels = attention_for(self.spec)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].from_pretrained(
            None, config=self.config, state_dict=self.weights(), dtype=torch.float32, attn_implementation=kernels
        )
        model.config.name_or_path = str(self._file.path)
        return model

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32 by their names in transformers.

        Raises CheckpointError, before any is read, for one that is missing or has another shape; and for one that is stored in
        a way that the package `gguf` does not read.
        """
        from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        known = get_tensor_name_map(kinds[self._file.architecture], self.spec.layers)
        names = {name: str(known.get_name(name, try_suffixes=(".weight", ".bias"))) for name in self.spec.shapes}
        tensors = {name: self._file.tensors[known] for name, known in names.items() if known in self._file.tensors}
        self.spec.check_weights({name: _shape(tensor) for name, tensor in tensors.items()})
        weights = {}
        for name, tensor in tensors.items():
            try:
                values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            except (ValueError, NotImplementedError) as error:
                raise CheckpointError(f"{name} is stored in a way that the library gguf does not read: {error}") from None
            weights[name] = self._in_transformers(name, torch.from_numpy(values.reshape(_shape(tensor))))
        return weights

    def _in_transformers(self, name: str, weight: Tensor) -> Tensor:
        """A weight in transformers' layout; the inverse of the export to GGUF."""
        spec = self.spec  # Llama's heads are in the order of llama.cpp's rope, which rotates neighbours, not halves
        if self._file.architecture == "llama" and (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
            heads = spec.heads if part == "q_proj" else spec.kv_heads
            return weight.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        if spec.architecture.norm == "rms_plus_one" and name.endswith("norm.weight"):
            return weight - 1
        return weight


def _shape(tensor: Any) -> tuple[int, ...]:
    """As torch has it: the contiguous dimension comes last."""
    return tuple(int(size) for size in reversed(tensor.shape))
