"""From a model's name to its files: an embedded model, a folder, a GGUF file or a hub id."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, ConfigError, LockedError, did_you_mean, first_line
from ..files import is_empty, read_json
from .info import ADAPTER_FILE, holds_model

EMBEDDED = {"embedded": "commands-layerskip", "embedded-base": "commands-base"}

# (exit layer, draft tokens) of the published checkpoints: from LayerSkip's tables 3-5, for Llama 3
# from the model cards.
PUBLISHED = {
    "facebook/layerskip-llama2-7B": (8, 12),
    "facebook/layerskip-llama2-13B": (15, 12),
    "facebook/layerskip-llama2-70B": (10, 12),
    "facebook/layerskip-llama3-8B": (8, 6),
    "facebook/layerskip-llama3.2-1B": (4, 6),
    "facebook/layerskip-codellama-7B": (6, 12),
    "facebook/layerskip-codellama-34B": (8, 12),
}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# The same weights in other forms, and training checkpoints
_NOT_OURS = ["consolidated*", "original/*", "checkpoint*/*"]
_RUST_PANIC = "PanicException"  # raised by libraries written in Rust; not a subclass of Exception

Result = TypeVar("Result")


@dataclass(frozen=True)
class Location:
    """A folder or hub id, or a GGUF file in a folder."""

    path: str
    gguf_file: str | None = None  # its name in the folder

    @property
    def folder(self) -> str | None:
        """The folder of a model with config.json; None for a GGUF file, a hub id and an adapter."""
        whole = self.gguf_file is None and is_folder(self.path) and not is_adapter(self.path)
        return self.path if whole else None


def require_model(name: str) -> None:
    """Raises CheckpointError unless a name is of one of the four kinds. Reads nothing and imports
    no torch.
    """
    path = Path(name)
    needed = f"{', '.join(EMBEDDED)}, a folder, a .gguf file or a hub id such as owner/name or owner/name@revision"
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(f"the file {name!r} is no model: needed {needed}")
    if not (name in EMBEDDED or path.is_dir() or path.is_file() or _may_be_hub_id(name)):
        meant = did_you_mean(get_close_matches(name, EMBEDDED, n=1))
        raise CheckpointError(f"no model {name!r}: needed {needed}{meant}")


def is_folder(name: str) -> bool:
    """Whether a name is a folder's; an empty folder named like a hub id (made for a command's
    output) does not count.
    """
    return Path(name).is_dir() and not (is_empty(Path(name)) and _may_be_hub_id(name))


def locate(name: str) -> Location:
    """Finds a model. Raises CheckpointError as `require_model`, and for a folder without a
    model.
    """
    require_model(name)
    if name in EMBEDDED:
        return Location(str(resources.files("layerskip_core.embedded") / EMBEDDED[name]))
    path = Path(name)
    if is_folder(name):
        from .save import settle

        settle(path)
        if not holds_model(path):
            raise CheckpointError(f"folder {name} holds no model: there is no config.json in it")
    return Location(str(path.parent), path.name) if path.is_file() else Location(name)


def present(name: str) -> Location:
    """As `locate`, with a hub id's files fetched into a folder. Raises CheckpointError.

    A hub id without safetensors is returned as it is: transformers may read it.
    """
    location = locate(name)
    if is_folder(location.path):
        return location
    from .folder import is_packed, weight_files

    folder = fetched(name)
    pinned = _hub_id(name)[1] is not None
    return Location(folder) if pinned or weight_files(folder) or is_packed(folder) else location


def own_folder(name: str) -> str | None:
    """A model's folder, if files can be added to it; None for embedded models, hub ids, GGUF files
    and adapters.
    """
    return None if name in EMBEDDED else locate(name).folder


def downloaded(name: str) -> str:
    """The folder of a whole model, fetched from the hub if need be. Raises CheckpointError for
    other kinds.
    """
    location = locate(name)
    if location.gguf_file is not None or is_adapter(location.path):
        found = "an adapter" if location.gguf_file is None else "a GGUF file"
        raise CheckpointError(
            f"`model` {name} is {found}; needed a folder with all weights: `layerskip import`"
        )
    from .folder import refuse_packed

    folder = fetched(location.path)
    reading(name, lambda: refuse_packed(folder))
    return folder


def fetched(name: str) -> str:
    """A folder, or the folder of a hub id's fetched files. Raises CheckpointError."""
    if is_folder(name):
        return name
    from huggingface_hub import snapshot_download

    hub_id, revision = _hub_id(name)
    files = {"allow_patterns": _HUB_FILES, "ignore_patterns": _NOT_OURS}
    return reading(name, partial(snapshot_download, hub_id, revision=revision, **files))


def _hub_id(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` as the id and the branch, tag or commit."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def _may_be_hub_id(name: str) -> bool:
    return (
        _hub_id(name)[0].count("/") == 1
        and not Path(name).is_absolute()
        and not name.startswith(".")
    )


def reading(name: str, read: Callable[[], Result]) -> Result:
    """Calls `read`; errors other than ConfigError become a CheckpointError of one line that names
    the model.
    """
    try:
        return read()
    except (ConfigError, LockedError):
        raise
    # Libraries raise OSError, ValueError, RuntimeError, SafetensorError and others
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _RUST_PANIC:
            raise
        known = isinstance(error, CheckpointError) or Path(name).exists() or name in EMBEDDED
        absent = "" if known else "there is no such folder, and as a hub id: "
        raise CheckpointError(f"cannot load model {name}: {absent}{first_line(error)}") from error


def files_digest(name: str) -> str:
    """A digest of the names, sizes and times of a model's files, and of its base's if it is an
    adapter.
    """
    from .save import model_files

    digest, (adapters, base) = hashlib.sha256(), adapters_of(name)
    for each in (*adapters, base):
        location = present(each)
        folder = Path(fetched(location.path))
        for file in (
            sorted(model_files(folder)) if location.gguf_file is None else [location.gguf_file]
        ):
            state = (folder / file).stat()
            digest.update(f"{file} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER_FILE).is_file()


def adapters_of(name: str) -> tuple[list[str], str]:
    """Folders of stacked adapters, and the base model of the last. Raises CheckpointError, also for
    a cycle.
    """
    adapters: list[str] = []
    while is_adapter(name):
        file = Path(name) / ADAPTER_FILE
        if any(Path(name).samefile(adapter) for adapter in adapters):
            raise CheckpointError(f"{file} names a base that needs this adapter itself: {name}")
        adapters.append(name)
        config = read_json(file, CheckpointError)
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{file}: base_model_name_or_path must be the name of a model, got {base!r}"
            )
        # Peft would import the module named by megatron_core
        if config.get("megatron_config") is not None:
            raise CheckpointError(
                f"{file}: megatron_config imports modules of the adapter, which is not allowed"
            )
        name = base
    return adapters, name
