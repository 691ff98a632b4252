"""Examples, conversations and packed documents as token ids with labels; and a tokenizer trained on
them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..data import Conversation, Example, Row
from ..errors import DataError, LayerSkipError, first_line
from ..losses import IGNORED
from ..prompting import RAW, PromptTemplate, encode_prompt, render_chat, special_text

_LONGEST_WORD = 1000  # characters
_ENDLESS = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")
_SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]


class EncodedRow(TypedDict):
    """A row of T tokens, in memory as int32."""

    input_ids: NDArray[np.int32]  # (T,)
    labels: NDArray[np.int32]  # (T,), IGNORED without a target; nothing predicts the first token
    truncated: bool
    documents: NotRequired[NDArray[np.int32]]  # (T,), of a packed row: by token, 0, 1, ...


def encoded_row(ids: list[int], labels: list[int], truncated: bool = False) -> EncodedRow:
    row = EncodedRow(
        input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32), truncated=truncated
    )
    row["labels"][:1] = IGNORED
    return row


@dataclass(frozen=True)
class Encoder:
    """Encodes examples in `template`, conversations in the chat template, and with `pack` plain
    text as packed documents.
    """

    tokenizer: Any
    template: PromptTemplate
    max_length: int
    pack: bool = False

    def rows(self, rows: Iterable[Row]) -> Iterator[EncodedRow]:
        """Encodes rows, to at most `max_length` tokens each."""
        most = self.max_length
        encoded = map(self._encoded, rows)
        if self.pack:
            yield from packed((ids for ids, _ in encoded), most)
            return
        for ids, labels in encoded:
            yield encoded_row(ids[:most], labels[:most], truncated=len(ids) > most)

    def prompts(self, rows: Iterable[Row]) -> Iterator[list[int]]:
        """Token ids of the examples' prompts; conversations are left out."""
        for row in rows:
            if isinstance(row, Example):
                with _naming(row):
                    ids = encode_prompt(self.tokenizer, self.template, row.prompt)
                yield ids

    def _encoded(self, row: Row) -> tuple[list[int], list[int]]:
        if self.pack and (isinstance(row, Conversation) or row.prompt):
            raise DataError(
                "packed rows are of plain text: one with a prompt, or a conversation, would be cut anywhere"
            )
        with _naming(row):
            return self._conversation(row) if isinstance(row, Conversation) else self._example(row)

    def _example(self, row: Example) -> tuple[list[int], list[int]]:
        """Prompt, completion and EOS, the latter two with labels. In a template a completion's
        special tokens stay text.
        """
        template = self.template if row.prompt else PromptTemplate()
        prompt = encode_prompt(self.tokenizer, template, row.prompt)
        special = None if template.text == RAW else special_text(self.tokenizer)
        if special is None or not special.found(row.completion):
            completion = list(self.tokenizer(row.completion, add_special_tokens=False)["input_ids"])
        else:
            text = special.renamed(special.masked(row.completion))
            completion = list(special.encode(text, add_special_tokens=False).ids)
        if self.tokenizer.eos_token_id is not None:
            completion.append(self.tokenizer.eos_token_id)
        return prompt + completion, [IGNORED] * len(prompt) + completion

    def _conversation(self, row: Conversation) -> tuple[list[int], list[int]]:
        """Only the assistant's turns have labels, end of turn included."""
        if not self.tokenizer.chat_template:
            raise DataError(
                "`data` holds conversations (messages), but the model's tokenizer has no chat template for them"
            )
        special = special_text(self.tokenizer)
        if special is None:
            raise DataError(
                "`data` holds conversations (messages), whose turns a tokenizer in Python cannot tell apart"
            )
        # The text of a special token within a turn must not open another turn.
        messages = [
            {"role": special.masked(role), "content": special.masked(content)}
            for role, content in row.messages
        ]

        def text_of(count: int, prompt: bool) -> str:
            if count == 0:  # templates may refuse an empty conversation
                return special.renamed("")
            text = render_chat(self.tokenizer, messages[:count], add_generation_prompt=prompt)
            return special.renamed(text)

        text = text_of(len(messages), False)
        answers = list[range]()  # the characters of each
        for at, (role, _) in enumerate(row.messages):
            if role == "assistant":
                before = text_of(at, True)
                through = text_of(at + 1, False)
                if not (text.startswith(through) and through.startswith(before)):
                    raise DataError(
                        "the tokenizer's chat template rewrites earlier turns: the assistant's cannot be told apart"
                    )
                answers.append(range(len(before), len(through)))
        encoding = special.encode(text, add_special_tokens=False)
        labels = []
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            is_target = any(start in answer for answer in answers)
            labels.append(token if is_target else IGNORED)
        return encoding.ids, labels


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Any error becomes a DataError that names the row."""
    try:
        yield
    except LayerSkipError as error:
        raise DataError(f"{row.where}: {error}" if row.where else str(error)) from None
    except Exception as error:  # a chat template is a program, and tokenizers raise many kinds
        raise DataError(f"{row.where or 'a row'} cannot be encoded: {first_line(error)}") from error


def has_target(row: EncodedRow) -> bool:
    return bool((row["labels"] != IGNORED).any())


def packed(documents: Iterable[list[int]], length: int) -> Iterator[EncodedRow]:
    """Documents joined and cut into rows of `length` tokens (the last may be shorter); each row
    numbers its `documents`.
    """
    tokens = (
        (number, token)
        for number, document in enumerate(filter(None, documents))
        for token in document
    )
    while row := list(islice(tokens, length)):
        ids = [token for _, token in row]
        encoded = encoded_row(ids, ids)
        numbers = np.array([number - row[0][0] for number, _ in row], np.int32)
        encoded["documents"] = numbers
        # Nothing predicts the first token of a document
        encoded["labels"][1:][numbers[1:] != numbers[:-1]] = IGNORED
        if len(ids) == length or has_target(encoded):
            yield encoded


def train_tokenizer(rows: Sequence[Row], vocab_size: int) -> Any:
    """A transformers tokenizer of at most `vocab_size` entries, including bytes and three special
    tokens.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        _texts(rows), vocab_size, min_frequency=0, show_progress=False, special_tokens=_SPECIAL
    )
    tokenizer = Tokenizer.from_str(trained.to_str())
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


def _texts(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        parts = (
            [f"{row.prompt}\n{row.completion}"]
            if isinstance(row, Example)
            else [text for _, text in row.messages]
        )
        for text in parts:
            # The trainer's time grows with the square of a word's length, so texts with very long
            # words are cut.
            size = _LONGEST_WORD if _ENDLESS.search(text) else len(text) or 1
            yield from (text[at : at + size] for at in range(0, len(text), size))
