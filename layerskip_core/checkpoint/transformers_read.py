"""Reads models with transformers and peft. Code that comes with a checkpoint never runs."""

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..model import ModelSpec, TransformersBackend
from ..model.architectures import runs_on_kernels
from ..model.transformers_backend import attention_for
from ..model.weights import check_model
from .folder import check_stored_weights, check_tokenizer, generation_config, open_weights, quiet_transformers
from .gguf import GgufFile
from .info import read_info
from .loaded import Trainable, pick_dtype
from .locate import Location, adapters_of, is_adapter, locate, present, reading

_NO_FOREIGN_CODE = {"trust_remote_code": False}  # otherwise transformers would ask on standard input


class PretrainedModel:
    """A model in a folder or on the hub; only its configuration is read yet."""

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig

        self._path = path
        self.config = AutoConfig.from_pretrained(path, **_NO_FOREIGN_CODE)
        self.spec = ModelSpec.of(self.config) if runs_on_kernels(self.config) else None
        self.vocab: int = self.config.get_text_config(decoder=True).vocab_size

    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return read_tokenizer(self._path)

    def model(self) -> Any:
        """The model with its stored weights. Raises CheckpointError for one that lacks some, before any is read in a folder.

        Some multimodal types have no class that takes text alone: their whole model is read, and gets no images.
        """
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        generation_config(self._path)  # transformers would go on without a damaged one
        files = open_weights(self._path, self.spec)
        if (
            self.spec is not None and self.spec.shapes.keys() & files.keys()
        ):  # otherwise the weights have older names, which transformers knows
            check_stored_weights(files, self.spec)
        kernels = attention_for(self.config)
        kind = AutoModelForCausalLM if type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        model, report = kind.from_pretrained(
            self._path, dtype="auto", attn_implementation=kernels, output_loading_info=True, **_NO_FOREIGN_CODE
        )
        missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", []))
        if missing:
            raise CheckpointError(f"it is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
        return model


def open_model(location: Location) -> PretrainedModel | GgufFile:
    """Raises CheckpointError for files that do not describe a supported model."""
    if location.gguf_file is None:
        return PretrainedModel(location.path)
    return GgufFile(Path(location.path) / location.gguf_file)


@quiet_transformers()
def read_model(name: str, location: Location, device: torch.device, dtype: str) -> Trainable:
    """A model that is not an adapter, in evaluation mode."""
    files = open_model(location)
    spec = files.spec
    tokenizer = files.tokenizer()
    check_tokenizer(tokenizer, files.vocab)
    model = files.model()
    check_model(model, spec)
    precision, stored = pick_dtype(dtype, device, model.num_parameters()), model.dtype
    for parameter in model.to(device).parameters():  # model.to(dtype) would round the rotary frequencies too, a buffer in fp32
        if parameter.dtype == stored:  # transformers keeps the others in the precision that they need
            parameter.data = parameter.data.to(precision)
    return Trainable(name, model.eval(), TransformersBackend(model, spec=spec), tokenizer, read_info(location.path))


@quiet_transformers()
def merge_adapters(adapters: list[str], base: Trainable) -> Trainable:
    """Merges the adapters into `base`, the last one first; the tokenizer comes from the first adapter.

    Raises CheckpointError for an adapter with weights missing.
    """
    from peft import PeftModel, get_peft_model_state_dict

    model, spec = base.model, base.backend.spec
    own = spec if isinstance(spec, ModelSpec) else None
    for adapter in reversed(adapters):
        adapted = PeftModel.from_pretrained(model, adapter)
        stored, needed = open_weights(adapter), get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = sorted(needed.keys() - stored.keys()) if stored else []
        if missing:  # peft would leave them at their initial values
            raise CheckpointError(f"the adapter is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
        model = adapted.merge_and_unload().eval()
    model.requires_grad_(True)  # peft froze the base
    tokenizer = read_tokenizer(adapters[0])
    check_tokenizer(tokenizer, spec.vocab)
    check_model(model, own)
    return Trainable(adapters[0], model, TransformersBackend(model, spec=own), tokenizer, read_info(adapters[0]))


def read_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **_NO_FOREIGN_CODE)


def stored_dtype(name: str) -> torch.dtype:
    """The precision that a checkpoint's config gives for its weights, fp32 if it gives none, as a GGUF file does."""
    location = present(adapters_of(name)[1])
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
