"""Text of special tokens that a user wrote is text: only a template's own makes tokens of control."""

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

_known: "WeakKeyDictionary[Any, SpecialText]" = WeakKeyDictionary()


@dataclass(frozen=True)
class SpecialText:
    """The special tokens of a tokenizer, and a tokenizer that knows them by secret names only.

    A prompt cannot guess a name, so in `sealed` text special tokens are those alone that stood in it before the prompt did.
    Such text is cut at the same places and encoded in one piece, as by the tokenizer itself.
    """

    tokenizer: Any  # of the tokenizers library
    names: dict[str, str]  # of the tokens, by their text
    hides: bool  # whether a token may stand in a text that becomes its own by normalisation
    mark: str

    def occurs(self, text: str) -> int:
        """How often text of special tokens stands in a text."""
        if not self._first.search(text):
            return 0
        return sum(text.count(token) for token in self.names)

    def in_prompt(self, text: str) -> bool:
        """Whether the tokenizer would find special tokens in a text."""
        if self.hides:
            ids = {self.tokenizer.token_to_id(token) for token in self.names}
            return not ids.isdisjoint(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return bool(self.occurs(text))

    def masked(self, text: str) -> str:
        """A prompt in which special tokens are marked, so that a template can be rendered around it."""
        tokens = list(self.names)
        return self._pattern.sub(lambda match: f"{self.mark}{tokens.index(match[0])}{self.mark}", text)

    def sealed(self, text: str) -> str:
        """A template's text with the secret names in place of its special tokens, and with those of the prompt unmasked."""
        tokens = list(self.names)
        named = self._pattern.sub(lambda match: self.names[match[0]], text)
        return re.sub(f"{self.mark}(\\d+){self.mark}", lambda match: tokens[int(match[1])], named)

    def encode(self, sealed: str, add_special_tokens: bool) -> Any:
        """The tokenizers library's Encoding of a sealed text."""
        return self._renamed.encode(sealed, add_special_tokens=add_special_tokens)

    @cached_property
    def _first(self) -> re.Pattern[str]:
        """A quick look: most prompts hold no character that a special token begins with."""
        characters = "".join(sorted({token[0] for token in self.names}))
        return re.compile(f"[{re.escape(characters)}]" if characters else "(?!)")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """The longest of several that begin at one place, as the tokenizers library finds them."""
        return re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _renamed(self) -> Any:
        """A copy of the tokenizer whose special tokens have their secret names."""
        from tokenizers import Tokenizer

        document = json.loads(self.tokenizer.to_str())
        document["truncation"] = document["padding"] = None
        for token in document["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        model = document["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self.names.get(token, token): number for token, number in vocabulary.items()}
        else:  # of a Unigram model: tokens and their scores
            model["vocab"] = [[self.names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(document))


def special_text(tokenizer: Any) -> SpecialText | None:
    """The special tokens of a tokenizer; None for one that is not of the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
        return None
    found = _known.get(tokenizer)
    if found is None:
        special = [token for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
        secret = secrets.token_hex(8)
        names = {token.content: f"{secret}x{number}x" for number, token in enumerate(special)}
        hides = backend.normalizer is not None and any(token.normalized for token in special)
        found = _known[tokenizer] = SpecialText(backend, names, hides, f"\ue000{secrets.token_hex(8)}\ue000")
    return found
