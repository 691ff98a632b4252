"""Rows of blocks as GGUF files have them: what the kernels' panels hold, and products with them."""

import gguf
import pytest
import torch
import torch.nn.functional as F
from conftest import logits_of, random_rows, require_near, tiny_model
from decodings import native_or_skip
from test_native import BUILT

from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import CheckpointError
from layerskip_core.model import NativeBackend, TorchBackend
from layerskip_core.model.blocks import FORMS, plain
from layerskip_core.model.native import compiled
from layerskip_core.model.native.matrix import MatrixForm, NativeMatrix
from layerskip_core.model.vocabulary import DraftVocabulary
from layerskip_core.model.weights import Affine

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
}


def bits_apart(units, count, width):
    """`count` numbers of `width` bits of each of (P, X, 32) int32: (P, X, 32, count)."""
    return units[..., None] >> torch.arange(0, count * width, width) & (1 << width) - 1


def weights_of(matrix, name):
    """What the panels of a type hold, (rows, inputs) in fp32."""
    form = FORMS[name]
    units = matrix.parts[f"{name}.weight"]
    scale = matrix.parts.get(f"{name}.scale", torch.ones(0)).float()
    panels = len(units)
    inputs = matrix.form.inputs
    groups = units.view(panels, -1, form.bits, 32)
    if form.bits == 8:
        levels = bits_apart(groups, 4, 8).permute(0, 3, 1, 2, 4).reshape(panels, 32, inputs)
    else:
        # (P, G, unit, 32, byte, half)
        halves = bits_apart(groups[:, :, :4], 8, 4).unflatten(-1, (4, 2))
        levels = halves.permute(0, 3, 1, 2, 5, 4).reshape(panels, 32, inputs)
        if form.bits > 4:
            width = form.bits - 4
            quads = 8 // (form.bits - 4)
            upper = bits_apart(groups[:, :, 4:], 32 // width, width).unflatten(-1, (4, quads))
            levels = levels | upper.permute(0, 3, 1, 2, 5, 4).reshape(panels, 32, inputs) << 4
    if form.by_table:
        table = torch.tensor(gguf.quants.MXFP4.kvalues, dtype=torch.float32)
        exponents = matrix.parts[f"{name}.steps"].float().repeat_interleave(32, 1).transpose(1, 2)
        return (table[levels] * 2**exponents).flatten(0, 1)
    zeros = torch.full((), form.offset)
    if form.offset < 0:
        zeros = matrix.parts[f"{name}.steps"].repeat_interleave(32, 1).transpose(1, 2)
    factors = (
        scale.view(panels, -1, form.factors, 32)
        .repeat_interleave(form.inputs, 1)
        .permute(2, 0, 3, 1)
    )
    if form.step_inputs and form.offset >= 0:
        steps = matrix.parts[f"{name}.steps"].float().view(panels, -1, form.factors, 32)
        factors = factors * steps.repeat_interleave(form.step_inputs, 1).permute(2, 0, 3, 1)
    weight = (levels - zeros).float() * factors[0]
    return (weight if form.offset else weight + factors[1]).flatten(0, 1)


def packed(variant, weights, count=1):
    inputs = weights[0].shape[1] // weights[0].form.bytes * weights[0].form.inputs
    form = MatrixForm("fp32", inputs, sum(map(len, weights)) // count, count)
    read = lambda: [Affine(weight, None) for weight in weights]  # noqa: E731
    return NativeMatrix.packed(compiled.kernels(variant), "", form, read)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("variant", BUILT)
def test_panels_hold_every_weight_as_it_is(variant, name):
    for outputs, inputs in (1, 256), (70, 768):
        rows = random_rows(name, outputs, inputs)
        matrix = packed(variant, [rows])
        assert matrix.form.kind == "stored"
        assert torch.equal(weights_of(matrix, name), F.pad(plain(rows), (0, 0, 0, -outputs % 32)))


@pytest.mark.parametrize("variant", BUILT)
def test_a_matrix_of_several_types(variant):
    first = random_rows("Q4_K", 64, 256)
    second = random_rows("Q6_K", 32, 256)
    third = random_rows("Q4_K", 40, 256, seed=1)
    joined = packed(variant, [first, second, third])
    assert joined.form.types == ("Q4_K",) * 2 + ("Q6_K",) + ("Q4_K",) * 2
    assert torch.equal(weights_of(joined, "Q6_K"), plain(second))
    assert torch.equal(weights_of(joined, "Q4_K")[:104], torch.cat([plain(first), plain(third)]))
    alternating = packed(variant, [first, random_rows("Q8_0", 64, 256)], 2)
    assert alternating.form.types == ("Q4_K", "Q8_0") * 2
    assert torch.equal(weights_of(alternating, "Q4_K"), plain(first))
    alike = packed(variant, [first, third[:40].repeat(2, 1)[:64]], 2)
    assert torch.equal(
        weights_of(alike, "Q4_K").view(2, 2, 32, 256)[:, 0].flatten(0, 1), plain(first)
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_the_rows_of_some_tokens(name):
    kernels = compiled.kernels()
    if kernels is None:
        pytest.skip("no kernels here")
    rows = random_rows(name, 100, 512)
    few = packed(kernels.variant, [rows]).rows_of(DraftVocabulary(100, 33, list(range(99, -1, -1))))
    assert torch.equal(weights_of(few, name)[:33], plain(rows)[torch.arange(99, 66, -1)])


def stored_model(model_type, types, **changes):
    """A model of random rows of blocks, the types in turns, as the weights that they stand for; and
    the rows by name.
    """
    model = tiny_model(model_type, torch.float32, **WIDE, **changes)
    rows = {}
    turn = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("embed" not in name or model.config.tie_word_embeddings):
            rows[name] = random_rows(types[turn % len(types)], *parameter.shape, seed=turn)
            parameter.data = plain(rows[name])
            turn += 1
    return model, rows


IDS = torch.tensor([[5, 9, 33, 61, 2, 17, 40, 8, 12]])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "starcoder2"])
@pytest.mark.parametrize("types", [("Q4_1",), ("Q4_K", "Q4_K", "Q6_K"), tuple(FORMS)])
def test_products_are_those_of_the_weights_in_fp32(model_type, types):
    """Phi-3 has fused projections, qwen2 and starcoder2 biases, starcoder2 no gate and a tied
    head.
    """
    native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    model, rows = stored_model(model_type, types)
    expected = logits_of(TorchBackend.of(stored_model(model_type, types)[0]), IDS)
    kept = NativeBackend.of(model, stored=rows.get)
    assert kept.implementation.endswith("as stored)")
    assert {
        matrix.form.kind for matrix in (*kept._layers.layers[0].matrices, kept._head.matrix)
    } == {"stored"}
    found = logits_of(kept, IDS)
    require_near(found, expected, 5e-3)
    # A token alone has the bits that it has here
    assert torch.equal(found, logits_of(kept, IDS, range(1, IDS.shape[1])))


@pytest.mark.parametrize("missing", ["k_proj", "up_proj"])
def test_a_matrix_of_which_a_part_is_no_block_is_dequantised(missing):
    native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    model, rows = stored_model("llama", ("Q4_K", "Q8_0"))
    expected = logits_of(TorchBackend.of(stored_model("llama", ("Q4_K", "Q8_0"))[0]), IDS)
    kept = NativeBackend.of(model, stored=lambda name: None if missing in name else rows.get(name))
    kinds = [matrix.form.kind for matrix in kept._layers.layers[0].matrices]
    assert kinds == (
        ["fp32", "stored", "stored", "stored"]
        if missing == "k_proj"
        else ["stored", "stored", "fp32", "stored"]
    )
    require_near(logits_of(kept, IDS), expected, 5e-3)


def test_low_bits_that_were_asked_for_are_rounded_from_the_weights():
    native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    both = [
        NativeBackend.of(stored_model("llama", ("Q4_K",))[0], PackingConfig("int8"), stored=take)
        for take in (None, stored_model("llama", ("Q4_K",))[1].get)
    ]
    assert torch.equal(*(logits_of(backend, IDS) for backend in both))


def test_scales_that_are_not_finite_are_an_error():
    native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    model, rows = stored_model("llama", ("Q4_K",))
    broken = rows["model.layers.1.mlp.up_proj.weight"]
    broken[3, 2:4] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds infinity"
    ):
        NativeBackend.of(model, stored=rows.get)


def test_reports_count_the_bytes_that_are_stored():
    native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    model, rows = stored_model("llama", ("Q4_K",), vocab_size=96)
    backend = NativeBackend.of(model, stored=rows.get)
    norms = (2 * WIDE["num_hidden_layers"] + 1) * WIDE["hidden_size"]
    assert backend.bytes_read == 4.625 / 8 * (backend.spec.weights_read(1) - norms)
    chosen = NativeBackend.of(
        tiny_model(
            "mixtral", torch.float32, **WIDE | {"num_experts_per_tok": 2, "num_local_experts": 8}
        )
    )
    # Routers and norms are small
    assert chosen.bytes_read == pytest.approx(4 * chosen.spec.weights_read(1), rel=0.05)
