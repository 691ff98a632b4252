"""Any model that can be loaded, written as a folder of safetensors; and in which precision models are written."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from .beside import read_exit_blocks, read_int4
from .folder import EXIT_BLOCKS_FILE, INT4_FILE
from .info import EXIT_BLOCKS
from .loaded import Trainable
from .locate import adapters_of, is_adapter, locate, reading
from .open import for_training
from .save import NO_FILES, save_checkpoint
from .transformers_read import open_model


def import_checkpoint(
    name: str, output: str, dtype: str, files: Mapping[str, bytes] = NO_FILES
) -> tuple[torch.dtype, list[str]]:
    """Writes any model that can be loaded to `output`. GGUF is dequantised, adapters are merged.

    Calibrated int4 weights and exit blocks go with the weights that they were made for; `files` are written too, by name.
    `dtype` is fp32, bf16, or auto: as `written_dtype` says. Returns the precision, and for each file beside the weights that
    was left out the reason. Raises CheckpointError if anything fails.
    """
    loaded = for_training(name, "cpu", "fp32")
    precision = written_dtype(loaded, dtype)
    folder = locate(adapters_of(name)[1]).path
    beside: dict[str, bytes] = {}
    left_out = []
    for file, read in ((INT4_FILE, read_int4), (EXIT_BLOCKS_FILE, read_exit_blocks)):
        if (path := Path(folder) / file).is_file():
            try:
                read(folder, loaded.backend.spec, loaded.model.get_parameter)
                beside[file] = path.read_bytes()
            except CheckpointError as error:
                left_out.append(str(error))
    details = {**loaded.info.details, "imported_from": name}
    if EXIT_BLOCKS_FILE not in beside:
        details.pop(EXIT_BLOCKS, None)
    info = replace(loaded.info, details=details)
    save_checkpoint(loaded.model, loaded.tokenizer, info, output, precision, {**beside, **files})
    return precision, left_out


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
