"""Writes models. A folder never holds half a model, and files that layerskip did not write are
never lost.

A new model is written to a staging folder inside its folder; once all is on disk, one rename makes
it READY. Then its files are moved into place, layerskip.json last. After a kill, the next command
that uses the folder moves the rest.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, require_overwrite
from ..files import discard_folder, hold, new_staging, publish_folder, synchronise, write_file
from ..model.vocabulary import ORDER_FILE
from .folder import quiet_transformers, read_settings
from .info import (
    ADAPTER_FILE,
    CONFIG_FILES,
    INFO_FILE,
    CheckpointInfo,
    holds_model,
    read_info,
)
from .model_weights import cast_weights

RUN_FILES = ("losses.jsonl", ORDER_FILE)  # finetune writes them with a model
READY = ".layerskip-ready"
# A key that other files of that name lack
_CONFIG_KEYS = {"config.json": "model_type", ADAPTER_FILE: "peft_type"}
_WAIT = 60.0  # seconds to wait for another process to finish its renames
# Patterns of the files that loaders take for part of a model
_MODEL = (
    *CONFIG_FILES,
    "generation_config.json",
    INFO_FILE,
    ORDER_FILE,
    "*.safetensors",
    "*.safetensors.index.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "eagle3/config.json",
    "eagle3/model.safetensors",
    "assistant/config.json",
    "assistant/model.safetensors",
)
NO_FILES: Mapping[str, bytes] = MappingProxyType({})

Result = TypeVar("Result")


def model_files(folder: Path) -> set[str]:
    """Relative names of the model's files: those in layerskip.json, else the usual ones. Raises
    CheckpointError.
    """
    names = {INFO_FILE, *read_info(folder).files}
    if names == {INFO_FILE}:
        is_model = any(key in read_settings(folder, name) for name, key in _CONFIG_KEYS.items())
        if is_model:
            names |= _usual(folder)
    return {name for name in names if (folder / name).is_file()}


def refuse_overwrite(output: str, overwrite: bool, written: Collection[str] = ()) -> None:
    """Raises ConfigError if `output` holds a model that may not be replaced, or files in the way of
    `written` ones.
    """
    settle(output)
    require_overwrite(output, "a model" if holds_model(output) else "", overwrite)
    _refuse_obstacles(Path(output), written, ConfigError, f"`output` {output}: ")


def refuse_sidecar(model: str, name: str) -> None:
    """Raises ConfigError if `save_sidecar` would replace a file that layerskip did not write. Needs
    the folder's lock.
    """
    settle(model)
    _refuse_obstacles(Path(model), (name,), ConfigError, f"`model` {model}: ")


def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    info: CheckpointInfo,
    output: str,
    dtype: torch.dtype,
    files: Mapping[str, bytes] = NO_FILES,
) -> None:
    """Replaces the model in `output` by a checkpoint in `dtype` (of peft: the adapter), in one
    step, with further `files`.

    Weights that transformers keeps in fp32 are written in fp32.
    """

    def write(staging: Path) -> None:
        if _is_adapter(model):
            model.to(dtype)
        else:
            cast_weights(model, dtype)
        write_model(model, staging)
        tokenizer.save_pretrained(staging)

    with quiet_transformers():
        save_files(write, info, output, files)


def copy_checkpoint(
    source: str,
    names: Collection[str],
    info: CheckpointInfo,
    output: str,
    files: Mapping[str, bytes],
) -> None:
    """Replaces the model in `output` by files of the folder `source`, byte for byte: these `names`
    and, with a config among them, those that loaders take for part of a model; with `info` and
    further `files`.
    """
    folder = Path(source)
    names = {*names}
    if not names.isdisjoint(CONFIG_FILES):
        names |= _usual(folder)

    def write(staging: Path) -> None:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staging / name)

    save_files(write, info, output, files)


def save_files(
    write: Callable[[Path], None],
    info: CheckpointInfo,
    output: str,
    files: Mapping[str, bytes] = NO_FILES,
) -> None:
    """Replaces the model in `output` by the files that `write` puts into an empty folder, with
    `info` and further `files`.

    Raises CheckpointError and LockedError; the folder is unchanged then.
    """
    folder = Path(output)
    staging = None
    with hold(folder, "saving a model"):
        settle(folder)
        try:
            staging = new_staging(folder)
            write(staging)
            for name, content in files.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(content)
            paths = [path for path in staging.rglob("*") if not path.is_dir()]
            written = sorted(path.relative_to(staging).as_posix() for path in paths)
            listed = tuple(dict.fromkeys((*written, INFO_FILE)))
            text = replace(info, files=listed).to_json()
            (staging / INFO_FILE).write_text(text, encoding="utf-8")
            readers = (staging / INFO_FILE).stat().st_mode
            # Safetensors 0.8 makes its file readable by the owner only, whatever the umask
            for name in listed:
                (staging / name).chmod(readers)
            _refuse_obstacles(folder, listed, CheckpointError)
            # Left by a process that was killed after its last move
            shutil.rmtree(folder / READY, ignore_errors=True)
            publish_folder(staging, folder / READY)
        except BaseException as error:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            # safetensors reports a full disk as its own error type
            raise CheckpointError(
                f"cannot write the model to {output}: {error}; nothing there was changed"
            ) from error
        settle(folder)


def write_model(model: Any, folder: Path, as_it_is: bool = False) -> None:
    """Writes a transformers model, or a peft model's adapter; `as_it_is`: under its parameters' own
    names.
    """
    if not _is_adapter(model):
        model.save_pretrained(folder, save_original_format=not as_it_is)
        return
    # With "auto" peft would ask the hub about embedding layers
    model.save_pretrained(folder, save_embedding_layers=False)
    # peft's empty model card, which would replace the user's
    (folder / "README.md").unlink(missing_ok=True)


def _is_adapter(model: Any) -> bool:
    """Whether a model is peft's."""
    return hasattr(model, "get_base_model")


