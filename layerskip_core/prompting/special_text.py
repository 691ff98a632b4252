"""Keeps the text of special tokens in a user's prompt text: only a template's special tokens become tokens."""

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_known: "WeakKeyDictionary[Any, SpecialText]" = WeakKeyDictionary()


@dataclass(frozen=True)
class SpecialText:
    """The special tokens of a tokenizer, and a copy of it that knows them by secret names.

    A prompt cannot contain a secret name, because the names are random. So in `sealed` text the only special tokens are those
    that were in it before the prompt was filled in. It is encoded in one piece and splits as with the tokenizer itself.
    """

    tokenizer: "tokenizers.Tokenizer"
    names: dict[str, str]  # the tokens' secret names, by their text
    hides: bool  # whether normalisation can turn other text into a token's
    mark: str  # surrounds the number of a masked token

    def occurs(self, text: str) -> int:
        """How often special tokens occur in a text, as text."""
        if not self._first.search(text):
            return 0
        return sum(text.count(token) for token in self.names)

    def in_prompt(self, text: str) -> bool:
        """Whether the tokenizer would make special tokens from a text."""
        if self.hides:
            ids = {self.tokenizer.token_to_id(token) for token in self.names}
            return not ids.isdisjoint(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return bool(self.occurs(text))

    def masked(self, text: str) -> str:
        """A prompt with its special tokens replaced by marks, so that a chat template can be rendered around it."""
        tokens = list(self.names)
        return self._pattern.sub(lambda match: f"{self.mark}{tokens.index(match[0])}{self.mark}", text)

    def sealed(self, text: str) -> str:
        """A template's text with secret names in place of its special tokens; masked ones of the prompt are text again."""
        tokens = list(self.names)
        named = self._pattern.sub(lambda match: self.names[match[0]], text)
        return re.sub(f"{self.mark}(\\d+){self.mark}", lambda match: tokens[int(match[1])], named)

    def encode(self, sealed: str, add_special_tokens: bool) -> "tokenizers.Encoding":
        """The tokenizers library's Encoding of a sealed text."""
        return self._renamed.encode(sealed, add_special_tokens=add_special_tokens)

    @cached_property
    def _first(self) -> re.Pattern[str]:
        """A quick test: most prompts contain no character that a special token begins with."""
        characters = "".join(sorted({token[0] for token in self.names}))
        return re.compile(f"[{re.escape(characters)}]" if characters else "(?!)")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Prefers the longest of several tokens that begin at one place, as the tokenizers library does."""
        return re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _renamed(self) -> "tokenizers.Tokenizer":
        """A copy of the tokenizer whose special tokens have their secret names."""
        import tokenizers

        document = json.loads(self.tokenizer.to_str())
        document["truncation"] = document["padding"] = None
        for token in document["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        model = document["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self.names.get(token, token): number for token, number in vocabulary.items()}
        else:  # a Unigram model has a list of tokens with scores
            model["vocab"] = [[self.names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(document))


def special_text(tokenizer: Tokenizer) -> SpecialText | None:
    """The special tokens of a tokenizer; None for one that is written in Python and does not use the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
        return None
    known = _known.get(tokenizer)
    if known is None:
        special = [token for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
        secret = secrets.token_hex(8)
        names = {token.content: f"{secret}x{number}x" for number, token in enumerate(special)}
        hides = backend.normalizer is not None and any(token.normalized for token in special)
        known = _known[tokenizer] = SpecialText(backend, names, hides, f"\ue000{secrets.token_hex(8)}\ue000")
    return known
