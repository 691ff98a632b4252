"""Writes a model's folder so that it never holds half a model: aside first, then renamed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .checkpoint import (
    INFO_FILE,
    LAST_WRITTEN,
    CheckpointInfo,
    holds_model,
    load_checkpoint,
    quiet_transformers,
    stored_dtype,
)
from .errors import CheckpointError, ConfigError
from .files import synchronise, write_file

_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "chat_template*", "generation_config.json")


def refuse_overwrite(output: str, overwrite: bool) -> None:
    """Raises ConfigError when `output` holds a model, or is no folder, and may not be replaced."""
    if holds_model(output) and not overwrite:
        raise ConfigError(f"--output {output} already holds a model; give --overwrite to replace it, or another folder")
    if Path(output).exists() and not Path(output).is_dir():
        raise ConfigError(f"--output must be a folder, got the file {output}")


@quiet_transformers()
def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    info: CheckpointInfo,
    output: str,
    dtype: torch.dtype,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes an ordinary transformers checkpoint and layerskip.json, aside first: `output` never holds half a model.

    An adapter (a peft model) is written alone and names its base. `files` by name are written beside. `model` is converted to
    `dtype` in place. Raises CheckpointError when the disk is full or not writable; what `output` held then stays as it was.
    """
    folder = Path(output)
    staging = folder / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_model(model.to(dtype), staging)
        tokenizer.save_pretrained(staging)
        (staging / INFO_FILE).write_text(info.to_json(), encoding="utf-8")
        for name, content in files.items():
            (staging / name).write_bytes(content)
        readers = (staging / INFO_FILE).stat().st_mode
        for file in staging.iterdir():
            if file.stat().st_mode != readers:  # safetensors 0.8 leaves its file to its owner alone, whatever the umask
                file.chmod(readers)
            synchronise(file)
    except Exception as error:  # safetensors reports a full disk as its own error type
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"cannot write the model to {output}: {error}; nothing there was changed") from error
    for name in LAST_WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for pattern in _MODEL_FILES:  # of an older model there, whose shards or template the new one may not have
        for file in folder.glob(pattern):
            file.unlink()
    for file in sorted(staging.iterdir(), key=lambda file: file.name in LAST_WRITTEN):
        os.replace(file, folder / file.name)
    staging.rmdir()
    synchronise(folder)


def import_checkpoint(name: str, output: str, dtype: str) -> torch.dtype:
    """Writes any model that can be loaded to `output`, GGUF dequantised and adapters merged; returns the precision written.

    `dtype` is fp32, bf16, or auto: as stored, which for a GGUF file is fp32. Raises CheckpointError for what fails.
    """
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype) or stored_dtype(name)
    loaded = load_checkpoint(name, "cpu", "fp32")
    info = replace(loaded.info, details={**loaded.info.details, "imported_from": name})
    save_checkpoint(loaded.model, loaded.tokenizer, info, output, precision)
    return precision


def write_model(model: Any, folder: Path) -> None:
    """The weights and config of a transformers model, or of a peft model's adapter, as safetensors in a folder."""
    adapter = hasattr(model, "get_base_model")
    model.save_pretrained(folder, **({"save_embedding_layers": False} if adapter else {}))  # "auto" would ask the hub


def write_info(path: str, info: CheckpointInfo) -> None:
    """Replaces layerskip.json of a folder, atomically. Raises CheckpointError when it cannot be written."""
    write_file(Path(path) / INFO_FILE, info.to_json().encode(), CheckpointError)
