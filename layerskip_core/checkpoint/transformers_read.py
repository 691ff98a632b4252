"""Reads models with transformers and peft. Files are checked first, and code that comes with a checkpoint never runs."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model import GenericBackend, ModelSpec
from ..model.weights import check_model
from .adapters import adapters_of
from .gguf_header import read_gguf_header
from .info import read_info
from .loaded import Trainable
from .locate import Location, locate, reading
from .placement import pick_dtype
from .quiet import no_gguf_bar, quiet_transformers
from .stored import (
    TOKENIZER_FILE,
    check_config,
    check_stored_weights,
    check_tokenizer,
    open_weights,
    read_config,
    read_settings,
)

_NO_FOREIGN_CODE = {"trust_remote_code": False}  # otherwise transformers would ask on standard input


@quiet_transformers()
def read_model(name: str, device: torch.device, dtype: str) -> Trainable:
    """A model that is not an adapter, in evaluation mode. Raises CheckpointError as `for_training` does."""
    location = locate(name)
    _, spec = reading(name, lambda: read_architecture(location))
    if location.is_folder:
        reading(name, lambda: _check_folder_weights(location.path, spec))
    tokenizer = reading(name, lambda: read_tokenizer(location))
    reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    model = reading(name, lambda: _from_pretrained(location, spec))
    reading(name, lambda: check_model(model, spec))
    model = _converted(model.to(device), pick_dtype(dtype, device, spec.parameters)).eval()
    return Trainable(name, model, reading(name, lambda: GenericBackend(model)), tokenizer, read_info(location.path))


@quiet_transformers()
def merge_adapters(adapters: list[str], base: Trainable) -> Trainable:
    """Adds the adapters' weights to those of `base`, the last adapter first; the tokenizer is that of the first adapter."""
    name, model, spec = adapters[0], base.model, base.backend.spec
    for adapter in reversed(adapters):
        model = reading(adapter, partial(_merged, model, adapter))
    model.requires_grad_(True)  # peft froze the base
    tokenizer = reading(name, lambda: read_tokenizer(Location(name)))
    reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    reading(name, lambda: check_model(model, spec))
    return Trainable(name, model, reading(name, lambda: GenericBackend(model)), tokenizer, read_info(name))


def read_architecture(location: Location) -> tuple[Any, ModelSpec]:
    """A model's configuration as transformers reads it. Its values are checked first, before anything is built from them."""
    from transformers import AutoConfig, PreTrainedConfig

    if location.gguf_file is not None:
        header = read_gguf_header(Path(location.path) / location.gguf_file)
    elif location.is_folder:
        read_config(location.path)
    else:
        check_config(PreTrainedConfig.get_config_dict(location.path, **_NO_FOREIGN_CODE)[0])
    config = AutoConfig.from_pretrained(location.path, **location.keywords, **_NO_FOREIGN_CODE)
    spec = ModelSpec.of(config)
    if location.gguf_file is not None and spec.parameters > header.parameters:
        raise CheckpointError(f"needed {spec.parameters} weights, by its sizes; found {header.parameters}")
    return config, spec


def read_tokenizer(location: Location) -> Any:
    """transformers' tokenizer. Raises CheckpointError for a damaged tokenizer_config.json."""
    from transformers import AutoTokenizer

    if location.is_folder:
        read_settings(location.path, TOKENIZER_FILE)
    return AutoTokenizer.from_pretrained(location.path, **location.keywords, **_NO_FOREIGN_CODE)


def stored_dtype(name: str) -> torch.dtype:
    """The precision that a checkpoint's config gives for its weights, fp32 if it gives none."""
    location = locate(adapters_of(name)[1])
    dtype = getattr(reading(name, lambda: read_architecture(location))[0], "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def written_dtype(name: str, asked: str) -> torch.dtype:
    """The precision to write a checkpoint's weights in: fp32, bf16, or auto: as `stored_dtype` says."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(asked) or stored_dtype(name)


def _from_pretrained(location: Location, spec: ModelSpec) -> Any:
    """The model with its stored weights. Raises CheckpointError for one that lacks some."""
    from transformers import AutoModelForCausalLM

    is_gguf = location.gguf_file is not None
    keywords: dict[str, Any] = {**location.keywords, **_NO_FOREIGN_CODE}
    if is_gguf:
        from transformers import GgufConfig

        keywords["quantization_config"] = GgufConfig(dequantize=True)
    attention = "sdpa" if spec.score_cap is None else "eager"
    with no_gguf_bar() if is_gguf else nullcontext():
        model, report = AutoModelForCausalLM.from_pretrained(
            location.path, dtype="auto", attn_implementation=attention, output_loading_info=True, **keywords
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", []))
    if missing:
        raise CheckpointError(f"it is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
    return _without_quantization(model) if is_gguf else model


def _check_folder_weights(path: str, spec: ModelSpec) -> None:
    files = open_weights(path)
    if spec.shapes.keys() & files.keys():  # otherwise the weights have older names, which transformers knows
        check_stored_weights(files, spec)


def _merged(model: nn.Module, adapter: str) -> Any:
    """A model with an adapter's weights added to its own. Raises CheckpointError for an adapter with weights missing."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, adapter)
    stored = open_weights(adapter)
    missing = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - stored.keys()) if stored else []
    if missing:  # peft would leave them at their initial values
        raise CheckpointError(f"the adapter is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
    return adapted.merge_and_unload().eval()


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The parameters in `dtype`. `model.to(dtype)` would round the rotary frequencies too, a buffer in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _without_quantization(model: nn.Module) -> nn.Module:
    """The same weights in a model that transformers agrees to save: rebuilt from its config without the GGUF part."""
    from transformers import AutoModelForCausalLM

    original: Any = model
    config = original.config.__class__.from_dict(
        {key: value for key, value in original.config.to_dict().items() if key != "quantization_config"}
    )
    rebuilt = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype, attn_implementation="sdpa")
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.generation_config = original.generation_config
    return rebuilt  # type: ignore[no-any-return]
