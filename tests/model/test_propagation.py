"""`Backend.write_kv`: the keys and values that a layer gives to the cache, without the rest of the
layer.
"""

import pytest
import torch
from conftest import CHANGES, OWN_LAYERS, at, ids_of, tiny_model
from decodings import entries
from test_native import CELLS, KINDS, in_turn, model_of, variant  # noqa: F401  fixtures

from layerskip_core.model import NativeBackend, TorchBackend
from layerskip_core.model.architectures import SUPPORTED

LAYERS = 6


def kept(cache, layer):
    """Keys and values of a layer, (2, B, kv heads, capacity, head dim)."""
    return torch.stack([entries(cache, row)[layer] for row in range(cache.rows)], dim=1)


def assert_propagates(model, positions):
    """Layers 2..4 for hidden states at `positions`, against a run of each of these layers over the
    same states.
    """
    rows, count = positions.shape
    prompt = ids_of(rows, 9)
    ids = ids_of(rows, count)
    with torch.inference_mode():
        cache = model.new_cache(rows)
        reference = model.new_cache(rows)
        for each in (cache, reference):
            model.run_layers(model.embed(prompt), 0, LAYERS, each.span(0, 9))
        hidden = model.run_layers(model.embed(ids), 0, 2, at(positions, reference))
        before = [kept(cache, layer) for layer in range(LAYERS)]
        states = hidden.clone()
        model.write_kv(hidden, 2, 5, at(positions, cache))
        assert torch.equal(hidden, states)
        for layer in range(2, 5):
            model.run_layers(hidden, layer, layer + 1, at(positions, reference))
    for layer in range(LAYERS):
        now = kept(cache, layer)
        if layer in range(2, 5):
            assert torch.equal(now, kept(reference, layer)) and not torch.equal(now, before[layer])
        else:
            # The cache may have grown
            assert torch.equal(now[..., : before[layer].shape[-2], :], before[layer])


PLACES = torch.tensor([[9, 10, 11], [7, 8, 9]])


@pytest.mark.parametrize("model_type", [kind for kind in SUPPORTED if kind not in OWN_LAYERS])
def test_keys_and_values_are_those_of_the_layers(model_type):
    assert_propagates(
        TorchBackend.of(tiny_model(model_type, **CHANGES.get(model_type, {}))), PLACES
    )


@in_turn("model_type, precision", [cell for cell in CELLS if cell[0] not in OWN_LAYERS])
def test_those_of_the_kernels_too(variant, model_type, precision):  # noqa: F811  a fixture
    assert_propagates(model_of(precision, model_type, **KINDS[model_type]), PLACES)


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_queries_that_end_within_a_panel_of_the_weights(variant, heads):  # noqa: F811  a fixture
    """The kernels compute the panels of 32 outputs that hold keys and values: the first also has 8,
    24 or 8 queries.
    """
    model = tiny_model(
        dtype=torch.float32, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=1
    )
    assert_propagates(NativeBackend.of(model), PLACES)


def test_one_token_and_a_long_text_in_parts():
    """300 tokens are more than the part that a call of the packed layers has."""
    assert_propagates(TorchBackend.of(tiny_model()), torch.tensor([[9]]))
    model = TorchBackend.of(tiny_model(max_position_embeddings=400))
    assert_propagates(model, torch.arange(9, 309)[None])
