"""Types and ranges of the values of config.json that this package reads. They are checked before anything is built."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import CheckpointError

MOST_LAYERS = 1024
MOST_WIDTH = 1 << 20  # of hidden states, all heads together and the MLP: the kernels count in 32 bits
MOST_TOKENS = 1 << 24  # of a vocabulary
MOST_POSITIONS = 1 << 27  # of a context
LARGEST_HEAD = 1024
LAYER_KINDS = ("full_attention", "sliding_attention")
FLOATS = ("float64", "float32", "float16", "bfloat16")  # precisions of stored weights


class Needed(NamedTuple):
    """A requirement on a value, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < MOST_TOKENS


def tokens_of(value: Any) -> list[Any]:
    """A list of token ids, for a value that may be a single id, a list or None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def whole(least: int, most: int) -> Needed:
    return Needed(f"a whole number in {least}..{most}", lambda value: _is_whole(value) and least <= value <= most)


def _number(least: float, most: float) -> Needed:
    """Comparisons exclude NaN; the limits keep what is computed from the value finite in fp32."""
    return Needed(
        f"a number in {least:g}..{most:g}",
        lambda value: (_is_whole(value) or isinstance(value, float)) and least <= value <= most,
    )


def _or_none(needed: Needed) -> Needed:
    return Needed(f"{needed.words}, or null", lambda value: value is None or needed.holds(value))


def _each(needed: Needed, most: int) -> Needed:
    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) <= most and all(map(needed.holds, value))

    return Needed(f"a list of at most {most} entries, each {needed.words}", holds)


def _one_of(choices: tuple[str, ...]) -> Needed:
    return Needed(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


_TRUTH = Needed("true or false", lambda value: isinstance(value, bool))
_POSITIVE = _number(1e-6, 1e6)
_SHARE = _number(1e-3, 1)  # part of a head that rotates
_THETA = _number(1, 1e15)
_HEAD = Needed(
    f"an even number in 2..{LARGEST_HEAD}",  # rotary positions rotate pairs
    lambda value: _is_whole(value) and 2 <= value <= LARGEST_HEAD and value % 2 == 0,
)
_NAME = Needed("a text", lambda value: isinstance(value, str))
_OBJECT = Needed("an object", lambda value: isinstance(value, Mapping))
_PRECISION = Needed(f"one of auto, {', '.join(FLOATS)}", lambda value: str(value).removeprefix("torch.") in ("auto", *FLOATS))
_EOS = Needed("a token id, a list of them, or null", lambda value: all(map(_is_id, tokens_of(value))))

# By name. A missing value has the default of its architecture.
_VALUES: dict[str, Needed] = {
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "hidden_size": whole(1, MOST_WIDTH),
    "intermediate_size": whole(1, MOST_WIDTH),
    "num_attention_heads": whole(1, MOST_WIDTH),
    "num_key_value_heads": _or_none(whole(1, MOST_WIDTH)),
    "head_dim": _or_none(_HEAD),
    "vocab_size": whole(1, MOST_TOKENS),
    "max_position_embeddings": whole(1, MOST_POSITIONS),
    "original_max_position_embeddings": _or_none(whole(1, MOST_POSITIONS)),
    "rms_norm_eps": _number(1e-30, 1),
    "norm_epsilon": _number(1e-30, 1),
    "rope_theta": _or_none(_THETA),
    "rope_parameters": _or_none(_OBJECT),
    "rope_scaling": _or_none(_OBJECT),
    "rope_local_base_freq": _or_none(_THETA),
    "partial_rotary_factor": _or_none(_SHARE),
    "sliding_window": _or_none(whole(1, 1 << 31)),
    "use_sliding_window": _or_none(_TRUTH),
    "max_window_layers": _or_none(whole(0, 1 << 31)),
    "sliding_window_pattern": _or_none(whole(1, 1 << 31)),
    "layer_types": _or_none(_each(_one_of(LAYER_KINDS), MOST_LAYERS)),
    "no_rope_layers": _or_none(_each(whole(0, 1), MOST_LAYERS)),
    "no_rope_layer_interval": _or_none(whole(1, 1 << 31)),
    "tie_word_embeddings": _TRUTH,
    "attention_bias": _or_none(_TRUTH),
    "mlp_bias": _or_none(_TRUTH),
    "use_bias": _or_none(_TRUTH),
    "embedding_dropout": _or_none(_number(0, 1)),
    "use_bidirectional_attention": Needed("false, because generation is causal", lambda value: not value),
    "hidden_act": _or_none(_NAME),
    "hidden_activation": _or_none(_NAME),
    "query_pre_attn_scalar": _POSITIVE,
    "attn_logit_softcapping": _or_none(_POSITIVE),
    "final_logit_softcapping": _or_none(_POSITIVE),
    "embedding_multiplier": _POSITIVE,
    "logits_scaling": _POSITIVE,
    "residual_multiplier": _POSITIVE,
    "attention_multiplier": _POSITIVE,
    "dtype": _or_none(_PRECISION),
    "torch_dtype": _or_none(_PRECISION),
    "eos_token_id": _EOS,
    "bos_token_id": _or_none(whole(-1, MOST_TOKENS)),
    "pad_token_id": _or_none(whole(-1, MOST_TOKENS)),
}

_ROPE_VALUES: dict[str, Needed] = {
    "rope_type": _NAME,
    "type": _NAME,
    "rope_theta": _THETA,
    "factor": _or_none(_POSITIVE),
    "partial_rotary_factor": _or_none(_SHARE),
    "original_max_position_embeddings": _or_none(whole(1, MOST_POSITIONS)),
    "attention_factor": _or_none(_POSITIVE),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "beta_fast": _or_none(_POSITIVE),
    "beta_slow": _or_none(_POSITIVE),
    "mscale": _or_none(_POSITIVE),
    "mscale_all_dim": _or_none(_POSITIVE),
    "short_factor": _or_none(_each(_POSITIVE, LARGEST_HEAD)),
    "long_factor": _or_none(_each(_POSITIVE, LARGEST_HEAD)),
}
_ROPE_NEEDS = {  # by type: values required besides the base
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_values(values: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a value of the wrong type or out of range.

    Missing values are accepted, because transformers completes the config.json of older models.
    """
    _check(values, _VALUES, "")
    for name in ("rope_parameters", "rope_scaling"):
        for kind, parameters in _ropes(values.get(name) or {}):
            _check_rope(parameters, f"{name}.{kind}." if kind else f"{name}.")


