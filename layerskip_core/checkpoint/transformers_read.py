"""Reads models with transformers and peft. Code that comes with a checkpoint never runs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import CheckpointError
from ..model import ModelSpec, TransformersBackend
from ..model.transformers_backend import attention_for
from ..model.weights import check_model
from .folder import check_stored_weights, check_tokenizer, generation_config, open_weights
from .gguf import GgufModel
from .info import read_info
from .loaded import Trainable, pick_dtype
from .locate import Location, adapters_of, is_adapter, locate, reading

_NO_FOREIGN_CODE = {"trust_remote_code": False}  # otherwise transformers would ask on standard input


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, log lines or warnings, in a block or in a decorated function."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class ModelFiles(Protocol):
    """A model's files, of which only what describes the model was read."""

    @property
    def config(self) -> Any: ...  # of transformers

    @property
    def spec(self) -> ModelSpec: ...

    def tokenizer(self) -> Any: ...

    def check_weights(self) -> None: ...

    def model(self) -> Any: ...


class _Pretrained:
    """A folder, or a hub id."""

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig

        self._path = path
        self.config = AutoConfig.from_pretrained(path, **_NO_FOREIGN_CODE)
        self.spec = ModelSpec.of(self.config)

    def tokenizer(self) -> Any:
        return read_tokenizer(self._path)

    def check_weights(self) -> None:
        """Checks what a folder has; none is read. Raises CheckpointError."""
        generation_config(self._path)  # transformers would go on without a damaged one
        files = open_weights(self._path)
        if self.spec.shapes.keys() & files.keys():  # otherwise the weights have older names, which transformers knows
            check_stored_weights(files, self.spec)

    def model(self) -> Any:
        """The model with its stored weights. Raises CheckpointError for one that lacks some."""
        from transformers import AutoModelForCausalLM

        kernels = attention_for(self.spec)
        model, report = AutoModelForCausalLM.from_pretrained(
            self._path, dtype="auto", attn_implementation=kernels, output_loading_info=True, **_NO_FOREIGN_CODE
        )
        missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", []))
        if missing:
            raise CheckpointError(f"it is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
        return model


def open_model(location: Location) -> ModelFiles:
    """Raises CheckpointError for files that do not describe a supported model."""
    return _Pretrained(location.path) if location.gguf_file is None else GgufModel(Path(location.path) / location.gguf_file)


@quiet_transformers()
def read_model(name: str, device: torch.device, dtype: str) -> Trainable:
    """A model that is not an adapter, in evaluation mode. Raises CheckpointError as `for_training` does."""
    location = locate(name)
    files = reading(name, lambda: open_model(location))
    reading(name, files.check_weights)
    tokenizer = reading(name, files.tokenizer)
    reading(name, lambda: check_tokenizer(tokenizer, files.spec.vocab))
    model = reading(name, files.model)
    reading(name, lambda: check_model(model, files.spec))
    model = _converted(model.to(device), pick_dtype(dtype, device, files.spec.parameters)).eval()
    return Trainable(
        name, model, reading(name, lambda: TransformersBackend(model, spec=files.spec)), tokenizer, read_info(location.path)
    )


@quiet_transformers()
def merge_adapters(adapters: list[str], base: Trainable) -> Trainable:
    """Adds the adapters' weights to those of `base`, the last adapter first; the tokenizer is that of the first adapter."""
    name, model, spec = adapters[0], base.model, base.backend.spec
    for adapter in reversed(adapters):
        model = reading(adapter, partial(_merged, model, adapter))
    model.requires_grad_(True)  # peft froze the base
    tokenizer = reading(name, lambda: read_tokenizer(name))
    reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    reading(name, lambda: check_model(model, spec))
    return Trainable(name, model, reading(name, lambda: TransformersBackend(model, spec=spec)), tokenizer, read_info(name))


def read_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **_NO_FOREIGN_CODE)


def stored_dtype(name: str) -> torch.dtype:
    """The precision that a checkpoint's config gives for its weights, fp32 if it gives none, as a GGUF file does."""
    location = locate(adapters_of(name)[1])
    if location.gguf_file is not None:
        return torch.float32
    dtype = getattr(reading(name, lambda: open_model(location)).config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def written_dtype(loaded: Trainable, asked: str) -> torch.dtype:
    """The precision to write a model's weights in: fp32, bf16, or auto: as they are stored.

    `loaded` is in fp32. Of a GGUF file auto is the narrowest precision that holds each of its weights as it is: low-bit values
    are products with their scales, which need fp32.
    """
    if asked != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
    if is_adapter(loaded.name) or locate(loaded.name).gguf_file is None:
        return stored_dtype(loaded.name)
    weights = [weight.detach() for weight in loaded.model.parameters()]
    exact = (
        dtype for dtype in (torch.bfloat16, torch.float16) if all(weight.equal(weight.to(dtype).float()) for weight in weights)
    )
    return next(exact, torch.float32)


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
