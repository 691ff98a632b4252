"""GGUF files for llama.cpp: a model with its tokenizer, and a drafter in the EAGLE-3 layout."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError, require_overwrite
from ..model.configuration import RopeSpec
from ..model.eagle3 import TOKENS, Eagle3Form, Eagle3Weights
from ..model.rope import llama3_factors
from ..model.spec import ModelSpec

TARGET = "target.gguf"
DRAFT = "draft.gguf"
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_EAGLE3 = "eagle3"
# Whose hidden states llama.cpp gives a drafter; it aborts for others
_TAPPED = ("llama", "mistral", "qwen3")
_OF_EAGLE3 = {  # llama.cpp's names of weights that other models lack
    "model.fc.weight": "fc.weight",
    "model.layers.0.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "rope_freqs": "rope_freqs.weight",
}
_GEMMA_PERIOD = 6  # llama.cpp gives every sixth layer of Gemma 3 full attention
_BLOCK = 32  # weights per scale in q8_0 and q4_0
_ROPES = ("default", "linear", "llama3")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name of a pre-tokenizer before byte-level BPE, by its steps
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (rf"{_CONTRACTIONS}\p{{N}}{_REST}", "bytes"): "qwen2",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def refuse_gguf(output: str, overwrite: bool, readme: str) -> None:
    """Raises ConfigError if `output` holds GGUF files of an export that may not be replaced, or
    another readme.
    """
    folder = Path(output)
    ours = [name for name in (TARGET, DRAFT) if os.path.lexists(folder / name)]
    require_overwrite(output, "".join(ours[:1]), overwrite)
    if not ours and os.path.lexists(folder / readme):
        raise ConfigError(
            f"`output` {output}: in the way is {readme}, which layerskip did not write; give another folder"
        )


def write_gguf(model: Any, tokenizer: Any, spec: ModelSpec, path: Path, kind: str) -> None:
    """Writes a model in fp32, matrices as `kind`: f16, q8_0, q4_0 (head: q8_0). CheckpointError if
    llama.cpp would differ.
    """
    name = _ARCHITECTURES.get(spec.model_type)
    if name is None:
        raise CheckpointError(
            f"for GGUF model_type must be one of {', '.join(_ARCHITECTURES)}, found {spec.model_type}"
        )
    _check(spec)
    full = _full_rope(spec)
    with _writing(path, name, spec, spec, full, tokenizer, kind) as (writer, add):
        from gguf import RopeScalingType

        writer.add_block_count(spec.layers)
        if full.type == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(full.parameters["factor"]))
        if spec.window is not None:
            writer.add_sliding_window(spec.window)
            writer.add_rope_freq_base_swa(
                float(spec.ropes[spec.rope_of[0] or 0].parameters["rope_theta"])
            )
        if spec.logits_cap is not None:
            writer.add_final_logit_softcapping(spec.logits_cap)
        for weight_name in spec.shapes:
            weight = model.get_parameter(weight_name).detach()
            if name == "llama":  # llama.cpp's rope pairs neighbouring dimensions, not halves
                weight = _interleaved(weight_name, weight, spec)
            elif spec.architecture.norm == "rms_plus_one" and weight_name.endswith("norm.weight"):
                weight = weight + 1  # llama.cpp does not add it
            add(weight_name, weight)


def write_eagle3(
    drafter: Eagle3Weights, tokenizer: Any, spec: ModelSpec, path: Path, kind: str
) -> None:
    """Writes a drafter in the EAGLE-3 layout for the model of `spec`, whose embedding it uses.
    Raises as `write_gguf`.
    """
    form = drafter.form
    if spec.model_type not in _TAPPED:
        needed = f"{', '.join(_TAPPED[:-1])} or {_TAPPED[-1]}"
        raise CheckpointError(
            f"llama.cpp runs a drafter of a {needed}, found one of a {spec.model_type}; name an `exit_layer`"
        )
    if len(form.layers) != 3:
        raise CheckpointError(
            f"for GGUF a drafter must read the states after 3 layers, found {list(form.layers)}"
        )
    if form.fc_norm or form.norm_before_fc or form.norm_output:
        raise CheckpointError(
            "for GGUF a drafter must be of EAGLE-3, without the norms of EAGLE-3.1"
        )
    with _writing(path, _EAGLE3, form, spec, RopeSpec(form.rope, None), tokenizer, kind) as (
        writer,
        add,
    ):
        writer.add_block_count(1)
        writer.add_array(f"{_EAGLE3}.target_layers", list(form.layers))
        writer.add_uint32(f"{_EAGLE3}.target_hidden_size", form.hidden)
        writer.add_bool(f"{_EAGLE3}.norm_before_residual", form.norm_before_residual)
        if form.vocab < spec.vocab:
            writer.add_tensor(TOKENS, drafter.tokens.long().numpy())
        for name, weight in drafter.weights.items():
            of_model = name if name.startswith("lm_head.") else f"model.{name}"
            add(of_model, _interleaved(name, weight, form))


@contextmanager
def _writing(
    path: Path,
    architecture: str,
    sizes: ModelSpec | Eagle3Form,
    spec: ModelSpec,
    rope: RopeSpec,
    tokenizer: Any,
    kind: str,
) -> Iterator[tuple[Any, Callable[[str, Tensor], None]]]:
    """A GGUFWriter with sizes and tokenizer, and a function that adds a weight by its name in a
    checkpoint.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "`format` gguf needs the library gguf: pip install 'layerskip[gguf]'", "format"
        ) from None
    known = getattr(gguf.MODEL_ARCH, _ARCHITECTURES.get(spec.model_type, "llama").upper())
    names = gguf.get_tensor_name_map(known, spec.layers)
    writer = gguf.GGUFWriter(path, architecture)

    def add(name: str, weight: Tensor) -> None:
        stored = _OF_EAGLE3.get(name) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        stored_kind = kind if stored.startswith("blk.") or kind != "q4_0" else "q8_0"
        if weight.dim() == 1:
            stored_kind = "f32"
        elif weight.shape[-1] % _BLOCK:
            stored_kind = "f16"
        form = gguf.GGMLQuantizationType[stored_kind.upper()]
        writer.add_tensor(
            stored, gguf.quants.quantize(weight.contiguous().float().numpy(), form), raw_dtype=form
        )

    values: dict[str, Any] = {
        "context_length": spec.context, "embedding_length": sizes.hidden, "feed_forward_length": sizes.inner,
        "head_count": sizes.heads, "head_count_kv": sizes.kv_heads, "key_length": sizes.head_dim,
        "value_length": sizes.head_dim, "layer_norm_rms_eps": sizes.eps, "rope_dimension_count": sizes.head_dim,
        "vocab_size": spec.vocab, "rope_freq_base": float(rope.parameters["rope_theta"]),
    }  # fmt: skip
    try:
        for name, value in values.items():
            getattr(writer, f"add_{name}")(value)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, spec.vocab)
        yield writer, add
        if rope.type == "llama3":  # divisors of the frequencies
            add("rope_freqs", llama3_factors(rope.parameters, sizes.head_dim))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(spec: ModelSpec) -> None:
    """Raises CheckpointError for values that llama.cpp takes from the architecture instead of the
    file.
    """
    windows = [spec.window_of(kind) is not None for kind in spec.kinds]
    expected = [False] * spec.layers
    activation = "silu"
    if spec.model_type == "gemma3_text":
        expected = [(layer + 1) % _GEMMA_PERIOD != 0 for layer in range(spec.layers)]
        activation = "gelu_pytorch_tanh"
    found = None
    if windows != expected:
        found = "sliding windows in other layers than llama.cpp gives it"
    elif spec.activation != activation:
        found = f"the activation {spec.activation}, where llama.cpp has {activation}"
    elif not math.isclose(spec.attention_scale, spec.head_dim**-0.5):
        found = "attention scores scaled otherwise than by its head size"
    elif _full_rope(spec).type not in _ROPES:
        found = f"a rope of type {_full_rope(spec).type}"
    if found is not None:
        raise CheckpointError(f"this {spec.model_type} cannot be a GGUF file: it has {found}")


