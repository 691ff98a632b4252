"""A tokenizer as the metadata of a GGUF file: byte-level BPE ("gpt2" there), or BPE over text with byte tokens ("llama")."""

import json
import re
from typing import Any

from ..errors import CheckpointError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name of what comes before byte-level BPE, by our `_steps`
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (rf"{_CONTRACTIONS}\p{{N}}{_REST}", "bytes"): "qwen2",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def add_tokenizer(writer: Any, tokenizer: Any, vocab: int) -> None:
    """Adds a transformers tokenizer to a GGUFWriter, with `vocab` tokens: those of the model's embedding.

    Raises CheckpointError for a tokenizer that llama.cpp would not encode alike.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"for GGUF the tokenizer must be of the type BPE, found {model['type']}")
    if model.get("byte_fallback"):
        _add_text_bpe(writer, described)
    else:
        _add_byte_level(writer, described)
    _add_tokens(writer, tokenizer, described, vocab)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add, token in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, eos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(eos is not None and ids[-1] == eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_byte_level(writer: Any, described: dict[str, Any]) -> None:
    split = SPLITS.get(_steps(described["pre_tokenizer"]))
    normalizer = (described["normalizer"] or {}).get("type")
    if split is None or normalizer not in (None, "NFC"):
        raise CheckpointError(
            f"for GGUF the tokenizer must split text as one of {', '.join(SPLITS.values())} does; its pre-tokenizer is "
            f"{json.dumps(described['pre_tokenizer'])[:200]}, its normalizer {normalizer}"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_merges([" ".join(pair) for pair in _merges(described)])


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer: a pattern for one that splits by it, a name for one that is known, else its JSON."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return tuple(map(_step, steps))


def _step(step: dict[str, Any] | None) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel" if regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return json.dumps(step)


def _add_text_bpe(writer: Any, described: dict[str, Any]) -> None:
    normalizer, pre_tokenizer = json.dumps(described["normalizer"]), json.dumps(described["pre_tokenizer"])
    marks_spaces = json.dumps(_SPACE) in normalizer + pre_tokenizer
    if not marks_spaces:
        raise CheckpointError(
            f"for GGUF a tokenizer with byte tokens must write spaces as {_SPACE}; its normalizer: {normalizer}"
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    prefixed = '"Prepend"' in normalizer or '"prepend_scheme": "first"' in pre_tokenizer
    writer.add_add_space_prefix(prefixed or '"prepend_scheme": "always"' in pre_tokenizer)


def _add_tokens(writer: Any, tokenizer: Any, described: dict[str, Any], vocab: int) -> None:
    """Tokens by id, their types, and for BPE over text their scores: what is merged earlier has a higher one."""
    from gguf import TokenType

    added = {token["id"]: token for token in described["added_tokens"]}
    text_of = {token: text for text, token in tokenizer.get_vocab().items()}
    rank: dict[str, int] = {}
    over_text = bool(described["model"].get("byte_fallback"))
    for place, (left, right) in enumerate(_merges(described) if over_text else ()):
        rank.setdefault(left + right, place + 1)
    texts, types, scores = [], [], []
    for token in range(vocab):
        text = text_of.get(token)
        if text is None:
            kind = TokenType.UNUSED
        elif token in added:
            kind = TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        elif over_text and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.UNKNOWN if over_text and token == tokenizer.unk_token_id else TokenType.NORMAL
        texts.append(f"[PAD{token}]" if text is None else text)
        types.append(kind)
        scores.append(-float(rank.get(text or "", 0)))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if over_text:
        writer.add_token_scores(scores)


def _merges(described: dict[str, Any]) -> list[list[str]]:
    """Pairs of texts, in their order."""
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in described["model"]["merges"]]
