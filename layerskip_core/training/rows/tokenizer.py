"""A tokenizer trained on the data, and the order of its tokens by frequency."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ...data.examples import Conversation, Row
from .encoded_data import EncodedData

_COUNTED = 50_000  # rows, evenly spaced; of a stream the first ones
_COUNTED_TOKENS = 1_000_000  # of a stream, whose rows are encoded only to be counted
_LONGEST_WORD = 1000  # characters
_ENDLESS = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")
_SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]


def train_tokenizer(rows: Sequence[Row], vocab_size: int) -> Any:
    """A transformers tokenizer of `vocab_size` entries, including bytes and three special tokens; of fewer entries if the rows
    have too few pairs of characters to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # The trainer allocates memory for all entries at once; each merge needs at least one character of text.
    most = len(_SPECIAL) + 256 + sum(len(text.encode()) for text in _texts(rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, most),
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(rows), trainer)
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def _texts(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        parts = [text for _, text in row.messages] if isinstance(row, Conversation) else [f"{row.prompt}\n{row.completion}"]
        for text in parts:
            # The trainer's time grows with the square of a word's length, so texts with very long words are cut.
            size = _LONGEST_WORD if _ENDLESS.search(text) else len(text) or 1
            yield from (text[at : at + size] for at in range(0, len(text), size))


def token_order(data: EncodedData, vocab_size: int) -> list[int]:
    """All token ids 0..V-1, the most frequent targets of the training rows first; unseen ids follow in ascending order."""
    rows, most = data.rows, float("inf")
    if data.streamed:
        rows, most = rows.one_pass(0), _COUNTED_TOKENS
    else:
        rows = rows.select_columns("labels").select(range(0, len(rows), -(-len(rows) // _COUNTED)))
    counts: Counter[int] = Counter()
    seen = 0
    for row in itertools.islice(rows, _COUNTED):
        counts.update(row["labels"])  # includes IGNORED, which is not a token
        seen += len(row["labels"])
        if seen >= most:
            break
    return sorted(range(vocab_size), key=lambda token: -counts[token])


def token_order_json(order: list[int]) -> bytes:
    """The content of ORDER_FILE beside a model, a JSON list: `draft_vocab` N drafts among its first N tokens."""
    return json.dumps(order, separators=(",", ":")).encode()
