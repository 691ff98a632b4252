"""Reads models with transformers and peft, also from GGUF files. Code in a checkpoint never
runs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model import ModelSpec, TransformersBackend
from ..model.architectures import MULTIMODAL, known_architecture
from ..model.transformers_backend import attention_for
from .folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    LowBitWeights,
    checked_tokenizer,
    generation_config,
    has_low_bits,
    open_weights,
    quiet_transformers,
    read_settings,
    weight_files,
)
from .gguf_read import GgufFile, dense_model
from .info import read_info
from .loaded import TORCH_DTYPES, Trainable, pick_dtype
from .locate import ModelRef, adapters_of, reading
from .model_weights import cast_weights, check_model
from .settings import info_of

_NO_FOREIGN_CODE = {"trust_remote_code": False}  # the default asks on standard input
_SAME = {"mimo": "qwen2"}  # model types that transformers runs as another type
_OWN = ("model_type", "auto_map", "architectures")  # values of config.json that name the type


class PretrainedModel:
    """A model in a folder or on the hub; of a multimodal one only the text part, if its
    architecture is known.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig

        self._path = path
        settings = read_settings(path, CONFIG_FILE) if Path(path).is_dir() else {}
        same = _SAME.get(settings.get("model_type", ""))
        if same is None:
            whole = AutoConfig.from_pretrained(path, **_NO_FOREIGN_CODE)
        else:
            values = {name: value for name, value in settings.items() if name not in _OWN}
            whole = AutoConfig.for_model(same, **values)
        self.config = whole
        self.is_part = False
        if whole.model_type in MULTIMODAL:
            text = whole.get_text_config(decoder=True)
            self.is_part = text is not whole and known_architecture(text) is not None
            if self.is_part:
                self.config = text
        self.config.dtype = self.config.dtype or whole.dtype
        self.spec = ModelSpec.of(self.config) if known_architecture(self.config) else None
        self.low_bits: LowBitWeights | None = None
        quantization = dict(getattr(whole, "quantization_config", None) or {})
        if self.spec is None or self.spec.architecture.transposed:
            return
        if has_low_bits(quantization):
            self.low_bits = LowBitWeights(path, self.spec, quantization)
            self.config.__dict__.pop("quantization_config", None)

    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return read_tokenizer(self._path)

    def model(self) -> Any:
        """The model with its weights. Raises CheckpointError if some are missing."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        generation_config(self._path)  # raises for a damaged file, which transformers ignores
        if self.low_bits is not None and self.spec is not None:
            weights = {name: self.low_bits.weight(name).float() for name in self.spec.shapes}
            return self._dense(weights, torch.float32)
        files = open_weights(self._path, self.spec)  # checks them
        if self.is_part and self.spec is not None:
            weights = {name: files[name].mapped(name) for name in self.spec.shapes}
            return self._dense(weights, "auto")
        kind = AutoModelForImageTextToText
        if type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = AutoModelForCausalLM
        model, report = kind.from_pretrained(
            self._path,
            output_loading_info=True,
            dtype="auto",
            attn_implementation=attention_for(self.config),
            config=self.config,
            **_NO_FOREIGN_CODE,
        )
        missing = sorted(report["missing_keys"])
        missing += sorted(map(str, report.get("mismatched_keys", [])))
        if missing:
            raise CheckpointError(
                f"it is incomplete: {len(missing)} weights are missing, {missing[0]} the first"
            )
        return model

    def _dense(self, weights: dict[str, Tensor], dtype: torch.dtype | str) -> Any:
        from transformers import GenerationConfig

        model = dense_model(self._path, self.config, weights, dtype)
        if (Path(self._path) / GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self._path)
        return model


def open_model(model: ModelRef) -> PretrainedModel | GgufFile:
    """Opens a model, without its weights. Raises CheckpointError for an unsupported one."""
    return PretrainedModel(model.path) if model.gguf is None else GgufFile(model.gguf)


@quiet_transformers()
def configured_spec(folder: str) -> ModelSpec | None:
    """The spec of a folder with transformers' defaults; None if its weights are quantized or not in
    safetensors.
    """
    plain = weight_files(folder) and "quantization_config" not in read_settings(folder, CONFIG_FILE)
    return PretrainedModel(folder).spec if plain else None


def tokenizer_of(files: PretrainedModel | GgufFile) -> Any:
    """transformers' tokenizer of a model. Raises as `checked_tokenizer` does."""
    return checked_tokenizer(
        files.tokenizer(), files.config.get_text_config(decoder=True).vocab_size
    )


