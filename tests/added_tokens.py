"""Small tokenizers with added tokens, in the styles of model families: transformers' class over 256
bytes and a few merges.
"""

from dataclasses import replace

import torch
from conftest import tiny_model
from evaluating import tiny_loaded
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerskip_core.model import TransformersBackend
from layerskip_core.prompting import RAW, PromptTemplate

# By style: the added tokens of tool calls, and whether they are special, without a text in an
# answer.
ADDED = {
    "qwen": {"<tool_call>": False, "</tool_call>": False},
    "special tags": {"<tool_call>": True, "</tool_call>": True},
    "llama 3": {"<|python_tag|>": True, "<|eom_id|>": True},
    "mistral": {"[TOOL_CALLS]": True, "[ARGS]": True},
    "sentencepiece": {"[TOOL_CALLS]": True, "<unused7>": False},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def styled_tokenizer(style):
    """Ids: the pieces, then `</s>`, then the added tokens."""
    tokenizer = (
        _sentencepiece()
        if style == "sentencepiece"
        else _byte_level(ignore_merges=style == "llama 3")
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.add_tokens(
        [
            AddedToken(text, special=special, normalized=False)
            for text, special in ADDED[style].items()
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _byte_level(ignore_merges):
    merges = [
        ("o", "l"),
        ("t", "o"),
        ("to", "ol"),
        ("<", "t"),
        ("c", "a"),
        ('"', ":"),
        ("\u010a", "<"),
    ]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            merges,
            ignore_merges=ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece():
    """As Llama 2's and Mistral's: `\u2581` for a space, one before the text, and bytes for other
    characters.
    """
    merges = [("o", "l"), ("t", "o"), ("to", "ol")]
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *_LETTERS,
        *'\u2581{}[]":,0123456789_TOLCARGS',
    ]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def few_letters():
    """The tiny model with a tokenizer of five tokens: no text with another letter can be
    written.
    """
    words = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "</s>": 4}, []))
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    model = TransformersBackend(tiny_model("llama", torch.float64, vocab_size=5))
    return replace(
        tiny_loaded(),
        backend=model,
        tokenizer=tokenizer,
        eos_ids=frozenset({4}),
        template=PromptTemplate(RAW),
    )
