"""Specs of configurations, the values that are refused, and the checks of weights."""

from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from conftest import CHANGES, tiny_model
from test_packed import BIASES

from layerskip_core.errors import CheckpointError
from layerskip_core.model import ModelSpec, NativeBackend, TorchBackend, can_run_native
from layerskip_core.model.architectures import SUPPORTED, is_complete, known_architecture
from layerskip_core.model.weights import named_weights

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
}
FULL = "full_attention"
SLIDING = "sliding_attention"


def spec_of(**changes):
    return ModelSpec.of(SimpleNamespace(**{**LLAMA, **changes}))


@pytest.mark.parametrize("changes", [{}, {**BIASES, "tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_weights_are_those_that_transformers_makes(model_type, changes):
    model = tiny_model(model_type, torch.float32, **changes)
    weights = named_weights(model)
    spec = ModelSpec.of(model.config)
    assert spec.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert spec.parameters == sum(weight.numel() for weight in weights.values())
    assert (spec.layers, spec.head_dim, spec.context) == (6, 8, 128)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_complete_configuration_gives_the_same_spec_without_transformers(model_type):
    """It is incomplete if a value that the architecture reads is missing, because transformers may
    have another default.
    """
    config = tiny_model(model_type, torch.float32, **CHANGES.get(model_type, {})).config
    document = config.to_dict()
    assert is_complete(document)
    assert ModelSpec.of(SimpleNamespace(**document)) == ModelSpec.of(config)
    architecture = known_architecture(config)
    assert {
        architecture.activation or "vocab_size",
        architecture.norm_eps,
        "vocab_size",
    } < architecture.reads
    for name in architecture.reads:
        assert not is_complete({key: value for key, value in document.items() if key != name})
    assert not is_complete({**document, "model_type": "mamba"})


DELTA = {
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", FULL] * 3,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4}
LONG = {"rope_theta": 1e4, "partial_rotary_factor": 0.4}
BAD = [
    ({"model_type": "mamba"}, "model_type must be one of llama, .*, starcoder2, .*, got 'mamba'"),
    *(({"num_hidden_layers": value}, r"num_hidden_layers must be a whole number in 1\.\.1024") for value in (0, 10**7, True)),
    ({"vocab_size": "67"}, r"vocab_size must be a whole number in 1\.\.16777216, got 67"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, 3, got 4"),
    *(({"head_dim": value}, f"head_dim must be an even number .*, got {value}") for value in (0, 7, 2048)),
    ({"head_dim": None, "hidden_size": 36}, "hidden_size / num_attention_heads must be an even number, got 9"),
    ({"head_dim": None, "num_attention_heads": 6}, "hidden_size must be a multiple of num_attention_heads, 6, got 32"),
    ({"num_attention_heads": 4096, "head_dim": 1024}, r"num_attention_heads \* head_dim must be at most 1048576, got 4194304"),
    *(({"rms_norm_eps": value}, "rms_norm_eps must be a number") for value in (0, nan, inf, "x", None)),
    ({"layer_types": [FULL] * 5}, "layer_types must be a list of num_hidden_layers, 6, entries, got 5"),
    ({"layer_types": [FULL] * 5 + ["other"]}, "layer_types must be a list, each one of full_attention, sliding_attention, got"),
    ({"model_type": "lfm2", "norm_eps": 1e-5, "layer_types": [SLIDING] * 6}, "layer_types must .* full_attention, conv"),
    ({**DELTA, "linear_num_key_heads": 3}, "linear_num_value_heads must be a multiple of linear_num_key_heads, 3, got 4"),
    ({**DELTA, "linear_value_head_dim": 0}, "linear_value_head_dim must be a whole number"),
    ({**DELTA, "linear_value_head_dim": 1 << 20}, "the width of linear_attention must be at most 1048576"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a list of at least num_hidden_layers, 6"),
    ({"model_type": "gemma2", "layer_types": [SLIDING] * 6}, "sliding_window must be given for layers of sliding_attention"),
    *(
        ({"model_type": "olmoe", "num_experts": 8, **values}, message)
        for values, message in (
            ({"num_experts": None}, "num_local_experts or num_experts must be a whole number, got None"),
            ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most the number of experts, 8, got 9"),
            ({}, "num_experts_per_tok must be a whole number, got None"),
        )
    ),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got yes"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
    ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
    *(({"rope_parameters": {"rope_theta": value}}, r"rope_parameters\.rope_theta must be") for value in (0, "1", nan, inf)),
    ({"rope_parameters": {**LINEAR, "factor": "2"}}, r"rope_parameters\.factor must be a number"),
    ({"rope_parameters": {SLIDING: {"rope_theta": 0}, FULL: {}}, "layer_types": [SLIDING] * 6, "sliding_window": 5,
      "model_type": "gemma3_text"}, r"rope_parameters\.sliding_attention\.rope_theta must be"),
    *(({"eos_token_id": value}, "eos_token_id must be a whole number .* or a list") for value in (True, "2", -1, [2, None])),
    ({"model_type": "phi3", "rope_parameters": LONG}, r"head_dim \* partial_rotary_factor must be an even number above 0"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: str(value)[:60])
def test_invalid_values_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        spec_of(**changes)


def test_missing_and_misshapen_weights_are_refused_and_a_longrope_ends_early():
    spec = spec_of()
    spec.check_weights({**spec.shapes, "another": (3,)})
    with pytest.raises(CheckpointError, match=r"2 weights are missing, lm_head\.weight the first"):
        spec.check_weights(
            {
                name: shape
                for name, shape in spec.shapes.items()
                if name != "model.norm.weight" and "head" not in name
            }
        )
    with pytest.raises(
        CheckpointError, match=r"size mismatch of model\.norm\.weight: needed \[32\], found \[31\]"
    ):
        spec.check_weights({**spec.shapes, "model.norm.weight": (31,)})
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    assert spec_of(rope_parameters={**rope, "original_max_position_embeddings": 50}).context == 50
    assert spec_of(rope_parameters={**rope, "original_max_position_embeddings": 500}).context == 128
    assert spec_of().context == 128


IMPLEMENTATIONS = [TorchBackend, NativeBackend]


def pack(implementation, change, model_type="llama", dtype=torch.float32, packing=None, **shape):
    model = tiny_model(model_type, dtype, **shape)
    if implementation is NativeBackend and not can_run_native(
        ModelSpec.of(model.config), dtype, torch.device("cpu"), packing
    ):
        pytest.skip("no kernels were built here")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    change(weights)
    return implementation(ModelSpec.of(model.config), lambda name: weights.get(name), packing)


WEIGHTS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.3.input_layernorm.weight",
    *(
        f"model.layers.3.{name}.weight"
        for name in ("self_attn.k_norm", "self_attn.o_proj", "mlp.down_proj")
    ),
    "model.layers.3.self_attn.q_proj.bias",
]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_weight_is_checked_when_it_is_packed(implementation, name):
    """The kernels would read past the end of a short weight."""

    def cut(weights):
        weights[name] = weights[name][:-1]

    def damage(weights):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[-1] = nan

    with pytest.raises(
        CheckpointError, match=rf"size mismatch of {name}: needed \[\d+(, \d+)?\], found \["
    ):
        pack(implementation, cut, "qwen3", **BIASES)
    with pytest.raises(CheckpointError, match=f"the weight {name} is missing"):
        pack(implementation, lambda weights: weights.pop(name), "qwen3", **BIASES)
    with pytest.raises(CheckpointError, match=f"the weight {name} holds NaN"):
        pack(implementation, damage, "qwen3", **BIASES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_that_an_architecture_lacks_are_ignored(implementation):
    """As transformers does. The kernels once read a bias of the head, whatever its length."""
    extra = {
        "lm_head.bias": torch.zeros(1),
        "model.layers.0.self_attn.q_proj.bias": torch.full((1,), nan),
    }
    pack(implementation, lambda weights: weights.update(extra))