def write_info(path: str, info: CheckpointInfo) -> None:
    """Replaces layerskip.json of a folder atomically. Raises CheckpointError."""
    with hold(path, "saving layerskip.json"):
        write_file(Path(path) / INFO_FILE, info.to_json().encode(), CheckpointError)


def save_sidecar(
    folder: str,
    name: str,
    content: bytes,
    change: Callable[[CheckpointInfo], CheckpointInfo] = lambda info: info,
) -> None:
    """Adds a file to a folder's model, and lists it in layerskip.json, with a `change`. Raises as
    `write_info` does.
    """
    with hold(folder, f"saving {name}"):
        info = change(read_info(folder))
        # First: after a kill, a file that it does not list would be an obstacle.
        write_info(
            folder,
            replace(info, files=tuple(sorted({*model_files(Path(folder)), INFO_FILE, name}))),
        )
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        write_file(Path(folder) / name, content, CheckpointError)


def settle(folder: str | Path) -> None:
    """Moves the files of a complete new model into place, or waits while another process does.
    Raises LayerSkipError.
    """
    folder = Path(folder)
    ready = folder / READY
    if not (ready / INFO_FILE).exists():
        return
    with hold(folder, "ending an interrupted save", _WAIT):
        if not (ready / INFO_FILE).exists():
            return
        try:
            synchronise(folder)
            new = read_info(ready).files
            for name in model_files(folder) - {*new, *CONFIG_FILES}:
                (folder / name).unlink()
                with suppress(OSError):  # a sub-folder that has other files
                    (folder / name).parent.rmdir()
            # Before the weights: other programs then see no model, rather than parts of two
            for name in CONFIG_FILES:
                if name not in new or (ready / name).exists():
                    (folder / name).unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: (name == INFO_FILE, name in CONFIG_FILES)):
                if (ready / name).exists():  # it may have been moved before an interruption
                    (folder / name).parent.mkdir(exist_ok=True)
                    os.replace(ready / name, folder / name)
            synchronise(folder)
            discard_folder(ready)
        except OSError as reason:
            cause = f"{reason.filename}: {reason.strerror}"
            raise CheckpointError(
                f"a new model is complete in {ready}, but cannot be moved to {folder}: {cause}"
            ) from reason


def read_whole(folder: str | Path, read: Callable[[], Result]) -> Result:
    """Calls `read` until no file of the folder was replaced during the call, so that it never mixes
    two models.
    """
    while True:
        settle(folder)
        before = _version(folder)
        try:
            result = read()
        except Exception:
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return result


def _version(folder: str | Path) -> list[tuple[int, ...]]:
    """Changes when a replacement begins (READY) and ends (configs)."""
    version: list[tuple[int, ...]] = []
    for name in (f"{READY}/{INFO_FILE}", *CONFIG_FILES):
        with suppress(OSError):
            state = os.stat(Path(folder) / name)
            version.append((state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size))
    return version


def _usual(folder: Path) -> set[str]:
    """Relative names of the files in a folder that loaders would take for part of a model."""
    names = set()
    for pattern in _MODEL:
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    return names


def _refuse_obstacles(
    folder: Path, written: Collection[str], error: type[Exception], where: str = ""
) -> None:
    """Raises `error` for files that are not ours and that a new model would overwrite (`written`)
    or load with.
    """
    foreign = {*written, *_usual(folder)} - model_files(folder)
    obstacles = sorted(name for name in foreign if os.path.lexists(folder / name))
    if obstacles:
        more = f" ({len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
        raise error(
            f"{where}in the way is {obstacles[0]}, which layerskip did not write{more}; move it away, or give another folder"
        )
