"""Writes models. A folder never holds half a model, and files that do not belong to a model are never lost."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files import hold, new_staging, read_bytes, write_file
from .beside import check_beside
from .folder import EXIT_BLOCKS_FILE, INT4_FILE
from .info import EXIT_BLOCKS, INFO_FILE, CheckpointInfo, holds_model, read_info
from .loaded import Trainable
from .locate import adapters_of, downloaded, is_adapter, locate
from .open import for_training
from .swap import files_below, in_the_way, loaded_files, model_files, obstacles, replace_files, settle
from .transformers_read import quiet_transformers, written_dtype


@contextmanager
def output_lock(output: str, command: str) -> Iterator[None]:
    """Holds the lock of `output`. Raises ConfigError if it is not a folder, and LockedError if another process holds it."""
    _require_folder(Path(output))
    with hold(output, command):
        yield


def refuse_overwrite(output: str, overwrite: bool, written: Collection[str] = ()) -> None:
    """Raises ConfigError if `output` is not a folder, holds a model that may not be replaced, or files that are in the way.

    `written` are names of files that will be written with the model. An interrupted save in the folder is finished first.
    """
    folder = Path(output)
    _require_folder(folder)
    settle(folder)
    if holds_model(folder) and not overwrite:
        raise ConfigError(f"`output` {output} already holds a model; give `overwrite` to replace it, or another folder")
    if found := obstacles(folder, written):
        raise ConfigError(f"`output` {output}: {_summary(found)}; move it away, or give another folder")


def refuse_beside(model: str, name: str) -> None:
    """Raises ConfigError if `save_beside` would replace a file that does not belong to the model. Needs the folder's lock."""
    settle(model)
    if found := in_the_way(Path(model), (name,)):
        raise ConfigError(f"`model` {model}: {_summary(found)}; move it away, or give another folder by `output`")


@quiet_transformers()
def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    info: CheckpointInfo,
    output: str,
    dtype: torch.dtype,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Replaces the model in `output` by a transformers checkpoint with layerskip.json, in one step.

    An adapter (a peft model) is written alone and names its base. `files` are written too, by name. `model` is converted to
    `dtype` in place.

    Raises:
        CheckpointError: the disk is full or not writable, or files that belong to no model are in the way. The folder is
            unchanged then.
        LockedError: another process writes to the folder.
    """
    _replace_model(output, lambda staging: _write_all(model.to(dtype), tokenizer, info, staging, files))


def copy_checkpoint(name: str, info: CheckpointInfo, output: str, files: Mapping[str, bytes]) -> None:
    """Replaces the model in `output` by the files of a folder, an embedded model or a hub id, byte for byte, with `info`.

    `files` are written too, by name. Raises as `save_checkpoint` does.
    """
    source = Path(downloaded(name))

    def write(staging: Path) -> None:
        for file in loaded_files(source):
            (staging / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / file, staging / file)
        for file, content in files.items():
            (staging / file).write_bytes(content)

    save_files(write, info, output)


def save_files(write: Callable[[Path], None], info: CheckpointInfo, output: str) -> None:
    """Replaces the model in `output` by the files that `write` puts into an empty folder, with `info`.

    Raises as `save_checkpoint` does.
    """

    def write_listed(staging: Path) -> None:
        write(staging)
        _write_listed(info, staging)

    _replace_model(output, write_listed)


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` wrote: the precision, and for each file beside the weights that it left out, why."""

    dtype: torch.dtype
    left_out: tuple[str, ...]


def import_checkpoint(name: str, output: str, dtype: str, files: Mapping[str, bytes] = MappingProxyType({})) -> Imported:
    """Writes any model that can be loaded to `output`. GGUF is dequantised, adapters are merged.

    Calibrated int4 weights and exit blocks go with the weights that they were made for; `files` are written too, by name.
    `dtype` is fp32, bf16, or auto: as `written_dtype` says. Raises CheckpointError if anything fails.
    """
    loaded = for_training(name, "cpu", "fp32")
    precision = written_dtype(loaded, dtype)
    beside, left_out = _files_beside(name, loaded)
    details = {**loaded.info.details, "imported_from": name}
    if EXIT_BLOCKS_FILE not in beside:
        details.pop(EXIT_BLOCKS, None)
    info = replace(loaded.info, details=details)
    save_checkpoint(loaded.model, loaded.tokenizer, info, output, precision, {**beside, **files})
    return Imported(precision, left_out)


