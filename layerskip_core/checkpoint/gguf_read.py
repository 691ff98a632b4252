"""Reads GGUF files with the package `gguf`: configuration, weights, tokenizer and MTP block, in
transformers' form.
"""

import mmap
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, first_line
from ..model import ModelSpec
from ..model.blocks import FORMS, block_rows
from ..model.exit_blocks import MTP, MTP_LAYOUTS, StoredDrafters
from ..model.rope import llama3_factors
from ..model.transformers_backend import attention_for
from .gguf_layouts import from_gguf, from_gguf_shape, gguf_parts

_TOKENS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unknown": "unk_token_id",
    "padding": "pad_token_id",
}
_VOCABULARY = "tokenizer.ggml.tokens"
# The part of an array's field that has its length, after the key's length and text, and two types
_COUNT = 4
_FEW = 1024  # strings of an array whose texts are read
_CHUNK = 1 << 17  # weights that a thread dequantises at once, so that they stay in its cache
_HEAD_WEIGHT = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
# Of LongRoPE, which is refused
_LONG_ROPES = ("rope_factors_long.weight", "rope_factors_short.weight")
# YaRN parameters, by transformers' defaults: other values are refused.
_YARN = {
    "yarn_ext_factor": 1.0,
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
# By GGUF architecture: model_type and tokenizer class in transformers.
_FORMS = {
    "llama": ("llama", "PreTrainedTokenizerFast"),
    "qwen2": ("qwen2", "Qwen2Tokenizer"),
    "qwen3": ("qwen3", "Qwen2Tokenizer"),
    "qwen3moe": ("qwen3_moe", "Qwen2Tokenizer"),
    "phi3": ("phi3", "PreTrainedTokenizerFast"),
    "gemma2": ("gemma2", "GemmaTokenizer"),
    "gemma3": ("gemma3_text", "GemmaTokenizer"),
    "gemma4": ("gemma4_text", "GemmaTokenizer"),
    "starcoder2": ("starcoder2", "GPT2Tokenizer"),
    "granite": ("granite", "GPT2Tokenizer"),
    "lfm2": ("lfm2", "PreTrainedTokenizerFast"),
    "qwen35": ("qwen3_5_text", "Qwen3_5Tokenizer"),
    "gpt-oss": ("gpt_oss", "PreTrainedTokenizerFast"),
}
# Llama.cpp's rope pairs neighbouring dimensions of a head, not its halves
_INTERLEAVED = ("llama", "granite")
_HEAD_SIZE = {"attention.key_length": "head_dim"}
# Header keys to keys of config.json, where transformers' GGUF_CONFIG_MAPPING lacks them or differs
_KEYS: dict[str, dict[str, str | None]] = {
    "llama": {**_HEAD_SIZE},
    "qwen3": {**_HEAD_SIZE},
    "qwen3moe": {
        **_HEAD_SIZE,
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    "lfm2": {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
    "qwen35": {
        **_HEAD_SIZE,
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
        "full_attention_interval": "full_attention_interval",
    },
    "gemma4": {
        "attention.key_length": "global_head_dim",
        "attention.key_length_swa": "head_dim",
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base": None,
    },
    "gpt-oss": {
        **_HEAD_SIZE,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "attention.sliding_window": "sliding_window",
    },
}


class GgufFile:
    """A memory-mapped GGUF file. `config` and `spec` raise CheckpointError for what is unsupported
    or missing.
    """

    notes = ()  # interface of LowBitWeights

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a damaged file, ConfigError without the package `gguf`."""
        try:
            from gguf import GGUFValueType
        except ImportError:
            raise ConfigError(
                "a .gguf file needs the library gguf: pip install 'layerskip[gguf]'"
            ) from None
        self._values: dict[str, Any] = {}
        self.tokens: int | None = None  # of the tokenizer
        try:
            reader = _reader(path)
            for name, field in reader.fields.items():
                is_array = bool(field.types) and field.types[0] == GGUFValueType.ARRAY
                if name == _VOCABULARY and is_array:
                    self.tokens = int(field.parts[_COUNT][0])
                # The arrays of a tokenizer are large, and transformers reads them
                if field.types and not (is_array and name.startswith("tokenizer.")):
                    self._values[name] = field.contents()
        except Exception as error:
            raise CheckpointError(
                f"{path.name} is damaged, or no GGUF file: {first_line(error)}"
            ) from error
        self._data = reader.data
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture = str(self._values.get("general.architecture"))
        self._interleaved = self._architecture in _INTERLEAVED
        self.layers: int | None = self._values.get(f"{self._architecture}.block_count")

    @cached_property
    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import AutoConfig
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        values = self._values
        name = self._architecture
        if name not in _FORMS:
            raise CheckpointError(
                f"the GGUF architecture must be one of {', '.join(_FORMS)}, found {name}"
            )
        usual = GGUF_CONFIG_MAPPING[name if name in GGUF_CONFIG_MAPPING else "qwen3"]
        keys = {"general.name": "_model_name_or_path"}
        for key, known in (usual | _KEYS.get(name, {})).items():
            if known:
                keys[f"{name}.{key}"] = known
        for key, known in _TOKENS.items():
            keys[f"tokenizer.ggml.{key}_token_id"] = known
        settings = {known: values[key] for key, known in keys.items() if key in values}
        settings |= self._derived()
        if self.tokens is not None:
            settings.setdefault("vocab_size", self.tokens)
        end = settings.get("eos_token_id")
        turn_end = values.get("tokenizer.ggml.eot_token_id")  # ends answers too
        if turn_end not in (None, end):
            settings["eos_token_id"] = [turn_end] if end is None else [turn_end, end]
        model_type, _ = _FORMS[name]
        # GGUF names Mistral's architecture llama
        if name == "llama" and values.get("general.name") == "mistral":
            model_type = "mistral"
        config = AutoConfig.for_model(
            model_type, tie_word_embeddings=_HEAD_WEIGHT not in self._tensors, **settings
        )
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        head_dim = (
            config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        )
        rope |= self._scaled_rope(rope, head_dim, config.max_position_embeddings)
        return config

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.of(self.config)

    def _derived(self) -> dict[str, Any]:
        """Values of config.json that the header has in another form or lacks."""
        name = self._architecture
        of = {key.partition(".")[2]: value for key, value in self._values.items()}
        if name == "lfm2":
            kv_heads = of["attention.head_count_kv"]  # by layer
            kinds = ["full_attention" if heads else "conv" for heads in kv_heads]
            return {
                "num_key_value_heads": max(kv_heads),
                "layer_types": kinds,
                "block_auto_adjust_ff_dim": False,
            }
        if name == "qwen3moe":  # as in llama.cpp; the header lacks it
            return {"norm_topk_prob": True}
        if name not in ("qwen35", "gpt-oss", "gemma4"):
            return {}
        rope = {"rope_type": "default", "rope_theta": of["rope.freq_base"]}
        if name == "gemma4":
            return self._of_gemma4(of, rope)
        if name == "gpt-oss":
            return {"rope_parameters": rope}
        layers = of["block_count"] - of.get("nextn_predict_layers", 0)  # without the MTP layers
        rope["partial_rotary_factor"] = of["rope.dimension_count"] / of["attention.key_length"]
        # Positions in an image, which are equal for text
        sections = [section for section in of.get("rope.dimension_sections", ()) if section]
        if sections:
            rope |= {"mrope_section": sections, "mrope_interleaved": True}
        return {
            "num_hidden_layers": layers,
            "linear_value_head_dim": of["ssm.inner_size"] // of["ssm.time_step_rank"],
            "rope_parameters": rope,
        }

    def _of_gemma4(self, of: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
        """Gemma 4's values. Dimensions with rope factor 1 rotate. Raises CheckpointError for
        experts or KV heads by layer.
        """
        if isinstance(of["attention.head_count_kv"], list) or of.get("expert_count"):
            raise CheckpointError(
                "of Gemma 4 only E2B and E4B can be read from GGUF, found experts or KV heads by layer"
            )
        widths = of["feed_forward_length"]
        first, *others = widths if isinstance(widths, list) else [widths]
        rotating = 1.0
        if _ROPE_FACTORS in self._tensors:
            rotating = float((np.array(self._tensors[_ROPE_FACTORS].data) == 1).mean())
        kinds = []
        for is_sliding in of["attention.sliding_window_pattern"]:
            kinds.append("sliding_attention" if is_sliding else "full_attention")
        settings = {
            "intermediate_size": first,
            "use_double_wide_mlp": any(width != first for width in others),
            "layer_types": kinds,
            "rope_parameters": {
                "full_attention": {
                    **rope,
                    "rope_type": "proportional",
                    "partial_rotary_factor": rotating,
                },
                "sliding_attention": {**rope, "rope_theta": of.get("rope.freq_base_swa", 1e4)},
            },
        }
        table = self._tensors.get("per_layer_token_embd.weight")
        if table is not None:
            settings["vocab_size_per_layer_input"] = _shape(table)[0]
        return settings

    def _scaled_rope(self, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
        """The scaling to add to the plain `rope`. Raises CheckpointError for an unsupported kind.

        The header names linear and YaRN. Llama 3's parameters are found by its frequency divisors,
        all that the file has.
        """
        prefix = f"{self._architecture}.rope."
        values = {}
        for key, value in self._values.items():
            if key.startswith(prefix):
                values[key.removeprefix(prefix)] = value
        for key, usual in _YARN.items():
            if values.get(f"scaling.{key}", usual) != usual:
                raise self._unknown_rope(key)
        for tensor in _LONG_ROPES:
            if tensor in self._tensors:
                raise self._unknown_rope(tensor)
        kind = str(values.get("scaling.type", "linear"))
        if kind not in ("none", "linear", "yarn"):
            raise self._unknown_rope(kind)
        if _ROPE_FACTORS in self._tensors and self._architecture != "gemma4":
            return self._llama3_rope(rope, head_dim, context)
        factor = float(values.get("scaling.factor", values.get("scale_linear", 1.0)) or 1.0)
        if kind == "none" or factor == 1.0:
            return {}
        scaled: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = values.get("scaling.original_context_length", context)
            scaled["original_max_position_embeddings"] = int(original)
        if self._architecture == "gpt-oss":
            scaled["truncate"] = False
        return scaled

    def _llama3_rope(self, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
        """Llama 3's parameters that give the file's divisors of the frequencies."""
        factors = torch.from_numpy(np.array(self._tensors[_ROPE_FACTORS].data, np.float64))
        if (factors == 1).all():
            return {}
        # All Llama 3 models have these low and high factors, and so far an original context of
        # 8192, tried first
        scaled = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        for exponent in (13, *range(3, context.bit_length())):
            scaled["original_max_position_embeddings"] = 2**exponent
            expected = llama3_factors({**rope, **scaled}, head_dim)
            is_same_size = expected.shape == factors.shape
            if is_same_size and torch.allclose(expected, factors, rtol=1e-4, atol=0):
                return scaled
        raise self._unknown_rope(f"{_ROPE_FACTORS} with other factors than those of Llama 3")

    def _unknown_rope(self, found: str) -> CheckpointError:
        needed = "its rope must be plain, or scaled as linear, yarn or llama3"
        return CheckpointError(
            f"{self._path.name}: {needed}; found {found}; use the original checkpoint"
        )

    def release(self) -> None:
        """Gives back the memory of the file's pages; they are read again when needed."""
        with suppress(AttributeError, OSError):  # not on every system
            self._data._mmap.madvise(mmap.MADV_DONTNEED)

    def tokenizer(self) -> Any:
        """transformers' tokenizer. Raises CheckpointError for a file without one."""
        import transformers

        if self.tokens is None:
            raise CheckpointError(f"{self._path.name} has no tokenizer: {_VOCABULARY} is missing")
        kind = getattr(transformers, _FORMS[self._architecture][1])
        return kind.from_pretrained(self._path.parent, gguf_file=self._path.name)

    def model(self) -> Any:
        """A transformers model in fp32. Raises CheckpointError as `weights` does."""
        return dense_model(str(self._path), self.config, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32 by their names in transformers. Raises CheckpointError for missing or
        unreadable ones.
        """
        return {name: self.weight(name) for name in self._stored}

    def weight(self, name: str) -> Tensor:
        """A weight in fp32, by its name in transformers. Raises CheckpointError as `weights`
        does.
        """
        return self._dense(name, self._stored[name]).reshape(self.spec.shapes[name])

    def _dense(self, name: str, tensors: list[Any]) -> Tensor:
        parts = []
        for tensor in tensors:
            parts.append(torch.from_numpy(_dequantised(name, tensor).reshape(_shape(tensor))))
        weight = from_gguf(name, parts, self.spec, self._interleaved)
        assert weight is not None
        if name.endswith(".A_log"):
            return weight.neg().log()
        is_norm = name.endswith("norm.weight") and ".linear_attn." not in name
        if is_norm and self.spec.architecture.norm == "rms_plus_one":
            return weight - 1  # llama.cpp's converter has added it
        return weight

    def table(self, name: str, dtype: torch.dtype) -> Tensor:
        """Dequantises an embedding to `dtype`, in chunks on all threads, without a whole copy in
        fp32.
        """
        [tensor] = self._stored[name]
        weight = torch.empty(_shape(tensor), dtype=dtype)
        size = max(1, _CHUNK // weight.shape[1])

        @torch.inference_mode()  # as in the thread that makes a backend
        def fill(start: int) -> None:
            rows = _dequantised(name, tensor, slice(start, start + size))
            weight[start : start + size] = torch.from_numpy(rows).view(len(rows), -1)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(fill, range(0, len(weight), size)))
        return weight

    def rows(self, name: str) -> Tensor | None:
        """A weight's rows of blocks as stored; None if kernels cannot read them."""
        tensors = self._stored.get(name, ())
        types = {tensor.tensor_type.name for tensor in tensors}
        if len(types) != 1:
            return None
        [kind] = types
        mixer = self.spec.architecture.mixer
        if kind not in FORMS or (mixer and any(f".{part}." in name for part in mixer.steps)):
            return None
        parts = [torch.from_numpy(tensor.data) for tensor in tensors]
        rows = from_gguf(name, parts, self.spec, self._interleaved, FORMS[kind])
        return None if rows is None else block_rows(rows, kind)

    @cached_property
    def drafter(self) -> StoredDrafters | None:
        """The MTP block, in the layer after the last (`nextn`), dequantised when taken; None if the
        file lacks it.
        """
        layers = self.spec.layers
        found: dict[str, tuple[str, Any]] = {}  # by our names: transformers' name, and the tensor
        for name in MTP.shapes(self.spec):
            full = f"model.{MTP_LAYOUTS[1].stored(name, layers)}"
            if name.startswith(f"{MTP.prefix}layer."):
                stored = str(self._names.get_name(full, (".weight", ".bias")))
            else:
                part = full.removeprefix(f"model.layers.{layers}.")
                stored = f"blk.{layers}.nextn.{part.replace('head.norm', 'head_norm')}"
            if stored not in self._tensors:
                return None
            found[name] = full, self._tensors[stored]

        def take(name: str) -> Tensor:
            full, tensor = found[name]
            return self._dense(full, [tensor])

        return StoredDrafters((MTP,), take)

    @cached_property
    def _names(self) -> Any:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        return get_tensor_name_map(kinds[self._architecture], self.spec.layers + 1)

    @cached_property
    def _stored(self) -> dict[str, list[Any]]:
        """The tensors of each weight, by its name in transformers: one, or experts' gate and up.
        Raises CheckpointError.
        """
        tensors = {}
        shapes = {}
        for name in self.spec.shapes:
            names = []
            for part in gguf_parts(name):
                names.append(str(self._names.get_name(part, (".weight", ".bias"))))
            # Written with --fuse-gate-up-exps
            fused = names[0].replace("ffn_gate_exps", "ffn_gate_up_exps")
            if fused in self._tensors:
                names = [fused]
            if self._tensors.keys() >= {*names}:
                found = [self._tensors[part] for part in names]
                tensors[name] = found
                shapes[name] = from_gguf_shape(name, list(map(_shape, found)), self.spec)
        self.spec.check_weights(shapes)
        return tensors


def dense_model(
    path: str, config: Any, weights: dict[str, Tensor], dtype: torch.dtype | str = torch.float32
) -> Any:
    """Builds a transformers model of `weights`."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    how = {"config": config, "dtype": dtype, "attn_implementation": attention_for(config)}
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, state_dict=weights, **how
    )
    # Adapters save it as the name of their base
    model.name_or_path = model.config.name_or_path = path
    return model


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantised(name: str, tensor: Any, rows: slice = slice(None)) -> Any:
    """Rows of a tensor as a new array in fp32. Raises CheckpointError for an unknown type."""
    from gguf import dequantize

    try:
        return np.array(dequantize(tensor.data[rows], tensor.tensor_type), np.float32)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{name} is stored in a way that the library gguf does not read: {error}"
        ) from None


def _reader(path: Path) -> Any:
    """gguf's reader of an open file, which reads arrays at once.

    The library makes a field of each element: of a vocabulary of 150,000 tokens and its merges this
    takes seconds.
    """
    from gguf import GGUFEndian, GGUFReader, GGUFValueType

    class ArrayReader(GGUFReader):
        def _get_field_parts(
            self, orig_offs: int, raw_type: int
        ) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = self._get(orig_offs, np.uint32)
            count = self._get(orig_offs + 4, np.uint64)
            element = GGUFValueType(kind[0])
            start = orig_offs + 12
            if element == GGUFValueType.STRING:
                strings, size = self._strings(start, int(count[0]))
                return (
                    12 + size,
                    [kind, count, *strings],
                    list(range(2, 2 + len(strings))),
                    [GGUFValueType.ARRAY, element],
                )
            if element not in self.gguf_scalar_to_np:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(start, self.gguf_scalar_to_np[element], count[0])
            if len(values) < count[0]:
                raise ValueError("an array ends after the file")
            return 12 + values.nbytes, [kind, count, values], [2], [GGUFValueType.ARRAY, element]

        def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
            """The bytes of each string of an array, and its size. Of a vocabulary, only the
            size.
            """
            order = "<" if self.endianess == GGUFEndian.LITTLE else ">"
            length_at = struct.Struct(f"{order}Q").unpack_from
            content = self.data.data
            offset = start
            parts = list[Any]()
            for _ in range(count):
                [length] = length_at(content, offset)
                offset += 8 + length
                if count <= _FEW:
                    parts.append(self.data[offset - length : offset])
            if offset > len(content):
                raise ValueError("an array ends after the file")
            return parts, offset - start

    return ArrayReader(path, "c")  # copy-on-write: torch warns about read-only memory
