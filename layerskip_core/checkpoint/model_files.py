"""Which files of a folder belong to its model and may be replaced, and which files are in the way of a new model."""

import json
import os
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from ..model.draft_vocabulary import ORDER_FILE
from ..storage.writing import kind_of
from .info import ADAPTER_FILE, INFO_FILE, CheckpointInfo, read_info, require_inside

RUN_FILES = ("losses.jsonl", "losses.png", ORDER_FILE)  # finetune writes them with a model
_TEMPLATES = "additional_chat_templates"  # a folder
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_CONFIG_KEYS = {"config.json": "model_type", ADAPTER_FILE: "peft_type"}  # a key that tells them from other files of that name
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
_INDEX = "model.safetensors.index.json"
_READ_BY_LOADERS = (
    *(*_CONFIG_KEYS, "generation_config.json", INFO_FILE, ORDER_FILE, _TEMPLATES, *_TOKENIZER_FILES),
    *("*.safetensors", "*.safetensors.index.json"),
)


def model_files(folder: Path) -> set[str]:
    """Relative names of the model's files in a folder. Only regular files count; a folder without a model has none.

    They are the files that layerskip.json lists. If it lists none (older versions), and for a plain transformers checkpoint,
    they are the config, the weights by their usual name or by the index, and the tokenizer's files by their usual names.
    Raises CheckpointError if layerskip.json is not valid.
    """
    info = read_info(folder)
    ours = (folder / INFO_FILE).is_file()
    if ours and info.files:
        names: set[str] = {INFO_FILE, *info.files}
    elif ours or any(_has_key(folder / name, key) for name, key in _CONFIG_KEYS.items()):
        names = _usual_files(folder, info if ours else None)
    else:
        names = set()
    return {name for name in names if os.path.lexists(folder / name) and _obstacle(folder, name) is None}


def loaded_files(folder: Path) -> list[str]:
    """Relative names of the files that loaders read, and of those that layerskip.json lists; links count, as in hub caches."""
    names = {*_of_loaders(folder), *read_info(folder).files}
    return sorted(name for name in names if (folder / name).is_file())


def obstacles(folder: Path, written: Collection[str] = ()) -> list[str]:
    """Files that a new model would overwrite, or that loaders would take for part of it, as `NAME, which ...`, sorted.

    These are files whose names loaders know or that will be `written`, unless they belong to the model in the folder.
    """
    return in_the_way(folder, {*written, *_of_loaders(folder)})


def in_the_way(folder: Path, names: Collection[str]) -> list[str]:
    """Those of the names that a file has which does not belong to the folder's model, as `NAME, which ...`, sorted."""
    known = model_files(folder)
    reasons = {}
    for name in names:
        if name not in known and os.path.lexists(folder / name):
            kind = _obstacle(folder, name)
            reasons[name] = "layerskip did not write" if kind is None else f"is {kind}"
    return [f"{name}, which {why}" for name, why in sorted(reasons.items())]


def _of_loaders(folder: Path) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        entries = [entry for entry in os.listdir(folder) if any(fnmatch(entry, pattern) for pattern in _READ_BY_LOADERS)]
        inside = os.listdir(folder / _TEMPLATES) if (folder / _TEMPLATES).is_dir() else []
        if inside and not (folder / _TEMPLATES).is_symlink():
            entries.remove(_TEMPLATES)
        return [*entries, *(f"{_TEMPLATES}/{name}" for name in inside)]
    return []


def _usual_files(folder: Path, info: CheckpointInfo | None) -> set[str]:
    names = {*_CONFIG_KEYS, "generation_config.json", INFO_FILE, *_TOKENIZER_FILES, *_WEIGHTS, *_shards(folder)}
    templates = folder / _TEMPLATES
    names |= {f"{_TEMPLATES}/{file.name}" for file in templates.glob("*.jinja")}
    return names | set(RUN_FILES) if info is not None and "final_losses" in info.details else names


def _shards(folder: Path) -> Iterable[str]:
    """The index and the files that it names, which must be safetensors in the same folder; empty without a valid index."""
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        named = {require_inside(name) for name in json.loads((folder / _INDEX).read_bytes())["weight_map"].values()}
        if all(fnmatch(name, "*.safetensors") and "/" not in name for name in named):
            return {_INDEX, *named}
    return set()


def _has_key(file: Path, key: str) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        document = json.loads(file.read_bytes())
        return isinstance(document, dict) and key in document
    return False


def _obstacle(folder: Path, name: str) -> str | None:
    """The kind of a file that is not regular, or that is reached through a link; None for a regular or an absent file."""
    path = folder / name
    for place in (path, *path.parents[: len(Path(name).parts) - 1]):
        try:
            mode = place.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not (stat.S_ISREG(mode) if place == path else stat.S_ISDIR(mode)):
            return kind_of(mode)
    return None
