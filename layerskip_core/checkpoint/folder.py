"""A model's folder, read without transformers, which takes seconds to import: settings, weights and tokenizer.

`lean_spec` and `lean_tokenizer` read folders that transformers 5 wrote: config.json holds every default, and tokenizer.json
the whole tokenizer. They return None for others, which need transformers.
"""

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json_object
from ..model import ModelSpec, missing_feature
from ..model.architectures import is_complete
from ..model.weights import Take
from ..prompting import Tokenizer, special_ids

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
INT4_FILE = "int4.safetensors"  # beside the weights, see beside.py
EXIT_BLOCKS_FILE = "exit_blocks.safetensors"  # beside the weights, see beside.py
PACKED_FILE = "packed.safetensors"  # in the place of the weights, see packed_file.py
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKENIZER_CLASS = "TokenizersBackend"  # of a tokenizer without code of its own


# Settings


def read_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder; empty if there is no such file. Raises CheckpointError for other content."""
    path = Path(folder) / name
    return read_json_object(path, CheckpointError) if path.is_file() else {}


def lean_spec(folder: str) -> ModelSpec | None:
    """What the model of a folder is that needs no transformers; None for one that does.

    Raises CheckpointError for a value of the wrong type or out of range.
    """
    config = read_settings(folder, CONFIG_FILE)
    major = str(config.get("transformers_version", "")).split(".")[0]
    recent = major.isdecimal() and int(major) >= 5
    special = {"quantization_config", "auto_map"} & config.keys()
    if not recent or special or not is_complete(config) or not (weight_files(folder) or is_packed(folder)):
        return None
    spec = ModelSpec.of(SimpleNamespace(**config))
    simple = all(rope.type == "default" and "rope_theta" in rope.parameters for rope in spec.ropes)
    return spec if simple and missing_feature(spec) is None else None


def generation_config(folder: str) -> SimpleNamespace:
    """generation_config.json as attributes; without attributes if the folder has no such file."""
    return SimpleNamespace(**read_settings(folder, GENERATION_FILE))


# Weights


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


class FileWeights:
    """The weights in a folder's safetensors files.

    Each is read when it is taken, into memory of its own: there is never a second copy of all, and nothing stays mapped.
    """

    def __init__(self, folder: str, spec: ModelSpec, device: torch.device) -> None:
        """Raises CheckpointError for a weight that is missing, or has another shape or type than `spec` needs."""
        self._device = device
        self._files = open_weights(folder)
        check_stored_weights(self._files, spec)

    def stored(self, name: str) -> Tensor:
        """A weight as it is stored. Only what is used of it is read."""
        return self._files[name].mapped(name)

    def reader(self, dtype: torch.dtype) -> Take:
        """A function from a weight's name to the weight in `dtype`, or to None if the files have no such weight."""

        def take(name: str) -> Tensor | None:
            file = self._files.get(name)
            return None if file is None else file.read(name).to(self._device, dtype)

        return take


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


# Tokenizers


class LeanTokenizer:
    """A `Tokenizer` by the tokenizers library alone, for a folder whose tokenizer.json is the whole tokenizer."""

    def __init__(self, folder: str) -> None:
        import tokenizers

        self.backend_tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        settings = read_settings(folder, TOKENIZER_FILE)
        named = {name: _content(settings.get(name)) for name in _NAMED_TOKENS}
        self.special_tokens_map = {name: content for name, content in named.items() if content is not None}
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token")
        template = Path(folder) / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}
        encoded = self.backend_tokenizer.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        ids = map(self.backend_tokenizer.token_to_id, self.all_special_tokens)
        return [token for token in ids if token is not None]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert not clean_up_tokenization_spaces, "only transformers cleans up"
        return str(self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, ids: int) -> str:
        return str(self.backend_tokenizer.id_to_token(ids))

    def _id(self, name: str) -> int | None:
        content = self.special_tokens_map.get(name)
        token: int | None = None if content is None else self.backend_tokenizer.token_to_id(content)
        return token


def lean_tokenizer(folder: str) -> LeanTokenizer | None:
    """The tokenizer of a folder if tokenizer.json is all of it; None if it needs transformers."""
    settings = read_settings(folder, TOKENIZER_FILE)
    whole = settings.get("tokenizer_class") == _TOKENIZER_CLASS and (Path(folder) / "tokenizer.json").is_file()
    return LeanTokenizer(folder) if whole else None


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


def _content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: bare, or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
