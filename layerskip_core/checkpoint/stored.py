"""Reads and checks a checkpoint's files before anything is built from them. Every way of loading uses these checks."""

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model.architectures import architecture_of, is_complete
from ..model.config_values import check_token_ids, check_values
from ..model.spec import ModelSpec
from ..prompting.tokenizer import Tokenizer, special_ids
from ..storage.json_reading import read_json_object

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
INT4_FILE = "int4.safetensors"  # beside the weights, see int4_file.py
EXIT_BLOCKS_FILE = "exit_blocks.safetensors"  # beside the weights, see exit_blocks_file.py
PACKED_FILE = "packed.safetensors"  # in the place of the weights, see packed_file.py
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class StoredWeight(Protocol):
    """A weight in a safetensors file; its numbers are not read."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class WeightFile:
    """An open safetensors file."""

    def __init__(self, path: str | Path) -> None:
        """Raises what safetensors raises for a file that is damaged, of a wrong length, or not readable."""
        from safetensors import safe_open

        self._bytes = open(path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._bytes.close)
        self._file: Any = safe_open(path, "pt", device="cpu")  # checks the header
        length = int.from_bytes(self._bytes.read(8), "little")
        self._header = json.loads(self._bytes.read(length))
        self._start = 8 + length

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def metadata(self) -> dict[str, str]:
        return self._file.metadata() or {}

    def get_slice(self, name: str) -> StoredWeight:
        part: StoredWeight = self._file.get_slice(name)
        return part

    def mapped(self, name: str) -> Tensor:
        """A weight that is a part of the mapped file: what is used of it is read, and stays in memory as the file does."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read(self, name: str) -> Tensor:
        """A weight in memory of its own, which is free again without it. Raises OSError."""
        like = self.mapped(name)
        tensor = torch.empty(like.shape, dtype=like.dtype)
        rest = tensor.view(-1).view(torch.uint8).numpy().data
        self._bytes.seek(self._start + self._header[name]["data_offsets"][0])
        while rest:
            count = self._bytes.readinto(rest)
            if not count:
                raise OSError("the file ends too early")
            rest = rest[count:]
        return tensor


def read_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder; empty if there is no such file. Raises CheckpointError for other content."""
    path = Path(folder) / name
    return read_json_object(path, CheckpointError) if path.is_file() else {}


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json. Its values and those of generation_config.json are checked.

    Raises CheckpointError for an unsupported model type, and for a value of the wrong type or out of range.
    """
    config = read_settings(folder, CONFIG_FILE)
    check_config(config)
    generation = read_settings(folder, GENERATION_FILE)
    try:
        check_token_ids(generation, config.get("vocab_size"))
    except CheckpointError as error:
        raise CheckpointError(f"{GENERATION_FILE}: {error}") from None
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """The same checks for a config that was read from elsewhere, such as the hub."""
    if "model_type" in config:
        architecture_of(config["model_type"])
    check_values(config)
    check_token_ids(config, config.get("vocab_size"))
    if is_complete(config):
        ModelSpec.of(SimpleNamespace(**config))


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder that hold the model's own weights."""
    others = {Path(folder) / name for name in (INT4_FILE, EXIT_BLOCKS_FILE, PACKED_FILE)}
    return sorted(set(Path(folder).glob("*.safetensors")) - others)


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds weights that are packed for the compiled kernels, which only decode."""
    return (Path(folder) / PACKED_FILE).is_file() and not weight_files(folder)


def refuse_packed(folder: str | Path) -> None:
    """Raises CheckpointError for such a folder."""
    if is_packed(folder):
        found = f"found {PACKED_FILE}, which only decoding can use"
        raise CheckpointError(f"needed the weights of a model, {found}: give the model that it was packed from")


def open_weights(folder: str | Path) -> dict[str, WeightFile]:
    """The open safetensors file of each of the model's own weights in a folder, by the weight's name."""
    files: dict[str, WeightFile] = {}
    for path in weight_files(folder):
        file = WeightFile(path)
        files.update(dict.fromkeys(file.keys(), file))
    return files


def check_stored_weights(files: Mapping[str, WeightFile], spec: ModelSpec) -> None:
    """Checks the headers of the files; no weight is read.

    Raises CheckpointError for a weight that is missing, has another shape than `spec` says, or is not floating point.
    """
    slices = {name: files[name].get_slice(name) for name in spec.shapes if name in files}
    spec.check_weights({name: tuple(part.get_shape()) for name, part in slices.items()})
    check_kinds(slices)


def check_kinds(slices: Mapping[str, StoredWeight]) -> None:
    """Raises CheckpointError for a weight that is not floating point."""
    for name, part in slices.items():
        if part.get_dtype() not in _FLOATS:
            raise CheckpointError(f"the weight {name} must be one of {', '.join(_FLOATS)}, found {part.get_dtype()}")


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError for a tokenizer without a vocabulary, or with words that the model has no embedding for.

    Special tokens may lie beyond the embeddings, as those of Gemma 3 for images do: no text contains them.
    """
    if tokenizer.vocab_size == 0:
        raise CheckpointError("the tokenizer has no vocabulary")
    if len(tokenizer) <= vocab_size:
        return
    special = set(special_ids(tokenizer).values())
    beyond = {token: word for word, token in tokenizer.get_vocab().items() if token >= vocab_size and token not in special}
    if beyond:
        first = min(beyond)
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {vocab_size} (vocab_size): "
            f"{beyond[first]!r} is token {first}"
        )
