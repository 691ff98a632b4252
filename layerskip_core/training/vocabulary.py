"""A byte-level BPE tokenizer trained on the data: for models trained from scratch."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..data import Conversation, Row

_SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]


def train_tokenizer(rows: Sequence[Row], vocab_size: int) -> Any:
    """A transformers tokenizer of `vocab_size` entries, bytes and three special tokens included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for row in rows:
            if isinstance(row, Conversation):
                yield from (content for _, content in row.messages)
            else:
                yield f"{row.prompt}\n{row.completion}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