def _full_rope(spec: ModelSpec) -> RopeSpec:
    """The rope of layers with full attention, else of the sliding layers."""
    for kind, rope in zip(spec.kinds, spec.rope_of, strict=True):
        if spec.window_of(kind) is None:
            return spec.ropes[rope or 0]
    return spec.ropes[spec.rope_of[0] or 0]


def _interleaved(name: str, weight: Tensor, sizes: ModelSpec | Eagle3Form) -> Tensor:
    """Interleaves the halves of each head in the weights of queries and keys; returns others
    unchanged.
    """
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.view(heads, 2, sizes.head_dim // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any, tokenizer: Any, vocab: int) -> None:
    """Adds a tokenizer of `vocab` tokens. Raises CheckpointError for one that llama.cpp would
    encode differently.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"for GGUF the tokenizer must be of the type BPE, found {model['type']}"
        )
    over_text = bool(model.get("byte_fallback"))
    split = _split(described)
    writer.add_tokenizer_model("llama" if over_text else "gpt2")
    writer.add_tokenizer_pre(split)
    _add_tokens(writer, tokenizer, described, vocab)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if over_text:  # scores instead of merges: earlier merges have higher ones
        scores = dict[str, float]()
        for place, (left, right) in enumerate(merges, start=1):
            scores.setdefault(left + right, -float(place))
        text_of = {token: text for text, token in tokenizer.get_vocab().items()}
        writer.add_token_scores([scores.get(text_of.get(token, ""), 0.0) for token in range(vocab)])
        before = json.dumps([described["normalizer"], described["pre_tokenizer"]])
        prefixes = ('"Prepend"', '"prepend_scheme": "first"', '"prepend_scheme": "always"')
        writer.add_add_space_prefix(any(prefix in before for prefix in prefixes))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for special in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{special}_token_id")) is not None:
            getattr(writer, f"add_{special}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id == ids[0])
    writer.add_add_eos_token(tokenizer.eos_token_id == ids[-1])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(described: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises CheckpointError for one that llama.cpp
    lacks.
    """
    normalizer = described["normalizer"]
    before = described["pre_tokenizer"]
    if described["model"].get("byte_fallback"):
        if json.dumps(_SPACE) in json.dumps([normalizer, before]):
            return "default"
        raise CheckpointError(
            f"for GGUF a tokenizer with byte tokens must write spaces as {_SPACE}; its normalizer: {json.dumps(normalizer)}"
        )
    split = SPLITS.get(tuple(map(_step, (before or {}).get("pretokenizers", [before]))))
    kind = (normalizer or {}).get("type")
    if split is None or kind not in (None, "NFC"):
        raise CheckpointError(
            f"for GGUF the tokenizer must split text as one of {', '.join(SPLITS.values())} does; its pre-tokenizer is "
            f"{json.dumps(before)[:200]}, its normalizer {kind}"
        )
    return split


def _step(step: dict[str, Any] | None) -> str:
    """A pre-tokenizer step: a split pattern, the name of a known step, else its JSON."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel" if regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }:
            return str(pattern)
    return json.dumps(step)


def _add_tokens(writer: Any, tokenizer: Any, described: dict[str, Any], vocab: int) -> None:
    from gguf import TokenType

    special = {token["id"]: token["special"] for token in described["added_tokens"]}
    over_text = bool(described["model"].get("byte_fallback"))
    texts = [f"[PAD{token}]" for token in range(vocab)]
    types = [TokenType.UNUSED] * vocab
    for text, token in tokenizer.get_vocab().items():
        if token >= vocab:
            continue
        texts[token] = text
        types[token] = TokenType.NORMAL
        if token in special:
            types[token] = TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        elif over_text and _BYTE.fullmatch(text):
            types[token] = TokenType.BYTE
        elif over_text and token == tokenizer.unk_token_id:
            types[token] = TokenType.UNKNOWN
    writer.add_token_list(texts)
    writer.add_token_types(types)
