"""The folder of a drafter in the EAGLE-3 layout, as vLLM, SGLang and llama.cpp read it: `eagle3` beside a model's weights.

config.json has what the library `speculators` writes (vLLM reads `speculators_config` and `transformer_layer_config`), and the
same values at its top, where SGLang and EAGLE's own checkpoints have them. The weights have the names of EAGLE's checkpoints
(`midlayer.*`), which all three know; `layers.0.*`, of `speculators`, is read too. `d2t` has, for each output of the head, the
target's token less the number of the output.

vLLM reads `eagle_aux_hidden_state_layer_ids` at the top: after how many layers states are taken. SGLang, and SpecForge, which
trains for it, read that in `eagle_config`, where a list that begins with 1 has the layers by index: [1, 14, 26] is after 2, 15
and 27.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from ..errors import CheckpointError, first_line, require
from ..files import read_json
from ..model.eagle3 import ROPES, TOKENS, Eagle3Form, Eagle3Weights
from ..model.spec import AnySpec, ModelSpec
from .folder import WeightFile

EAGLE3_FOLDER = "eagle3"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
EAGLE3_FILES = f"{EAGLE3_FOLDER}/{CONFIG}", f"{EAGLE3_FOLDER}/{WEIGHTS}"
PROPOSED = 4  # drafts of a round, unless whoever serves it says another number
_UNUSED = ("t2d", "embed_tokens.weight")  # which tokens are drafted, as `d2t` says; the target's own embedding
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
_Ids = Annotated[list[Annotated[int, Meta(ge=1, le=1024)]], Meta(min_length=1, max_length=16)]


class _Rope(msgspec.Struct):
    rope_theta: Annotated[float, Meta(ge=1, le=1e15)] = 10_000.0
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Layer(msgspec.Struct):
    """The values of `transformer_layer_config`, or of the top of config.json, that are read here."""

    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    attention_bias: bool = False
    rms_norm_eps: Annotated[float, Meta(ge=1e-30, le=1)] = 1e-6
    rope_parameters: _Rope | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None


class _Eagle(msgspec.Struct):
    eagle_aux_hidden_state_layer_ids: _Ids = msgspec.field(default_factory=list)


class _Values(msgspec.Struct):
    draft_vocab_size: _Size
    eagle_aux_hidden_state_layer_ids: _Ids | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    target_hidden_size: int | None = None
    eagle_config: _Eagle | None = None
    transformer_layer_config: _Layer | None = None


def default_layers(num_layers: int) -> tuple[int, ...]:
    """2, L/2 and L-3, or the nearest different ones: after which layers engines take states unless config.json says so."""
    layers = sorted({min(max(layer, 1), num_layers - 1) for layer in (2, num_layers // 2, num_layers - 3)})
    return tuple(layers)


def eagle3_content(stored: Eagle3Weights, spec: AnySpec, verifier: str) -> dict[str, bytes]:
    """The files of a drafter's folder by their names beside the model's own.

    `spec`: of the target. `verifier`: its folder or hub id, by which engines find it.
    """
    from safetensors.torch import save

    form, architectures = stored.form, ["LlamaForCausalLMEagle3"]
    layer: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": form.hidden,
        "intermediate_size": form.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": form.heads,
        "num_key_value_heads": form.kv_heads,
        "head_dim": form.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": form.eps,
        "rope_parameters": dict(form.rope),
        "rope_theta": form.rope["rope_theta"],
        "max_position_embeddings": spec.context,
        "vocab_size": spec.vocab,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    method = {"proposal_type": "greedy", "speculative_tokens": PROPOSED, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    document = {
        **layer,
        "architectures": architectures,
        "draft_vocab_size": form.vocab,
        "norm_before_residual": form.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": list(form.layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - (form.layers[0] == 2) for layer in form.layers],
            "use_aux_hidden_state": True,
        },
        "dtype": str(next(iter(stored.weights.values())).dtype).removeprefix("torch."),
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier, "architectures": getattr(spec.config, "architectures", None)},
        },
        "transformer_layer_config": layer,
    }
    weights = {name.replace("layers.0.", "midlayer."): weight.contiguous() for name, weight in stored.weights.items()}
    if form.vocab < spec.vocab:  # else vLLM knows no such tensor
        weights[TOKENS] = stored.tokens.long() - torch.arange(form.vocab)
    text = json.dumps(document, indent=2) + "\n"
    return dict(zip(EAGLE3_FILES, (text.encode(), save(weights, {"format": "pt"})), strict=True))


def eagle3_beside(folder: str | Path, spec: AnySpec) -> Eagle3Weights | None:
    """The drafter of a model's folder, if it has one: its config.json is written last. Raises as `read_eagle3` does."""
    drafter = Path(folder) / EAGLE3_FOLDER
    return read_eagle3(drafter, spec) if (drafter / CONFIG).is_file() else None


