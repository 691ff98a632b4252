"""Reads a checkpoint's folder without transformers, which takes seconds to import.

This works for folders that transformers 5 wrote: config.json holds every default, and tokenizer.json the whole tokenizer.
`lean_config` and `lean_tokenizer` return None for others, which then need transformers.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model import ModelSpec, can_pack
from ..model.architectures import is_complete
from ..model.weights import Take
from .stored import (
    GENERATION_FILE,
    TOKENIZER_FILE,
    check_stored_weights,
    is_packed,
    open_weights,
    read_config,
    read_settings,
    weight_files,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKENIZER_CLASS = "TokenizersBackend"  # of a tokenizer without code of its own


class LeanConfig(SimpleNamespace):
    """config.json as attributes."""


def lean_config(folder: str) -> LeanConfig | None:
    """The configuration of a folder that needs no transformers; None for one that does."""
    config = read_config(folder)
    major = str(config.get("transformers_version", "")).split(".")[0]
    recent = major.isdecimal() and int(major) >= 5
    special = {"quantization_config", "auto_map"} & config.keys()
    if not recent or special or not is_complete(config) or not (weight_files(folder) or is_packed(folder)):
        return None
    lean = LeanConfig(**config)
    simple = all(rope.type == "default" and "rope_theta" in rope.parameters for rope in ModelSpec.of(lean).ropes)
    return lean if simple and can_pack(lean) else None


def generation_config(folder: str) -> SimpleNamespace:
    """generation_config.json as attributes; without attributes if the folder has no such file."""
    return SimpleNamespace(**read_settings(folder, GENERATION_FILE))


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


class LeanTokenizer:
    """A `Tokenizer` by the tokenizers library alone, for a folder whose tokenizer.json is the whole tokenizer."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = read_settings(folder, TOKENIZER_FILE)
        named = {name: _content(settings.get(name)) for name in _NAMED_TOKENS}
        self.special_tokens_map = {name: content for name, content in named.items() if content is not None}
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token")
        template = Path(folder) / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}
        encoded = self._tokenizer.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        ids = map(self._tokenizer.token_to_id, self.all_special_tokens)
        return [token for token in ids if token is not None]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self._tokenizer.get_added_tokens_decoder())

    @property
    def backend_tokenizer(self) -> "Tokenizer":
        """The tokenizers library's object, by the name that transformers gives it."""
        return self._tokenizer

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert not clean_up_tokenization_spaces, "only transformers cleans up"
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, ids: int) -> str:
        return str(self._tokenizer.id_to_token(ids))

    def _id(self, name: str) -> int | None:
        content = self.special_tokens_map.get(name)
        token: int | None = None if content is None else self._tokenizer.token_to_id(content)
        return token


def _content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: bare, or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def lean_tokenizer(folder: str) -> LeanTokenizer | None:
    """The tokenizer of a folder if tokenizer.json is all of it; None if it needs transformers."""
    settings = read_settings(folder, TOKENIZER_FILE)
    whole = settings.get("tokenizer_class") == _TOKENIZER_CLASS and (Path(folder) / "tokenizer.json").is_file()
    return LeanTokenizer(folder) if whole else None
