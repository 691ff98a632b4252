"""Types and ranges of the values of config.json that this package reads. They are checked before anything is built."""

from collections.abc import Callable, Mapping
from functools import partial
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


def _each(needed: Needed, most: int) -> Needed:
    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) <= most and all(map(needed.holds, value))

    return Needed(f"a list of at most {most} entries, each {needed.words}", holds)


def _one_of(*choices: str) -> Needed:
    return Needed(f"one of {', '.join(choices)}", lambda value: str(value).removeprefix("torch.") in choices)


def _table(required: Mapping[Needed, str], optional: Mapping[Needed, str]) -> dict[str, Needed]:
    """Requirements by name; an `optional` value may be null."""
    table = {name: needed for needed, names in required.items() for name in names.split()}
    for needed, names in optional.items():
        or_null = Needed(f"{needed.words}, or null", partial(_is_none_or, needed.holds))
        table |= dict.fromkeys(names.split(), or_null)
    return table


def _is_none_or(holds: Callable[[Any], bool], value: Any) -> bool:
    return value is None or holds(value)


_TRUTH = Needed("true or false", lambda value: isinstance(value, bool))
_POSITIVE, _SHARE, _EPS, _THETA = _number(1e-6, 1e6), _number(1e-3, 1), _number(1e-30, 1), _number(1, 1e15)
_WIDTH, _POSITIONS, _WINDOW = whole(1, MOST_WIDTH), whole(1, MOST_POSITIONS), whole(1, 1 << 31)
_HEAD = Needed(
    f"an even number in 2..{LARGEST_HEAD}",  # rotary positions rotate pairs
    lambda value: _is_whole(value) and 2 <= value <= LARGEST_HEAD and value % 2 == 0,
)
_NAME = Needed("a text", lambda value: isinstance(value, str))
_OBJECT = Needed("an object", lambda value: isinstance(value, Mapping))
_EOS = Needed(
    "a token id, a list of them, or null",
    lambda value: all(_is_whole(token) and 0 <= token < MOST_TOKENS for token in tokens_of(value)),
)

# Names in config.json. A missing value has the default of its architecture.
_VALUES = _table(
    required={
        whole(1, MOST_LAYERS): "num_hidden_layers",
        whole(1, MOST_TOKENS): "vocab_size",
        _WIDTH: "hidden_size intermediate_size num_attention_heads",
        _POSITIONS: "max_position_embeddings",
        _EPS: "rms_norm_eps norm_epsilon",
        _TRUTH: "tie_word_embeddings",
        _POSITIVE: "query_pre_attn_scalar embedding_multiplier logits_scaling residual_multiplier attention_multiplier",
        _EOS: "eos_token_id",
        Needed("false, because generation is causal", lambda value: not value): "use_bidirectional_attention",
    },
    optional={
        _WIDTH: "num_key_value_heads",
        _HEAD: "head_dim",
        _POSITIONS: "original_max_position_embeddings",
        _THETA: "rope_theta rope_local_base_freq",
        _OBJECT: "rope_parameters rope_scaling",
        _SHARE: "partial_rotary_factor",  # of a head that rotates
        _WINDOW: "sliding_window sliding_window_pattern no_rope_layer_interval",
        whole(0, 1 << 31): "max_window_layers",
        _TRUTH: "use_sliding_window attention_bias mlp_bias use_bias",
        _each(_one_of(*LAYER_KINDS), MOST_LAYERS): "layer_types",
        _each(whole(0, 1), MOST_LAYERS): "no_rope_layers",
        _number(0, 1): "embedding_dropout",
        _NAME: "hidden_act hidden_activation",
        _POSITIVE: "attn_logit_softcapping final_logit_softcapping",
        _one_of("auto", *FLOATS): "dtype torch_dtype",
        whole(-1, MOST_TOKENS): "bos_token_id pad_token_id",
    },
)
_ROPE_VALUES = _table(
    required={_NAME: "rope_type type", _THETA: "rope_theta", _POSITIVE: "low_freq_factor high_freq_factor"},
    optional={
        _POSITIVE: "factor attention_factor beta_fast beta_slow mscale mscale_all_dim",
        _SHARE: "partial_rotary_factor",
        _POSITIONS: "original_max_position_embeddings",
        _each(_POSITIVE, LARGEST_HEAD): "short_factor long_factor",
    },
)
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