def write_model(model: Any, folder: Path) -> None:
    """Writes the weights and config of a transformers model, or of a peft model's adapter, as safetensors."""
    adapter = hasattr(model, "get_base_model")
    model.save_pretrained(folder, **({"save_embedding_layers": False} if adapter else {}))  # "auto" would ask the hub
    if adapter:
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card, which would replace the user's


def write_info(path: str, info: CheckpointInfo) -> None:
    """Replaces layerskip.json of a folder atomically. Raises CheckpointError if it cannot be written."""
    with hold(path, "saving layerskip.json"):
        write_file(Path(path) / INFO_FILE, info.to_json().encode(), CheckpointError)


def save_beside(
    folder: str, name: str, content: bytes, change: Callable[[CheckpointInfo], CheckpointInfo] = lambda info: info
) -> None:
    """Adds a file to a folder's model. layerskip.json lists it, so that it goes when the model is replaced.

    `change`: what else changes there.

    Raises CheckpointError if it cannot be written, and LockedError if another process writes to the folder.
    """
    with hold(folder, f"saving {name}"):
        info = read_info(folder)
        files = {*(info.files or model_files(Path(folder))), INFO_FILE, name}
        info = replace(change(info), files=tuple(sorted(files)))
        write_info(folder, info)  # first: a file that it does not list would be in the way
        write_file(Path(folder) / name, content, CheckpointError)


def _files_beside(name: str, loaded: Trainable) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of further weights for the weights of `loaded`, by name, and why each of the others is not one of them."""
    location = locate(adapters_of(name)[1])
    folder = Path(location.path)
    there = [file for file in (INT4_FILE, EXIT_BLOCKS_FILE) if location.is_folder and (folder / file).is_file()]
    if is_adapter(name):
        return {}, tuple(f"{folder / file} is for the weights without the adapter" for file in there)
    spec, weight_of = loaded.backend.spec, loaded.model.get_parameter
    kept, left_out = {}, []
    for file in there:
        try:
            check_beside(folder, file, spec, weight_of)
            kept[file] = read_bytes(folder / file, str(folder / file), CheckpointError)
        except CheckpointError as error:
            left_out.append(str(error))
    return kept, tuple(left_out)


def _write_all(model: nn.Module, tokenizer: Any, info: CheckpointInfo, staging: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files of a checkpoint to an empty folder. layerskip.json lists them."""
    write_model(model, staging)
    tokenizer.save_pretrained(staging)
    for name, content in files.items():
        (staging / name).write_bytes(content)
    _write_listed(info, staging)


def _write_listed(info: CheckpointInfo, staging: Path) -> None:
    """Writes layerskip.json with a list of all files."""
    listed = tuple(dict.fromkeys((*files_below(staging), INFO_FILE)))
    (staging / INFO_FILE).write_text(replace(info, files=listed).to_json(), encoding="utf-8")
    readers = (staging / INFO_FILE).stat().st_mode
    for file in map(staging.joinpath, listed):
        if file.stat().st_mode != readers:  # safetensors 0.8 makes its file readable by the owner only, whatever the umask
            file.chmod(readers)


def _replace_model(output: str, write: Callable[[Path], None]) -> None:
    """Replaces the model in a folder by what `write` puts into an empty one. Raises as `save_checkpoint` does."""
    folder = Path(output)
    with hold(folder, "saving a model"):
        settle(folder)
        staging = None
        try:
            staging = new_staging(folder)
            write(staging)
            if found := obstacles(folder, files_below(staging)):
                raise CheckpointError(_summary(found))
            replace_files(folder, staging, model_files(folder))
        except BaseException as error:
            if staging is not None and not staging.exists():
                raise  # the new model is already in effect
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            # safetensors reports a full disk as its own error type
            raise CheckpointError(f"cannot write the model to {output}: {error}; nothing there was changed") from error


def _require_folder(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"`output` must be a folder, got the file {path}")


def _summary(found: list[str]) -> str:
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return f"in the way is {found[0]}, which layerskip did not write{more}"
