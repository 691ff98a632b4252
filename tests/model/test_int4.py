"""int4 weights as rows of bytes, and decoding with them."""

import pytest
import torch
from conftest import logits_of, tiny_model

from layerskip_core.config.model import PackingConfig
from layerskip_core.model import NativeBackend, TorchBackend
from layerskip_core.model.native.compiled import kernels
from layerskip_core.model.weights import Int4, inputs_of, int4_bytes, int4_bytes_shape, int4_of

WIDE = {"intermediate_size": 96, "hidden_size": 64}
BACKENDS = [
    TorchBackend,
    pytest.param(
        NativeBackend, marks=pytest.mark.skipif(kernels() is None, reason="no kernels here")
    ),
]


def random_weight(outputs=70, inputs=96):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def rows_of_bytes(model, change=lambda weight: weight):
    """All projections and the head as rows of bytes, as `take`."""
    made = {
        name: int4_bytes(int4_of(change(parameter.detach())))
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed" not in name
    }
    return made.get


IDS = torch.tensor([[5, 9, 33, 61, 2, 17, 40]])


def test_rows_of_bytes_hold_the_same_numbers():
    weight = int4_of(random_weight())
    rows = int4_bytes(weight)
    assert (
        rows.dtype == torch.uint8
        and tuple(rows.shape) == int4_bytes_shape(70, 96) == (70, 60)
        and inputs_of(rows) == 96
    )
    for before, after in zip(weight, int4_of(rows), strict=True):
        assert torch.equal(before, after)
    assert set(weight.levels.unique().tolist()) == set(range(16))
    permutation = torch.randperm(70)
    assert torch.equal(int4_of(rows[permutation]).weight, weight.weight[permutation])
    assert not int4_of(torch.zeros(3, 60, dtype=torch.uint8)).weight.any()


def test_levels_are_the_nearest_ones():
    weight = random_weight()
    levels, scale, low = made = int4_of(weight)
    assert torch.equal(
        made.weight, (low[..., None] + levels.view(70, 3, 32) * scale[..., None]).view(70, 96)
    )
    error = (made.weight - weight).abs().view(70, 3, 32)
    assert (error <= scale[..., None] * 0.6 + weight.abs().max() * 2**-8).all()
    for nearby in (-1, 1):
        moved = Int4((levels.int() + nearby).clamp(0, 15), scale, low)
        assert ((moved.weight - weight).abs().view(70, 3, 32) >= error - 1e-6).all()


@pytest.mark.parametrize("model_type", ["llama", "phi3", "starcoder2", "olmo2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_weights_decode_to_the_bits_of_weights_rounded_now(backend, model_type):
    """Phi-3 has fused projections, starcoder2 biases and a tied head, olmo2 norms over its
    projections.
    """

    def model():
        return tiny_model(model_type, torch.float32, **WIDE)

    for packing in (PackingConfig("int4"), PackingConfig("int4", draft_vocab=20)):
        rounded = backend.of(model(), packing)
        calibrated = backend.of(model(), packing, None, rows_of_bytes(model()))
        assert torch.equal(logits_of(rounded, IDS), logits_of(calibrated, IDS))
        assert calibrated.implementation == rounded.implementation.replace(
            "int4", "calibrated int4"
        )
    doubled = backend.of(model(), packing, None, rows_of_bytes(model(), lambda weight: 2 * weight))
    assert not torch.equal(logits_of(doubled, IDS), logits_of(calibrated, IDS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_int4_copies_have_the_stored_weights(backend):
    packing = PackingConfig(draft_weights=("int8", "int4"))
    rows = rows_of_bytes(tiny_model(dtype=torch.float32, **WIDE), lambda weight: weight.flip(0))
    plain, calibrated = (
        backend.of(tiny_model(dtype=torch.float32, **WIDE), packing, None, int4)
        for int4 in (None, rows)
    )
    assert torch.equal(logits_of(plain, IDS), logits_of(calibrated, IDS))
    sides = [(plain.draft_sides[kind], calibrated.draft_sides[kind]) for kind in ("int8", "int4")]
    same = [
        torch.equal(logits_of(plain, IDS, side=one), logits_of(calibrated, IDS, side=other))
        for one, other in sides
    ]
    assert same == [True, False]
    assert calibrated.implementation.endswith(", int8 and calibrated int4 drafts")
