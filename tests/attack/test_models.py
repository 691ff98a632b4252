"""Random architectures and shapes on every backend, compared with the forward pass of transformers."""

import math

import pytest
import torch
from attacking import examples
from fp64 import compute_in_fp64
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerskip_core.config.model import PackingConfig
from layerskip_core.model import ModelSpec, NativeBackend, TorchBackend, TransformersBackend, can_run_native, missing_feature
from layerskip_core.model.architectures import ARCHITECTURES

LEARNED = {"original_max_position_embeddings": 32}
ROPES = (
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **LEARNED},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0, **LEARNED},
)  # fmt: skip
REDUCED = ((torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int4"))


@st.composite
def shapes(draw, architecture):
    """The fields of a config that differ from its type's defaults."""

    def of(*values):
        return draw(st.sampled_from(values))

    heads, layers = of(4, 1, 2, 3, 6, 8), draw(st.integers(1, 5))
    shape = {
        "vocab_size": of(67, 5, 31, 256, 513),
        "hidden_size": heads * of(8, 1, 2, 5, 16, 20),
        "intermediate_size": of(48, 1, 7, 16, 64, 100),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of(*(kv for kv in range(1, heads + 1) if heads % kv == 0)),
        "head_dim": of(8, 2, 4, 16, 20, 64),
        "max_position_embeddings": of(128, 16, 2048),
        "rms_norm_eps": of(1e-6, 1e-2),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
    }
    kind = ARCHITECTURES[architecture]
    shape[kind.norm_eps] = shape.pop("rms_norm_eps")
    shape |= {name: draw(st.booleans()) for name in kind.biases if isinstance(name, str)}
    if kind.partial_rope:
        shape["head_dim"] = of(16, 64)
    if "head_dim" in kind.values or architecture == "olmoe":  # whose norms of queries are as wide as its states
        shape["hidden_size"] = heads * shape["head_dim"]
    if kind.windows in ("all", "listed"):
        shape["sliding_window"] = of(5, 1, 2, 16, 4096)
    if architecture in ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2"):
        shape["layer_types"] = [of("sliding_attention", "full_attention") for _ in range(layers)]
    if architecture == "qwen2":
        shape |= {"use_sliding_window": draw(st.booleans()), "sliding_window": 4, "max_window_layers": layers // 2}
    if architecture == "smollm3":
        shape["no_rope_layers"] = [draw(st.integers(0, 1)) for _ in range(layers)]
    if architecture in ("gpt_neox", "stablelm"):
        shape["use_parallel_residual"] = draw(st.booleans())
    if architecture == "falcon":
        del shape["head_dim"]
        shape |= of({}, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2})
        shape["num_kv_heads"] = shape.pop("num_key_value_heads")
    if kind.experts is not None:  # a type's usual ones take gigabytes
        count = of(4, 1, 3, 8)
        names = ("num_local_experts",) if architecture in ("granitemoe", "mixtral") else ("num_experts",)
        shape |= dict.fromkeys(names, count) | {
            "num_experts_per_tok": of(*range(1, count + 1)),
            kind.experts.inner: of(48, 1, 16),
        }
    if architecture == "granite":
        shape |= {"embedding_multiplier": of(0.5, 12.0), "residual_multiplier": of(0.22, 1.0), "logits_scaling": of(0.5, 8.0)}
    if architecture not in ("gemma3_text", "olmo3", "olmoe", "phi3", "gpt2", "falcon") and draw(st.booleans()):
        shape["rope_parameters"] = dict(of(*ROPES))
        shape["head_dim"] = max(4, shape["head_dim"])  # transformers divides by head_dim - 2 where the type is dynamic
    return shape


def model_of(architecture, shape, seed, dtype):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**shape), attn_implementation="eager")
    if model.config.to_dict().get("num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the other one lacks fp64
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: their initial values would hide faults
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@examples(2)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_every_backend_gives_the_logits_of_transformers(architecture, data, seed):
    shape = data.draw(shapes(architecture))
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, min(24, shape["max_position_embeddings"])))
    ids = torch.randint(0, shape["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))
    cpu = torch.device("cpu")
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-3)):
        model = model_of(architecture, shape, seed, dtype)
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                compute_in_fp64(model, patch)
            with torch.inference_mode():
                reference = model(ids).logits.double()
            require_same(TransformersBackend(model), ids, reference, tolerance, data)
            if not missing_feature(ModelSpec.of(model.config)):
                require_same(TorchBackend.of(model), ids, reference, tolerance, data)
        if can_run_native(ModelSpec.of(model.config), dtype, cpu, None):
            native = NativeBackend.of(model_of(architecture, shape, seed, dtype))
            require_same(native, ids, reference, tolerance, data, same_bits=True)
    for dtype, quantize in REDUCED:
        packing = PackingConfig(quantize)
        if can_run_native(ModelSpec.of(model.config), dtype, cpu, packing):
            native = NativeBackend.of(model_of(architecture, shape, seed, dtype), packing)
            require_same(native, ids, reference, math.inf, data, same_bits=True)


def require_same(model, ids, reference, tolerance, data, same_bits=False):
    """All tokens at once, and in pieces whose layers run in two spans. `tolerance`: of the largest logit."""
    batch, count = ids.shape
    positions = torch.arange(count).expand(batch, -1)
    with torch.inference_mode():
        whole = model.unembed(model.run_layers(model.embed(ids), 0, model.num_layers, positions))
        cache, pieces, start = model.new_cache(batch), [], 0
        while start < count:
            stop, middle = data.draw(st.integers(start + 1, count)), data.draw(st.integers(0, model.num_layers))
            hidden = model.run_layers(model.embed(ids[:, start:stop]), 0, middle, positions[:, start:stop], cache)
            hidden = model.run_layers(hidden, middle, model.num_layers, positions[:, start:stop], cache)
            pieces.append(model.unembed(hidden))
            start = stop
        together = torch.cat(pieces, dim=1)
    scale = reference.abs().max().clamp_min(1e-9)
    for logits in (whole, together):
        assert torch.isfinite(logits).all()
        assert float((logits.double() - reference).abs().max() / scale) <= tolerance
    assert not same_bits or torch.equal(whole, together)
