"""A small tokenizer like Gemma's."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["remind me to call mom at 5", "It's 12,345:\n\n  Näive 東京 🎉", "  two  spaces "]


def text_bpe():
    """As those of Gemma: spaces are written as a character, and bytes are the tokens of what is not
    in the vocabulary.
    """
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<s>", "</s>", "<unk>", *data]
    tokenizer.train_from_iterator(
        [*TEXTS[:1], TEXTS[2]] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    )
    document = json.loads(tokenizer.to_str())
    # The bytes are tokens of the vocabulary alone
    document["added_tokens"] = document["added_tokens"][:4]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
