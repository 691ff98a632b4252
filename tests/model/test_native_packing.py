"""Weights in panels, as torch's operations on whole tensors give them, to the bit."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from conftest import run_texts, tiny_model
from decodings import WIDE, native_or_skip
from test_native import BUILT, threads  # noqa: F401  a fixture

from layerskip_core.model.native import compiled
from layerskip_core.model.native.matrix import MatrixForm, NativeMatrix
from layerskip_core.model.weights import Affine, inputs_of, int4_of, int8_levels

PANEL = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def panels(weight):
    """(P, 32, in), with zeros after the last row."""
    return F.pad(weight, (0, 0, 0, -len(weight) % PANEL)).view(-1, PANEL, weight.shape[1])


def as_they_are(weight):
    units = 4 // weight.element_size()
    return panels(weight).unflatten(2, (-1, units)).transpose(1, 2), None


def int8(weight):
    levels, scale = int8_levels(panels(weight).flatten(0, 1))
    unsigned = levels.to(torch.int16).add_(128).to(torch.uint8)
    return unsigned.view(-1, PANEL, weight.shape[1] // 4, 4).transpose(1, 2), scale.view(-1, PANEL)


def int4(weight):
    levels, scale, low = int4_of(panels(weight).flatten(0, 1))
    quads = levels.view(-1, PANEL, scale.shape[1], 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
    factors = torch.stack([scale, low]).to(torch.bfloat16).view(2, -1, PANEL, scale.shape[1])
    return quads[0] | quads[1] << 4, factors.permute(1, 3, 0, 2)


EXPECTED = {None: as_they_are, "int8": int8, "int4": int4}


def random_weight(outputs, inputs, dtype):
    """Random numbers, with rows and groups at which rounding could go wrong."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs, generator=generator) * 10 ** torch.randn(outputs, 1, generator=generator)
    steps = torch.arange(inputs) % 255 - 127
    edges = torch.stack(
        [
            torch.zeros(inputs),
            -torch.zeros(inputs),
            torch.full((inputs,), -1.001),  # its lowest value rounds in bf16: the level is far out of range
            steps / 2,  # ties of int8 where the largest is 127
            torch.where(torch.arange(inputs) % 32 == 31, 15, (steps + 127) % 31 / 2),  # ties of int4
            steps * 1e-44,  # subnormal
            steps * 1e-14,  # below the smallest step
            steps * 1e34,
        ]
    )
    edges[3, 0] = -127
    count = min(len(edges), outputs)
    weight[torch.arange(count) * (outputs - 1) // max(1, count - 1)] = edges[:count]
    return weight.to(dtype)


def packed_by(variant, weights, quantization=None):
    """What the kernels read: the weights, and their scales or None."""
    kernels = compiled.kernels(variant)
    assert kernels is not None
    kind = quantization or ("bf16" if weights[0].dtype == torch.bfloat16 else "fp32")
    form = MatrixForm(kind, inputs_of(weights[0]), len(weights[0]), len(weights))
    matrix = NativeMatrix.packed(kernels, "", form, lambda: [Affine(weight, None) for weight in weights])
    held = matrix.parts.get("scale")
    assert held is None or matrix.structure.scale == held.data_ptr()
    data = bytearray(ctypes.string_at(matrix.structure.weight, matrix.parts["weight"].nbytes))
    return torch.frombuffer(data, dtype=torch.uint8), None if held is None else held.flatten()


def assert_packed(variant, weights, quantization=None):
    expected = [EXPECTED[quantization](weight) for weight in weights]
    data, scale = packed_by(variant, weights, quantization)
    wanted = torch.stack([part for part, _ in expected], dim=1).contiguous().flatten()
    assert torch.equal(data, wanted.view(torch.uint8))
    if quantization is None:
        assert scale is None
    else:
        assert torch.equal(scale, torch.stack([part for _, part in expected], dim=1).flatten())


SHAPES = [(1, 32), (31, 64), (32, 96), (100, 32), (257, 544)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", EXPECTED)
@pytest.mark.parametrize("variant", BUILT)
@pytest.mark.parametrize("number", [1, 3])
def test_panels_are_those_of_torch(variant, quantization, dtype, number, threads):  # noqa: F811  a fixture
    threads(number)
    for outputs, inputs in SHAPES:
        assert_packed(variant, [random_weight(outputs, inputs, DTYPES[dtype])], quantization)
    for inputs in () if quantization else (2, 14, 30, 34, 62):  # unrounded weights have any even width
        assert_packed(variant, [random_weight(40, inputs, DTYPES[dtype])])


def test_fp32_weights_that_bf16_holds_take_half_the_room_and_give_the_same_bits(monkeypatch):
    if not getattr(compiled.kernels(), "widens_bf16", False):
        pytest.skip("no kernels that widen bf16")
    backends = []
    for narrows in (True, False):
        model = tiny_model("llama", torch.float32, **WIDE)
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        if not narrows:
            monkeypatch.setattr(compiled.kernels(), "widens_bf16", False)
        backends.append(native_or_skip(model))
    matrices = [backend._layers.layers[0].matrices for backend in backends]
    assert [matrix.form.kind for matrix in matrices[0]] == 4 * ["widened"]
    sizes = [sum(matrix.parts["weight"].nbytes for matrix in of_layer) for of_layer in matrices]
    assert 2 * sizes[0] == sizes[1]
    tokens = torch.arange(5, 40)[None]
    with torch.inference_mode():
        logits = [one.unembed(run_texts(one, one.embed(tokens), 0, one.num_layers)) for one in backends]
    assert torch.equal(*logits)
