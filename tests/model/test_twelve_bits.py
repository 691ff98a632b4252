"""bf16 weights in 12 bits: every bit comes back, and outputs are those of bf16."""

import pytest
import torch
from conftest import ids_of, logits_of, tiny_model
from test_native import BUILT, KINDS, WIDE, needs_kernels, variant  # noqa: F401  a fixture

from layerskip_core.model import NativeBackend, native
from layerskip_core.model.native import compiled
from layerskip_core.model.native.compiled import CCall, CNorm, CShape
from layerskip_core.model.native.matrix import MatrixForm, NativeMatrix, are_listed
from layerskip_core.model.weights import Affine

pytestmark = needs_kernels
PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def matrix_of(name, weight, kind="bf16", codes=True, bias=None):
    form = MatrixForm(kind, weight.shape[1], len(weight), biased=bias is not None)
    read = lambda: [Affine(weight, bias)]  # noqa: E731
    return NativeMatrix.packed(compiled.kernels(name), "", form, read, codes=codes)


def normal(outputs, inputs):
    generator = torch.Generator().manual_seed(inputs)
    return (0.02 * torch.randn(outputs, inputs, generator=generator)).bfloat16()


def with_exceptions():
    """At the first and the last place of the matrix, of a panel, and where steps meet."""
    weight = normal(70, 288)
    for row, column in (0, 0), (69, 287), (31, 287), (32, 0), (5, 31), (5, 32), (40, 128):
        weight[row, column] = torch.tensor(1e30)
    weight[33, :3] = torch.tensor([torch.nan, torch.inf, 1e-39])
    return weight


CASES = {
    "all patterns": PATTERNS.view(-1, 64),
    "zeros": torch.zeros(40, 64, dtype=torch.bfloat16),
    "negative zeros": -torch.zeros(40, 64, dtype=torch.bfloat16),
    "one exponent": (1 + torch.rand(64, 32)).bfloat16(),
    "normal": normal(100, 96),
    "exceptions": with_exceptions(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BUILT)
def test_every_bit_comes_back(name, case):
    weight = CASES[case]
    matrix = matrix_of(name, weight)
    assert matrix.form.exceptions is not None
    back = matrix.decoded(compiled.kernels(name)).weight
    assert torch.equal(back.view(torch.int16), weight.view(torch.int16))
    assert are_listed(matrix.form, matrix.parts["exceptions"])
    assert (
        matrix.parts["weight"].nbytes
        == 0.75 * matrix_of(name, weight, codes=False).parts["weight"].nbytes
    )


def test_random_bits_stay_bf16():
    shuffled = PATTERNS[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    assert matrix_of(BUILT[0], shuffled.view(-1, 64)).form.exceptions is None
    late = torch.cat((normal(64, 64), shuffled.view(-1, 64)))  # which the first panel does not show
    assert matrix_of(BUILT[0], late).form.exceptions is None


def products(name, matrix, x):
    rows = len(x)
    out = torch.empty(rows, matrix.outputs)
    scratch = torch.empty(8 * (rows + 40) * (4 * x.shape[1] + 128), dtype=torch.uint8)
    call = CCall(rows=rows)
    call.hidden = x.data_ptr()
    call.scratch = scratch.data_ptr()
    call.scratch_bytes = len(scratch) // 2
    shape = CShape(hidden=x.shape[1])
    score = compiled.kernels(name).score
    score(shape, CNorm(), matrix.structure, call, out.data_ptr(), 1)
    return out


@pytest.mark.parametrize("outputs,inputs", [(33, 32), (170, 96), (300, 512), (70, 288)])
@pytest.mark.parametrize("name", BUILT)
def test_products_have_the_bits_of_bf16(name, outputs, inputs):
    weight = normal(outputs, inputs)
    weight[0, 0] = weight[-1, -1] = weight[outputs // 2, inputs // 2] = 1e-20
    bias = torch.randn(outputs)
    kinds = ["bf16", "widened"] if compiled.kernels(name).widens_bf16 else ["bf16"]
    for kind in kinds:
        plain = matrix_of(name, weight, kind, False, bias)
        coded = matrix_of(name, weight, kind, True, bias)
        for rows in (*range(1, 34), 65, 200):
            x = torch.randn(rows, inputs)
            assert torch.equal(products(name, plain, x), products(name, coded, x)), rows


def pair(monkeypatch, dtype, model_type="llama"):
    models = []
    for least in 1 << 60, 0:
        monkeypatch.setattr(native, "LEAST_CODED", least)
        shape = {**WIDE, **KINDS[model_type], "num_hidden_layers": 2}
        model = tiny_model(model_type, torch.bfloat16, **shape).to(dtype)
        models.append(NativeBackend.of(model))
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_models_have_the_outputs_of_bf16(variant, monkeypatch, dtype, model_type):  # noqa: F811
    plain, coded = pair(monkeypatch, dtype, model_type)
    is_coded = dtype == torch.bfloat16 or compiled.kernels(variant).widens_bf16
    assert ("bf16 in 12 bits" in coded.implementation) == is_coded
    ids = ids_of(2, 40)
    assert torch.equal(logits_of(plain, ids, [33, 38]), logits_of(coded, ids, [33, 38]))