@quiet_transformers()
def read_model(model: ModelRef, device: torch.device, dtype: str) -> Trainable:
    """Reads a model that is no adapter, in evaluation mode."""
    files = open_model(model)
    spec = files.spec
    tokenizer = tokenizer_of(files)
    read = files.model()
    check_model(read, spec)
    cast_weights(read.to(device), pick_dtype(dtype, device, read.num_parameters()))
    backend = TransformersBackend(read, spec=spec)
    return Trainable(model.name, read.eval(), backend, tokenizer, info_of(model))


@quiet_transformers()
def blank(name: str, seed: int, tokenizer: Any = None) -> Trainable:
    """A checkpoint's architecture with random weights, in fp32 on the CPU, with the vocabulary of
    `tokenizer`.
    """
    model = ModelRef.of(name)
    with reading(name):
        files = open_model(model)
        config = files.config
        if tokenizer is None:
            tokenizer = tokenizer_of(files)
        else:
            config.vocab_size = len(tokenizer)
            for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(config, special, getattr(tokenizer, special))
        torch.manual_seed(seed)
        return _without_weights(model, config, tokenizer)


@quiet_transformers()
def blank_on_meta(model: ModelRef) -> Trainable:
    """A folder's architecture and tokenizer; the parameters have shapes and no values."""
    files = open_model(model)
    with torch.device("meta"):
        return _without_weights(model, files.config, tokenizer_of(files))


def _without_weights(model: ModelRef, config: Any, tokenizer: Any) -> Trainable:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention_for(config)
    )
    return Trainable(model.name, made, TransformersBackend(made), tokenizer, read_info(model.path))


@quiet_transformers()
def merge_adapters(adapters: list[str], base: Trainable) -> Trainable:
    """Merges adapters into `base`, from the last to the first, and takes the first one's tokenizer.
    Raises CheckpointError.
    """
    from peft import PeftModel, get_peft_model_state_dict

    model = base.model
    spec = base.backend.spec
    own = spec if isinstance(spec, ModelSpec) else None
    for adapter in reversed(adapters):
        adapted = PeftModel.from_pretrained(model, adapter)
        stored = open_weights(adapter)
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = sorted(needed.keys() - stored.keys()) if stored else []
        if missing:  # peft leaves these at their initial values
            raise CheckpointError(
                f"the adapter is incomplete: {len(missing)} weights are missing, {missing[0]} the first"
            )
        model = adapted.merge_and_unload().eval()
    model.requires_grad_(True)  # peft froze the base
    tokenizer = checked_tokenizer(read_tokenizer(adapters[0]), spec.vocab)
    check_model(model, own)
    return Trainable(
        adapters[0], model, TransformersBackend(model, spec=own), tokenizer, read_info(adapters[0])
    )


def read_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **_NO_FOREIGN_CODE)


def stored_dtype(name: str) -> torch.dtype:
    """The precision of a checkpoint's weights by its config; fp32 by default, and for GGUF."""
    model = ModelRef.of(adapters_of(name)[1]).fetched()
    if model.gguf is not None:
        return torch.float32
    with reading(name):
        dtype = getattr(open_model(model).config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def written_dtype(loaded: Trainable, asked: str) -> torch.dtype:
    """The precision to write weights in. `auto`: as stored; for GGUF the narrowest exact one."""
    if asked != "auto":
        return TORCH_DTYPES[asked]
    if ModelRef.of(loaded.name).gguf is None:
        return stored_dtype(loaded.name)
    weights = [weight.detach() for weight in loaded.model.parameters()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(weight.equal(weight.to(dtype).float()) for weight in weights):
            return dtype
    return torch.float32
