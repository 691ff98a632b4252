"""Random architectures and shapes on every backend, compared with the forward pass of transformers."""

import math
from collections.abc import Iterator
from random import Random
from typing import Any

from .campaign import Case
from .outcome import Miss
from .probe import COUNTED, probe

CASES, SHORT = 700, range(0, 40, 3)
_TYPES = (
    *("llama", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite"),
    *("phi3", "starcoder2"),
)


def attack(case: Case) -> Iterator[Miss]:
    """One model: valid in two of three cases, otherwise with one part that does not fit."""
    shape = _shape(case.random)
    unsound = case.random.choice(_UNSOUND) if case.random.random() < 0.33 else None
    case.say(f"{shape}, {unsound or 'sound'}")
    seed, threads = case.random.randrange(2**31), case.random.choice((1, 1, 1, 1, 1, 1, 1, 2))
    yield from probe(case, lambda: _sound(shape, seed) if unsound is None else _unsound(shape, unsound, seed), threads)


def _shape(random: Random) -> dict[str, Any]:
    kind = random.choice(_TYPES)
    heads = random.choice((1, 2, 3, 4, 6, 8))
    layers = random.randint(1, 5)
    shape: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": random.choice((5, 31, 67, 256, 300, 513)),
        "hidden_size": heads * random.choice((1, 2, 4, 5, 8, 16, 20)),
        "intermediate_size": random.choice((1, 7, 16, 32, 48, 64, 96, 100)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": random.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        "head_dim": random.choice((2, 4, 8, 16, 20, 32, 64)),
        "max_position_embeddings": random.choice((16, 64, 128, 2048)),
        "rms_norm_eps": random.choice((1e-6, 1e-5, 1e-2)),
        "tie_word_embeddings": random.random() < 0.5,
        "pad_token_id": None,
    }
    if kind in ("mistral", "gemma2", "gemma3_text", "olmo3", "phi3", "starcoder2"):
        shape["sliding_window"] = random.choice((1, 2, 5, 16, 4096))
    if kind in ("gemma2", "gemma3_text", "olmo3") and random.random() < 0.5:
        shape["layer_types"] = [random.choice(("sliding_attention", "full_attention")) for _ in range(layers)]
    if kind == "qwen2":
        shape |= {
            "use_sliding_window": random.random() < 0.5,
            "sliding_window": 4,
            "max_window_layers": random.randint(0, layers),
        }
    if kind == "smollm3":
        shape["no_rope_layers"] = [random.randint(0, 1) for _ in range(layers)]
    if kind in ("llama", "qwen3", "granite", "olmo2", "olmo3", "smollm3"):
        shape |= {"attention_bias": random.random() < 0.3}
    if kind == "starcoder2":
        shape |= {"use_bias": random.random() < 0.7, "norm_epsilon": shape.pop("rms_norm_eps")}
    if kind == "granite":
        shape |= {
            "embedding_multiplier": random.choice((0.5, 1.0, 12.0)),
            "residual_multiplier": random.choice((0.22, 1.0)),
            "attention_multiplier": random.choice((0.05, 0.22)),
            "logits_scaling": random.choice((0.5, 1.0, 8.0)),
        }
    if kind in ("llama", "granite", "smollm3"):
        shape |= {"mlp_bias": random.random() < 0.3}
    if random.random() < 0.3 and kind not in ("gemma3_text", "olmo3", "phi3"):
        shape["rope_parameters"] = random.choice(_ROPES)
        if shape["rope_parameters"]["rope_type"] == "dynamic":
            shape["head_dim"] = max(4, shape["head_dim"])  # transformers divides by head_dim - 2; ModelSpec refuses 2
    return shape


_ROPES = (
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    },
)  # fmt: skip


