from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from conftest import CHANGES, OWN_LAYERS, at, ids_of, tiny_model
from evaluating import tiny_loaded
from fp64 import compute_in_fp64

from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.model import ModelSpec, TorchBackend, TransformersBackend, missing_feature
from layerskip_core.model import torch_linear as linear
from layerskip_core.model.architectures import SUPPORTED

BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
}
CASES = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {**BIASES, "tie_word_embeddings": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, no groups": ("llama", {"num_key_value_heads": 4}),
    "llama, yarn": ("llama", YARN),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, some windows": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {}),
    "gemma3_text": (
        "gemma3_text",
        {**CHANGES["gemma3_text"], "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "gpt_neox, no parallel": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "falcon, some key heads": (
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "num_kv_heads": 2},
    ),
}
CASES |= {
    model_type: (model_type, CHANGES.get(model_type, {}))
    for model_type in SUPPORTED
    if model_type not in CASES
}
EACH_PART = [
    "llama, biases, tied",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoe",
    "olmo3",
    "phi3",
    "qwen3_moe",
    "starcoder2",
    "glm4",
    "hunyuan_v1_dense",
    "gpt_neox",
    "gpt2",
]
# In standard deviations of what is expected
LARGEST_ERROR = {torch.float64: 1e-11, torch.float32: 1e-4}
BF16_ERROR = 0.03  # root mean square: 8 bits, rounded in six layers


@pytest.fixture
def pair(monkeypatch):
    """(generic, fast) over the same random weights, including those of norms and biases."""

    def make(case="llama", dtype=torch.float64, fast=TorchBackend, **changes):
        model_type, fixed = CASES[case]
        model = tiny_model(model_type, dtype, **fixed, **changes)
        if dtype == torch.float64:
            compute_in_fp64(model, monkeypatch)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return TransformersBackend(deepcopy(model)), fast.of(model)

    return make


def spans(model, ids, edges):
    """Hidden states after layers 2 and 6 and logits of every piece ids[start:stop], through one
    cache.
    """
    cache = model.new_cache(len(ids))
    results = []
    with torch.inference_mode():
        for start, stop in pairwise(edges):
            positions = torch.arange(start, stop).expand(len(ids), -1)
            early = model.run_layers(model.embed(ids[:, start:stop]), 0, 2, at(positions, cache))
            late = model.run_layers(early, 2, 6, at(positions, cache))
            results += [
                early[..., : model.spec.hidden],
                late[..., : model.spec.hidden],
                model.unembed(late),
            ]
    return results


def errors(actual, expected):
    """Differences in standard deviations of what is expected, of all results in one row."""
    return torch.cat(
        [
            ((a.double() - e) / e.double().std()).flatten()
            for a, e in zip(actual, expected, strict=True)
        ]
    )


def rms(values):
    return float(values.square().mean().sqrt())


def assert_equal_spans(generic, fast, ids, edges, dtype):
    difference = errors(spans(fast, ids, edges), spans(generic, ids, edges))
    if dtype == torch.bfloat16:
        assert rms(difference) < BF16_ERROR
    else:
        assert difference.abs().max() < LARGEST_ERROR[dtype]


@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN_LAYERS])
def test_spans_equal_the_generic_ones(pair, case):
    assert_equal_spans(*pair(case), ids_of(2, 17), [0, 9, 10, 17], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", EACH_PART)
def test_prepacked_spans_equal_the_generic_ones(pair, case, dtype, monkeypatch):
    if not linear.prepacks(dtype):
        pytest.skip("no oneDNN kernel for this precision here")
    monkeypatch.setattr(linear, "_PREPACKED_SIZE", 0)
    generic, fast = pair(case, dtype)
    assert fast.implementation == "packed (oneDNN)"
    assert_equal_spans(generic, fast, ids_of(2, 17), [0, 9, 10, 17], dtype)


def test_a_long_prompt_in_chunks_and_a_growing_cache(pair):
    """300 tokens are more than one chunk, 390 more than three blocks of the cache and than the
    first rope table.
    """
    generic, fast = pair(max_position_embeddings=400)
    assert_equal_spans(
        generic, fast, ids_of(1, 390), [0, 300, 301, 383, 384, 385, 390], torch.float64
    )


def test_without_onednn_plain_layers_run(pair, monkeypatch):
    monkeypatch.setattr(linear, "prepacks", lambda dtype: False)
    generic, fast = pair("llama", torch.bfloat16)
    assert fast.implementation == "packed"
    assert_equal_spans(generic, fast, ids_of(1, 12), [0, 8, 12], torch.bfloat16)


def test_the_original_weights_are_released_and_rotary_frequencies_stay_in_fp32(saved):
    model = tiny_model()
    TorchBackend.of(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = for_training(saved(), "cpu", "bf16")
    torch.testing.assert_close(
        loaded.model.model.rotary_emb.inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    )
    assert loaded.backend.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, missing",
    [
        ({}, None),
        ({"hidden_act": "tanh"}, "the activation tanh"),
        (
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
            "rotary positions of type axial",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "a partial_rotary_factor of 0.5",
        ),
    ],
    ids=str,
)
def test_what_the_layers_lack_is_named_and_not_packed(change, missing):
    config = deepcopy(tiny_model().config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    assert missing_feature(ModelSpec.of(config)) == missing


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that saves a tiny model; its folder has the tokenizer of the other tests."""

    def save(**changes):
        tiny_model("llama", torch.float32, vocab_size=300, **changes).save_pretrained(tmp_path)
        monkeypatch.setattr(
            "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny_loaded().tokenizer
        )
        return str(tmp_path)

    return save


@pytest.mark.parametrize("activation, implementation", [("silu", "packed"), ("tanh", "generic")])
def test_a_checkpoint_is_loaded_for_decoding(saved, monkeypatch, activation, implementation):
    folder = saved(hidden_act=activation)
    monkeypatch.setenv("LAYERSKIP_KERNELS", "torch")
    assert for_decoding(folder, "cpu", "fp32").backend.implementation == implementation
    assert for_training(folder, "cpu", "fp32").backend.implementation == "generic"
