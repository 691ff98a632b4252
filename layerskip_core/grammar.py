"""Constrained decoding: answers that match a JSON schema, a regular expression, a grammar, or one
of several texts.

llguidance (extra `grammar`) masks the next token, and gives forced tokens, which are free drafts.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, LayerSkipError, first_line, plural, refused
from .prompting import special_ids

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON as json.dumps writes it: with fixed white space, all of an object but its values is forced.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEAD_END = "NoExtensionBias"  # llguidance's name for a state that no token can follow
# Parts of a Lark grammar in which the name of a token is no symbol: strings, comments and regular
# expressions.
_QUOTED = r'"(?:\\.|[^"\\])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/'


@lru_cache(maxsize=64)  # many requests to a server share a grammar
def guide(asked: tuple[str, str], tokenizer: Any, vocab: int, eos_ids: frozenset[int]) -> "Matcher":
    """A compiled grammar (`guided` of DecodingConfig). Raises ConfigError if impossible,
    LayerSkipError without llguidance.
    """
    kind, text = asked
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise LayerSkipError(
            f"`{kind}` needs the extra `grammar`: pip install 'layerskip[grammar]'"
        ) from None
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
                text = "start: " + " | ".join(
                    json.dumps(each, ensure_ascii=False) for each in json.loads(text)
                )
            grammar = LLMatcher.grammar_from_lark(_with_ids(text, tokenizer))
        compiled = LLMatcher(words, grammar, log_level=0)
        fault = compiled.get_error()
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ConfigError(
            f"`{kind}` cannot be compiled: {fault.strip().splitlines()[0]:.200}", kind
        )
    return Matcher(compiled, eos_ids, kind)


def _with_ids(lark: str, tokenizer: Any) -> str:
    """A Lark grammar with ids in place of the names of added tokens that have a text.

    For llguidance such tokens are text (see `_Words`), and only special tokens have names.
    """
    named = {
        str(token.content): token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if not token.special
    }
    names = "|".join(re.escape(name) for name in named if re.fullmatch("<[^<>]+>", name))
    if not names:
        return lark

    def with_id(match: re.Match[str]) -> str:
        return match[1] or f"<[{named[match[2]]}]>"

    return re.sub(f"({_QUOTED})|({names})", with_id, lark)


@lru_cache(maxsize=4)
def _words(tokenizer: Any, vocab: int, eos_ids: frozenset[int]) -> "LLTokenizer":
    """The texts of the model's tokens, as llguidance holds them."""
    from llguidance import LLTokenizer

    try:
        words: Any = _Words(tokenizer, max(vocab, len(tokenizer)), sorted(eos_ids))
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"llguidance cannot use this model's tokenizer: {first_line(error)}"
        ) from None
    return LLTokenizer(words, eos_token=sorted(eos_ids))


class _Words:
    """A tokenizer in the form that llguidance reads (its TokenizerWrapper).

    llguidance's own reading of a tokenizer.json takes added tokens such as `<tool_call>` for
    special ones, whose text it never permits, although its tokenisation of forced text contains
    them: an answer then ends where a literal begins. Here added tokens with a text are text, and
    forced text has no special tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, size: int, eos_ids: list[int]) -> None:
        from llguidance import LLTokenizer

        special = special_ids(tokenizer)
        self._own = LLTokenizer(
            tokenizer.backend_tokenizer.to_str(), n_vocab=size, eos_token=eos_ids, slices=[]
        )
        self.tokens = [self._own.decode_bytes([token]) for token in range(size)]
        for token in range(len(tokenizer), size):  # rows of the embedding without a token
            self.tokens[token] = b""
        # Without a text in an answer
        self.special_token_ids = sorted({*special.values(), *eos_ids})
        self.eos_token_id = eos_ids[0]
        # After the first character of a special token's text.
        breaks = [
            f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})"
            for text in special
            if len(text) > 1
        ]
        self._breaks = re.compile("|".join(breaks) or "(?!)")

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text. The text of a special token is broken in two, so that it stays
        text.
        """
        ids = list[int]()
        for part in self._breaks.split(text):
            ids += self._own.tokenize_str(part)
        return ids


class Matcher:
    """A row's state in its grammar. `output`: the row's tokens; `drafts`: further tokens."""

    def __init__(self, compiled: "LLMatcher", eos_ids: frozenset[int], kind: str) -> None:
        """`kind`: one of GUIDES, for messages."""
        self._compiled = compiled  # at the start, never advanced
        self._matcher = compiled.deep_copy()
        self._eos_ids = eos_ids
        self._kind = kind
        self._read: list[int] = []  # tokens that the matcher has consumed
        # By drafts, for the present output
        self._masks: dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self._masks_of = -1  # number of tokens in that output

    def matcher(self) -> "Matcher":
        """A new one for a row, at the start."""
        return Matcher(self._compiled, self._eos_ids, self._kind)

    def forbidden(
        self, output: list[int], drafts: Sequence[int]
    ) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """(V,) or longer, True for tokens that may not follow the drafts; None if these end the
        answer.

        Where no token can follow, only EOS may: the answer ends, and `mismatch` says why.
        """
        if not self._eos_ids.isdisjoint(drafts):
            return None
        if self._masks_of != len(output):
            self._masks = {}
            self._masks_of = len(output)
        key = tuple(drafts)
        if key not in self._masks:
            self._go_to([*output, *drafts])
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._masks[key] = np.unpackbits(bits, bitorder="little") == 0
        return self._masks[key]

    def permitted(self, output: list[int], drafts: Sequence[int]) -> int:
        """How many of the drafts the grammar permits."""
        size = next(
            (place for place, token in enumerate(drafts) if token in self._eos_ids), len(drafts)
        )
        self._go_to(output)
        count: int = self._matcher.validate_tokens(list(drafts[:size]))
        if count == size < len(drafts):
            self._go_to([*output, *drafts[:size]])
            count += self._matcher.is_accepting()
        return count

    def forced(self, output: list[int]) -> list[int]:
        """The forced next tokens, and the EOS if nothing else can follow them; none after an
        EOS.
        """
        if output and output[-1] in self._eos_ids:
            return []
        self._go_to(output)
        tokens = list(self._matcher.compute_ff_tokens())
        if len(self._eos_ids) == 1:
            self._go_to([*output, *tokens])
            if self._matcher.is_stopped():
                tokens += self._eos_ids
        return tokens

    def mismatch(self, output: list[int]) -> str | None:
        """A message if an output ends with an EOS and does not match the grammar."""
        if not output or output[-1] not in self._eos_ids:
            return None
        self._go_to(output[:-1])
        if self._matcher.is_accepting():
            return None
        self._matcher.compute_bitmask()  # fails as it did before the EOS
        reason, _, _ = str(self._matcher.get_error()).partition("\n")
        if reason == _DEAD_END:
            reason = "it permits no token of the model there"
        return f"the answer ended after {plural(len(output) - 1, 'token')} without matching `{self._kind}`: {reason}"

    def _go_to(self, tokens: list[int]) -> None:
        same = min(len(self._read), len(tokens))
        while tokens[:same] != self._read[:same]:  # at most the drafts of a round
            same -= 1
        # After drafts that no token can follow; an error cannot be rolled back
        if self._matcher.is_error():
            self._matcher = self._compiled.deep_copy()
            same = 0
        elif same < len(self._read):
            self._matcher.rollback(len(self._read) - same)
        if same < len(tokens):
            self._matcher.consume_tokens(tokens[same:])
        self._read = list(tokens)