def _model(shape: dict[str, Any], seed: int, dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    changes = {key: value for key, value in shape.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[shape["model_type"]](**changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases: their initial values would hide faults
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


def _sound(shape: dict[str, Any], seed: int) -> Iterator[Miss | str]:
    """Every backend in every precision that it supports."""
    import torch

    from layerskip_core.config.packing import PackingConfig
    from layerskip_core.model import GenericBackend, NativeBackend, PackedBackend, can_pack, can_run_native

    random, cpu = Random(seed), torch.device("cpu")
    batch, count = random.randint(1, 3), random.randint(1, min(24, shape["max_position_embeddings"]))
    ids = torch.randint(0, shape["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-3)):
        model = _model(shape, seed, dtype)
        with torch.inference_mode():
            reference = model(ids).logits.double()
        yield from _compare("generic", GenericBackend(model), ids, reference, tolerance, random, exact=False)
        config = model.config
        if can_pack(config):
            yield from _compare("packed", PackedBackend.of(model), ids, reference, tolerance, random, exact=False)
        if can_run_native(config, dtype, cpu, None):
            native = NativeBackend.of(_model(shape, seed, dtype))
            yield from _compare("native", native, ids, reference, tolerance, random, exact=True)
    for dtype, packing in (
        (torch.bfloat16, PackingConfig()),
        (torch.float32, PackingConfig(quantize="int8")),
        (torch.bfloat16, PackingConfig(quantize="int4")),
    ):
        if can_run_native(config, dtype, cpu, packing):
            native = NativeBackend.of(_model(shape, seed, dtype), packing)
            yield from _compare(f"native {packing.quantize or dtype}", native, ids, reference, math.inf, random, exact=True)


def _compare(
    name: str, model: Any, ids: Any, reference: Any, tolerance: float, random: Random, exact: bool
) -> Iterator[Miss | str]:
    """All tokens at once and in pieces, all layers at once and in spans. `exact`: the results must be bit-identical."""
    import torch

    yield COUNTED
    batch, count = ids.shape
    positions = torch.arange(count).expand(batch, -1)
    with torch.inference_mode():
        whole = model.unembed(model.run_layers(model.embed(ids), 0, model.num_layers, positions))
        cache, pieces, start = model.new_cache(batch), [], 0
        while start < count:
            stop, middle = random.randint(start + 1, count), random.randint(0, model.num_layers)
            hidden = model.run_layers(model.embed(ids[:, start:stop]), 0, middle, positions[:, start:stop], cache)
            hidden = model.run_layers(hidden, middle, model.num_layers, positions[:, start:stop], cache)
            pieces.append(model.unembed(hidden))
            start = stop
        together = torch.cat(pieces, dim=1)
    scale = reference.abs().max().clamp_min(1e-9)
    for what, logits in (("the whole", whole), ("pieces", together)):
        if not torch.isfinite(logits).all():
            yield Miss("wrong", f"{name}: logits of {what} are not finite")
        elif (difference := float((logits.double() - reference).abs().max() / scale)) > tolerance:
            yield Miss("wrong", f"{name}: {what} differs from transformers by {difference:.2e} of the largest logit")
    if exact and not torch.equal(whole, together):
        yield Miss("wrong", f"{name}: pieces have other bits than the whole")


# --- models that cannot be right --------------------------------------------------------------------------------------------

_UNSOUND = (
    *("heads that no kv heads divide", "an output bias too short", "a down bias too short", "a query bias too short"),
    *("a query norm too short", "a key norm too long", "a head too narrow", "an embedding too short", "a norm too short"),
    *("a layer missing", "a projection transposed", "a gate too narrow", "layer types too few"),
)


def _unsound(shape: dict[str, Any], what: str, seed: int) -> Iterator[Miss | str]:
    """Each backend must refuse it with an error of ours. Running it would read beyond the weights."""
    import torch

    from layerskip_core.errors import LayerSkipError
    from layerskip_core.model import NativeBackend, PackedBackend, can_pack, can_run_native

    shape = {**shape, "model_type": "qwen3" if ("norm too" in what and "query" in what) or "key" in what else "llama"}
    for key in (
        "layer_types",
        "no_rope_layers",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    ):
        shape.pop(key, None)
    shape |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    model = _model(shape, seed, torch.float32)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    config = model.config
    _spoil(weights, config, what)
    ids, positions = torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None]
    for implementation in (PackedBackend, NativeBackend):
        yield COUNTED
        name = implementation.__name__
        try:
            if not can_pack(config):
                continue
            if implementation is NativeBackend and not can_run_native(config, torch.float32, torch.device("cpu"), None):
                continue
            built = implementation(config, weights.get)
            with torch.inference_mode():
                built.unembed(built.run_layers(built.embed(ids), 0, built.num_layers, positions))
        except LayerSkipError:
            continue
        except Exception as error:
            yield Miss("wrong", f"{name}: {what}: {type(error).__name__}: {error}"[:300])
        else:
            yield Miss("wrong", f"{name}: {what}: it ran")


def _spoil(weights: dict[str, Any], config: Any, what: str) -> None:
    layer = "model.layers.0."
    cut = {
        "an output bias too short": "self_attn.o_proj.bias",
        "a down bias too short": "mlp.down_proj.bias",
        "a query bias too short": "self_attn.q_proj.bias",
        "a query norm too short": "self_attn.q_norm.weight",
        "a norm too short": "input_layernorm.weight",
        "a gate too narrow": "mlp.gate_proj.weight",
    }
    if what in cut:
        weights[layer + cut[what]] = weights[layer + cut[what]][..., :3].clone()
    elif what == "heads that no kv heads divide":
        config.num_key_value_heads = 3
    elif what == "a key norm too long":
        weights[layer + "self_attn.k_norm.weight"] = weights[layer + "self_attn.k_norm.weight"].repeat(50)
    elif what == "a head too narrow":
        weights["lm_head.weight"] = weights["lm_head.weight"][:, :32].clone()
    elif what == "an embedding too short":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:3].clone()
    elif what == "a layer missing":
        for name in [name for name in weights if name.startswith(layer)]:
            del weights[name]
    elif what == "a projection transposed":
        weights[layer + "self_attn.k_proj.weight"] = weights[layer + "self_attn.k_proj.weight"].t().contiguous()
    else:
        config.layer_types = ["full_attention"] * (config.num_hidden_layers - 1)