def check_named(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """As `check_values`, for a format with other names: `names` maps them to those of config.json."""
    _check(values, {name: _VALUES[known] for name, known in names.items()}, "")


def check_token_ids(values: Mapping[str, Any], vocab_size: int | None) -> None:
    """Raises CheckpointError for a special token that is not a token id, or not in the vocabulary if its size is given."""
    _check(values, {name: _VALUES[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id")}, "")
    for name in ("eos_token_id", "pad_token_id"):
        for token in tokens_of(values.get(name)):
            if vocab_size is not None and token >= vocab_size:
                raise CheckpointError(f"{name} must be below vocab_size, got {token} (vocab_size is {vocab_size})")


def _check(values: Mapping[str, Any], table: Mapping[str, Needed], where: str) -> None:
    for name, needed in table.items():
        if name in values and not needed.holds(values[name]):
            raise CheckpointError(f"{where}{name} must be {needed.words}, got {shortened(values[name])}")


def _check_rope(parameters: Mapping[str, Any], where: str) -> None:
    _check(parameters, _ROPE_VALUES, where)
    for name in _ROPE_NEEDS.get(parameters.get("rope_type", parameters.get("type")), ()):
        if parameters.get(name) is None:
            raise CheckpointError(f"{where}{name} is missing, which this rope type needs")
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise CheckpointError(f"{where}high_freq_factor must be above low_freq_factor, {low}, got {high}")


def rope_types(values: Mapping[str, Any]) -> set[Any]:
    """All rope types of a checked configuration."""
    named = [rope for name in ("rope_parameters", "rope_scaling") for _, rope in _ropes(values.get(name) or {})]
    return {rope.get("rope_type", rope.get("type")) for rope in named}


def _ropes(parameters: Mapping[str, Any]) -> list[tuple[str | None, Mapping[str, Any]]]:
    """Rope parameters by kind of layer (as in Gemma 3), or a single set for all layers."""
    by_kind = [(kind, parameters[kind]) for kind in LAYER_KINDS if kind in parameters]
    for kind, of_kind in by_kind:
        if not isinstance(of_kind, Mapping):
            raise CheckpointError(f"rope_parameters.{kind} must be an object, got {shortened(of_kind)}")
    return [*by_kind] if by_kind else [(None, parameters)]


def shortened(value: Any) -> str:
    """A value as errors show it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
