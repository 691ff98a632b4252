"""Reads a checkpoint's folder without transformers, whose model and configuration modules take seconds to import.

Only what a recent transformers wrote: there every default is in config.json, and tokenizer.json is the whole tokenizer.
Anything else is left to transformers.
"""

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model import ModelSpec, can_pack
from .stored import COMPLETE, GENERATION_FILE, TOKENIZER_FILE, check_stored_weights, open_weights, read_config, read_settings

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKENIZER_CLASS = "TokenizersBackend"  # a tokenizer that adds nothing to tokenizer.json


class LeanConfig(SimpleNamespace):
    """config.json as attributes."""


def lean_config(folder: str) -> LeanConfig | None:
    """The configuration of a folder that can be read without transformers; None where only transformers can tell."""
    config = read_config(folder)
    major = str(config.get("transformers_version", "")).split(".")[0]
    recent = major.isdecimal() and int(major) >= 5
    special = {"quantization_config", "auto_map"} & config.keys()
    if not recent or special or not config.keys() >= COMPLETE or not list(Path(folder).glob("*.safetensors")):
        return None
    lean = LeanConfig(**config)
    rope = lean.rope_parameters
    simple_rope = isinstance(rope, dict) and rope.get("rope_type") == "default" and "rope_theta" in rope
    return lean if simple_rope and can_pack(lean) else None


def generation_config(folder: str) -> SimpleNamespace:
    """generation_config.json as attributes, none where there is none."""
    return SimpleNamespace(**read_settings(folder, GENERATION_FILE))


class FileWeights:
    """The weights of a folder's safetensors files, each read when it is taken: no second copy of the model is ever there."""

    def __init__(self, folder: str, spec: ModelSpec, device: torch.device) -> None:
        """Raises CheckpointError when a weight is missing or has another shape or type than the model needs."""
        self._device = device
        self._files = open_weights(folder)
        check_stored_weights(self._files, spec)

    def reader(self, dtype: torch.dtype) -> Any:
        """A function from a weight's name to the weight in `dtype`, or to None where there is none."""

        def take(name: str) -> Tensor | None:
            file = self._files.get(name)
            return None if file is None else file.get_tensor(name).to(self._device, dtype)

        return take


class LeanTokenizer:
    """tokenizer.json by the tokenizers library: what decoding needs. For anything else it becomes transformers' tokenizer."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = self._settings = read_settings(folder, TOKENIZER_FILE)
        self.eos_token_id = self._id(settings.get("eos_token"))
        self.pad_token_id = self._id(settings.get("pad_token"))
        template = Path(folder) / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}
        encoded = self._tokenizer.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def decode(self, ids: list[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        if clean_up_tokenization_spaces:
            return str(self.full.decode(ids, skip_special_tokens, clean_up_tokenization_spaces=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizers library's object, by the name that transformers gives it."""
        return self._tokenizer

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, such as eos_token."""
        found = {name: _content(self._settings.get(name)) for name in _NAMED_TOKENS}
        return {name: content for name, content in found.items() if content is not None}

    @cached_property
    def full(self) -> Any:
        """transformers' tokenizer of the same folder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_folder" not in self.__dict__:  # copying and pickling ask before there is anything
            raise AttributeError(name)
        return getattr(self.full, name)

    def _id(self, token: Any) -> int | None:
        content = _content(token)
        found: int | None = None if content is None else self._tokenizer.token_to_id(content)
        return found


def _content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: bare, or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def lean_tokenizer(folder: str) -> LeanTokenizer | None:
    """The tokenizer of a folder if tokenizer.json is all of it; None where only transformers can tell."""
    settings = read_settings(folder, TOKENIZER_FILE)
    whole = settings.get("tokenizer_class") == _TOKENIZER_CLASS and (Path(folder) / "tokenizer.json").is_file()
    return LeanTokenizer(folder) if whole else None
