"""From a model's name to its files: an embedded model, a folder, a GGUF file or a hub id."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from ..errors import CheckpointError, ConfigError, LockedError, did_you_mean, first_line
from ..files import is_empty, read_json
from .info import ADAPTER_FILE, gguf_in, holds_model

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


@dataclass(frozen=True)
class ModelRef:
    """A model as the user named it, and the files that this means.

    Attributes:
        name: as typed.
        path: its folder, or the hub id itself if only transformers can read that.
        gguf: the file, of a model in a GGUF file.
    """

    name: str
    path: str
    gguf: Path | None = None

    @classmethod
    def of(cls, name: str) -> "ModelRef":
        """Finds a model on this machine; a hub id is not looked up. Raises CheckpointError for a
        name of no model, and for a folder without one.
        """
        require_model(name)
        path = Path(name)
        if name in EMBEDDED:
            return cls(name, str(resources.files("layerskip_core.embedded") / EMBEDDED[name]))
        if path.is_file():
            return cls(name, str(path.parent), path)
        if is_folder(name):
            from .save import settle

            settle(path)
            if not holds_model(path):
                raise CheckpointError(
                    f"folder {name} holds no model: there is no config.json in it"
                )
            return cls(name, name, gguf_in(path))
        return cls(name, name)

    def fetched(self) -> "ModelRef":
        """The same model with a hub id's files in a folder. Raises CheckpointError.

        A hub id without safetensors stays as it is: transformers may read it.
        """
        if is_folder(self.path):
            return self
        from .folder import is_packed, weight_files

        folder = fetched_folder(self.name)
        _, revision = _hub_id(self.name)
        if revision or weight_files(folder) or is_packed(folder):
            return replace(self, path=folder)
        return self

    @property
    def is_adapter(self) -> bool:
        return self.gguf is None and is_adapter(self.path)

    @property
    def folder(self) -> str | None:
        """The folder of a model with config.json; None for a GGUF file, a hub id and an adapter."""
        if self.gguf is not None or self.is_adapter or not is_folder(self.path):
            return None
        return self.path

    @property
    def own_folder(self) -> str | None:
        """The folder, if files can be added to it: not the one of an embedded model."""
        return None if self.name in EMBEDDED else self.folder

    @property
    def sidecar_folder(self) -> str | None:
        """The folder with the model's drafters: its own, also that of a GGUF file that
        `train-drafter` wrote; None for models without one.
        """
        if self.gguf is not None and self.gguf == gguf_in(self.path):
            return self.path
        return self.folder

    @property
    def file_names(self) -> list[str]:
        """Sorted names of the model's files, relative to `path`. Raises CheckpointError."""
        if self.gguf is not None and self.sidecar_folder is None:
            return [self.gguf.name]
        from .save import model_files

        return sorted(model_files(Path(self.path)))

    def whole_folder(self) -> str:
        """The folder of a whole model, fetched from the hub if need be. Raises CheckpointError for
        other kinds.
        """
        if self.gguf is not None or self.is_adapter:
            found = "an adapter" if self.gguf is None else "a GGUF file"
            raise CheckpointError(
                f"`model` {self.name} is {found}; needed a folder with all weights: `layerskip import`"
            )
        from .folder import refuse_packed

        folder = fetched_folder(self.path)
        with reading(self.name):
            refuse_packed(folder)
        return folder


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


def fetched_folder(name: str) -> str:
    """A folder, or the folder of a hub id's fetched files. Raises CheckpointError."""
    if is_folder(name):
        return name
    from huggingface_hub import snapshot_download

    hub_id, revision = _hub_id(name)
    with reading(name):
        return snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_NOT_OURS,
        )


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


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns errors other than ConfigError into a CheckpointError of one line that names the
    model.
    """
    try:
        yield
    except (ConfigError, LockedError):
        raise
    # Libraries raise OSError, ValueError, RuntimeError, SafetensorError and others
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _RUST_PANIC:
            raise
        exists = isinstance(error, CheckpointError) or Path(name).exists() or name in EMBEDDED
        absent = "" if exists else "there is no such folder, and as a hub id: "
        raise CheckpointError(f"cannot load model {name}: {absent}{first_line(error)}") from error


def files_digest(name: str) -> str:
    """A digest of the names, sizes and times of a model's files, and of its base's if it is an
    adapter.
    """
    digest = hashlib.sha256()
    adapters, base = adapters_of(name)
    for each in (*adapters, base):
        model = ModelRef.of(each).fetched()
        folder = Path(fetched_folder(model.path))
        for name in replace(model, path=str(folder)).file_names:
            state = (folder / name).stat()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
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
        # peft would import the module named by megatron_core
        if config.get("megatron_config") is not None:
            raise CheckpointError(
                f"{file}: megatron_config imports modules of the adapter, which is not allowed"
            )
        name = base
    return adapters, name
