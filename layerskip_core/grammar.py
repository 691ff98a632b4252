"""Constrained decoding: answers that match a JSON schema, a regular expression, a grammar, or one of several texts.

llguidance (extra `grammar`) masks the next token, and gives forced tokens, which are free drafts.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, LayerSkipError, first_line, refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON as json.dumps writes it: with fixed white space, all of an object but its values is forced.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@lru_cache(maxsize=64)  # many requests to a server share a grammar
def guide(asked: tuple[str, str], tokenizer: Any, vocab: int, eos_ids: frozenset[int]) -> "Matcher":
    """A compiled grammar (`guided` of DecodingConfig). Raises ConfigError if impossible, LayerSkipError without llguidance."""
    kind, text = asked
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise LayerSkipError(f"`{kind}` needs the extra `grammar`: pip install 'layerskip[grammar]'") from None
    if not eos_ids:
        raise refused(kind, "used with a model that has an EOS token", "one without")
    words = _words(tokenizer, vocab, eos_ids)
    try:
        if kind == "schema":
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            if kind == "choice":
                text = "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(text))
            grammar = LLMatcher.grammar_from_lark(text)
        compiled = LLMatcher(words, grammar, log_level=0)
        fault = compiled.get_error()
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ConfigError(f"`{kind}` cannot be compiled: {fault.strip().splitlines()[0]:.200}", kind)
    return Matcher(compiled, eos_ids)


@lru_cache(maxsize=4)
def _words(tokenizer: Any, vocab: int, eos_ids: frozenset[int]) -> "LLTokenizer":
    """The texts of the model's tokens, as llguidance holds them."""
    from llguidance import LLTokenizer

    try:
        text = tokenizer.backend_tokenizer.to_str()
        return LLTokenizer(text, n_vocab=max(vocab, len(tokenizer)), eos_token=sorted(eos_ids))
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"llguidance cannot use this model's tokenizer: {first_line(error)}") from None


class Matcher:
    """A row's state in its grammar. `output`: the row's tokens; `drafts`: further tokens."""

    def __init__(self, matcher: "LLMatcher", eos_ids: frozenset[int]) -> None:
        self._matcher, self._eos_ids = matcher, eos_ids
        self._read: list[int] = []  # tokens that the matcher has consumed
        self._masks: dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.bool_]]] = {}  # by drafts, for the present output
        self._masks_of = -1  # number of tokens in that output

    def matcher(self) -> "Matcher":
        """A copy for a new row."""
        return Matcher(self._matcher.deep_copy(), self._eos_ids)

    def forbidden(self, output: list[int], drafts: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """(V,) or longer, True for tokens that may not follow the drafts; None if these end the answer."""
        if not self._eos_ids.isdisjoint(drafts):
            return None
        if self._masks_of != len(output):
            self._masks, self._masks_of = {}, len(output)
        key = tuple(drafts)
        if key not in self._masks:
            self._go_to([*output, *drafts])
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._masks[key] = np.unpackbits(bits, bitorder="little") == 0
        return self._masks[key]

    def permitted(self, output: list[int], drafts: Sequence[int]) -> int:
        """How many of the drafts the grammar permits."""
        size = next((place for place, token in enumerate(drafts) if token in self._eos_ids), len(drafts))
        self._go_to(output)
        count: int = self._matcher.validate_tokens(list(drafts[:size]))
        if count == size < len(drafts):
            self._go_to([*output, *drafts[:size]])
            count += self._matcher.is_accepting()
        return count

    def forced(self, output: list[int]) -> list[int]:
        """The forced next tokens, and the EOS if nothing else can follow them; none after an EOS."""
        if output and output[-1] in self._eos_ids:
            return []
        self._go_to(output)
        tokens = list(self._matcher.compute_ff_tokens())
        if len(self._eos_ids) == 1:
            self._go_to([*output, *tokens])
            if self._matcher.is_stopped():
                tokens += self._eos_ids
        return tokens

    def _go_to(self, tokens: list[int]) -> None:
        same = min(len(self._read), len(tokens))
        while tokens[:same] != self._read[:same]:  # at most the drafts of a round
            same -= 1
        if same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
        if same < len(tokens):
            self._matcher.consume_tokens(tokens[same:])
        self._read = list(tokens)