def read_eagle3(folder: str | Path, spec: AnySpec) -> Eagle3Weights:
    """The drafter in a folder of its own, for a model.

    Raises CheckpointError, naming the first value that it cannot have or weight that it lacks.
    """
    path = Path(folder)
    try:
        values = msgspec.convert(document := read_json(path / CONFIG, CheckpointError), _Values)
        own = values.transformer_layer_config or msgspec.convert(document, _Layer)
        file = WeightFile(path / WEIGHTS)
        form = _form(values, own, spec)
        names = {name.replace("midlayer.", "layers.0."): name for name in file.entries if name not in _UNUSED}
        _check(file, names, form)
        weights = {name: file.read(names[name]) for name in form.shapes}
        tokens = file.read(TOKENS).long() + torch.arange(form.vocab) if TOKENS in file.entries else torch.arange(form.vocab)
        require(bool(((tokens >= 0) & (tokens < spec.vocab)).all()), TOKENS, f"tokens below {spec.vocab}", "others")
        require(len(set(tokens.tolist())) == len(tokens), TOKENS, "different tokens", "some of them twice")
    except Exception as error:
        raise CheckpointError(f"the drafter {folder} cannot be used: {first_line(error)}") from error
    return Eagle3Weights(form, tokens, weights)


def _form(values: _Values, own: _Layer, spec: AnySpec) -> Eagle3Form:
    """Raises ConfigError for a value that is not supported."""
    named = values.eagle_config.eagle_aux_hidden_state_layer_ids if values.eagle_config else []
    by_index = bool(named) and named[0] == 1
    layers = values.eagle_aux_hidden_state_layer_ids or [layer + by_index for layer in named] or default_layers(spec.layers)
    require(max(layers) < spec.layers, "eagle_aux_hidden_state_layer_ids", f"layers below {spec.layers}", layers)
    require(own.hidden_size == spec.hidden, "hidden_size", f"{spec.hidden}, as the model's", own.hidden_size)
    require(values.target_hidden_size in (None, spec.hidden), "target_hidden_size", "hidden_size", values.target_hidden_size)
    require(own.num_hidden_layers == 1, "num_hidden_layers", "1", own.num_hidden_layers)
    require(own.hidden_act == "silu", "hidden_act", "silu", own.hidden_act)
    heads, size = own.num_key_value_heads or own.num_attention_heads, own.head_dim or own.hidden_size // own.num_attention_heads
    needed = f"a multiple of num_key_value_heads, {heads}"
    require(own.num_attention_heads % heads == 0, "num_attention_heads", needed, own.num_attention_heads)
    if isinstance(spec, ModelSpec):  # whose cache has entries of one shape
        needed = f"{spec.kv_heads} and {spec.head_dim}, as the model's"
        fits = (heads, size) == (spec.kv_heads, spec.head_dim)
        require(fits, "num_key_value_heads and head_dim", needed, f"{heads} and {size}")
    for name in ("norm_before_fc", "fc_norm", "norm_output"):
        require(not getattr(values, name), name, "false", "true")
    require(not own.attention_bias, "attention_bias", "false", "true")
    theta = {} if own.rope_theta is None else {"rope_theta": own.rope_theta}
    rope = own.rope_parameters or msgspec.convert(theta | (own.rope_scaling or {}), _Rope)
    require(rope.rope_type in ROPES, "rope_type", " or ".join(ROPES), rope.rope_type)
    before = values.norm_before_residual
    if before is None:  # `speculators` has another default than EAGLE's own checkpoints
        before = values.transformer_layer_config is not None
    return Eagle3Form(
        tuple(sorted(layers)),
        own.hidden_size,
        own.num_attention_heads,
        heads,
        size,
        own.intermediate_size,
        values.draft_vocab_size,
        own.rms_norm_eps,
        {name: value for name, value in msgspec.structs.asdict(rope).items() if value is not None},
        before,
    )


def _check(file: WeightFile, names: Mapping[str, str], form: Eagle3Form) -> None:
    """Raises ValueError for a weight that is missing or unknown, or of another shape or type."""
    shapes: dict[str, tuple[int, ...]] = {**form.shapes, **({TOKENS: (form.vocab,)} if TOKENS in names else {})}
    for name in sorted({*shapes, *names}):
        kind, shape = file.entries.get(names.get(name, ""), ("nothing", ()))
        kinds = ("I64", "I32") if name == TOKENS else ("F32", "BF16", "F16")
        if kind not in kinds or shape != shapes.get(name):
            needed = f"{' or '.join(kinds)} {list(shapes[name])}" if name in shapes else "left out"
            raise ValueError(f"{name} must be {needed}, found {kind} {list(shape)}")
