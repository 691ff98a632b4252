"""The whole model: layers one by one, then the tuning of their scales."""

import pytest
import torch
from conftest import tiny_model

from layerskip_core.calibration.model import quantize, tune
from layerskip_core.checkpoint.beside import matrix_names
from layerskip_core.model import TransformersBackend
from layerskip_core.model.weights import int4_of

TEXTS = torch.randint(3, 67, (48, 32), generator=torch.Generator().manual_seed(0))
UNSEEN = torch.randint(3, 67, (8, 32), generator=torch.Generator().manual_seed(1))
WIDE = {"intermediate_size": 96, "hidden_size": 64}


def backend_of(model_type):
    return TransformersBackend(tiny_model(model_type, torch.float32, **WIDE))


def logarithms(backend, texts):
    with torch.no_grad():
        hidden = backend.run_layers(backend.embed(texts), 0, backend.num_layers, torch.arange(texts.shape[1])[None])
        return backend.unembed(hidden).log_softmax(-1)


def divergence(backend, model_type, texts):
    expected, actual = logarithms(backend_of(model_type), texts), logarithms(backend, texts)
    return torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item() / texts.numel()


def with_weights(model_type, weights):
    backend = backend_of(model_type)
    with torch.no_grad():
        for name, weight in weights.items():
            if name != backend.spec.head_name:
                backend.model.get_parameter(name).copy_(weight.weight)
    return backend


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_each_step_brings_predictions_nearer_to_the_original(model_type):
    backend = backend_of(model_type)
    names = matrix_names(backend.spec)
    parameters = {name: backend.model.get_parameter(name).detach() for name in names}
    nearest = with_weights(model_type, {name: int4_of(weight) for name, weight in parameters.items()})
    done = []
    weights, original = quantize(backend, TEXTS, done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7] and sorted(weights) == sorted(names)
    calibrated = divergence(with_weights(model_type, weights), model_type, TEXTS)
    assert calibrated == pytest.approx(divergence(backend, model_type, TEXTS))
    steps = []
    tuned = tune(backend, weights, original, TEXTS, 40, 0, lambda step, value: steps.append((step, value)))
    assert [step for step, _ in steps] == list(range(1, 41)) and steps[0][1] == pytest.approx(calibrated, rel=0.01)
    again = with_weights(model_type, tuned)
    assert divergence(again, model_type, TEXTS) < 0.95 * calibrated < 0.8 * divergence(nearest, model_type, TEXTS)
    assert divergence(again, model_type, UNSEEN) < 0.8 * divergence(nearest, model_type, UNSEEN)
    for name in names:
        assert torch.equal(tuned[name].levels, weights[name].levels)
        assert torch.equal(tuned[name].scale.bfloat16().float(), tuned[name].scale)


def test_the_original_states_are_those_of_the_original_model():
    backend = backend_of("llama")
    with torch.no_grad():
        expected = backend.run_layers(backend.embed(TEXTS), 0, 6, torch.arange(32)[None])
    torch.testing.assert_close(quantize(backend, TEXTS, lambda _: None)[1], expected)
