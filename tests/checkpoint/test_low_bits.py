"""Checkpoints of the hub in low bits: read as they are stored where the kernels have the form, else
dequantised with a note.
"""

import re

import pytest
import torch
from command_line import run
from conftest import edit_json, logits_of, require_near, tiny_model
from decodings import ids_of
from evaluating import tiny_loaded
from exit_block_models import add_blocks
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import CheckpointError
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.native.compiled import kernels

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
GROUP = 32
IDS = torch.tensor([[5, 9, 33, 61, 2, 17, 40, 8, 12]])
# AWQ: which of eight outputs a number's levels are of, from the lowest bits on
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def in_numbers(levels, bits=4, order=None):
    """(rows, columns) of levels as int32, the first column in the lowest bits."""
    columns = levels.unflatten(1, (-1, 32 // bits))
    columns = columns if order is None else columns[..., order]
    shifts = torch.arange(0, 32, bits)
    return (columns.long() << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def levels_of(weight, bits, middle, generator):
    """Random levels, zeros and scales (fp16) of groups; and the weight that they stand for."""
    outputs, inputs = weight.shape
    groups = inputs // GROUP
    top = 1 << bits
    levels = torch.randint(0, top, (outputs, inputs), generator=generator)
    zeros = torch.full((outputs, groups), top // 2)
    if not middle:
        zeros = torch.randint(top // 2 - 2, top // 2 + 2, (outputs, groups), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.8 / top + 0.1 / top).half()
    dense = (levels - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(
        GROUP, 1
    )
    return levels, zeros, scales, dense


def gptq(module, weight, generator, middle=True, bits=4):
    levels, zeros, scales, dense = levels_of(weight, bits, middle, generator)
    packed = {
        "qweight": in_numbers(levels, bits).T,
        "qzeros": in_numbers(zeros.T - 1, bits),
        "scales": scales.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return {f"{module}.{name}": part for name, part in packed.items()}, dense


def gptq_in_other_order(module, weight, generator):
    packed, dense = gptq(module, weight, generator)
    order = torch.randperm(weight.shape[1], generator=generator)
    groups = packed[f"{module}.g_idx"][order]
    scales = packed[f"{module}.scales"].float().T
    inverse = dense / scales.repeat_interleave(GROUP, 1) * scales[:, groups.long()]
    return {**packed, f"{module}.g_idx": groups}, inverse


def awq(module, weight, generator):
    levels, zeros, scales, dense = levels_of(weight, 4, False, generator)
    packed = {
        "qweight": in_numbers(levels.T, 4, NIBBLES),
        "qzeros": in_numbers(zeros.T, 4, NIBBLES),
        "scales": scales.T,
    }
    return {f"{module}.{name}": part for name, part in packed.items()}, dense


def compressed(module, weight, generator, middle=True, bits=4):
    levels, zeros, scales, dense = levels_of(weight, bits, middle, generator)
    packed = {
        "weight_packed": in_numbers(levels, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    packed |= {} if middle else {"weight_zero_point": in_numbers(zeros.T, bits).T}
    return {f"{module}.{name}": part for name, part in packed.items()}, dense


def compressed_int8(module, weight, generator):
    levels = torch.randint(-127, 128, weight.shape, generator=generator).to(torch.int8)
    scales = (torch.rand(len(weight), 1, generator=generator) / 300).half()
    return {f"{module}.weight": levels, f"{module}.weight_scale": scales}, levels * scales.float()


def fp8(module, weight, generator):
    narrow = weight.to(torch.float8_e4m3fn)
    scales = 0.5 + torch.rand(-(-len(weight) // 48), -(-weight.shape[1] // 48), generator=generator)
    wide = scales.repeat_interleave(-(-len(weight) // len(scales)), 0)[: len(weight)]
    wide = wide.repeat_interleave(-(-weight.shape[1] // scales.shape[1]), 1)[:, : weight.shape[1]]
    return {f"{module}.weight": narrow, f"{module}.weight_scale_inv": scales}, narrow.float() * wide


FORMS = {  # the method, what stores a projection, and the type of blocks that it becomes
    "GPTQ": ("gptq", gptq, "Q4_0"),
    "GPTQ with 8 bits": ("gptq", lambda *args: gptq(*args, bits=8), "Q8_0"),
    "GPTQ with zeros": ("gptq", lambda *args: gptq(*args, middle=False), "Q4_Z"),
    "GPTQ in another order": ("gptq", gptq_in_other_order, None),
    "AWQ": ("awq", awq, "Q4_Z"),
    "W4A16": ("compressed-tensors", compressed, "Q4_0"),
    "W4A16 with zeros": (
        "compressed-tensors",
        lambda *args: compressed(*args, middle=False),
        "Q4_Z",
    ),
    "W8A16": ("compressed-tensors", lambda *args: compressed(*args, bits=8), "Q8_0"),
    "W8A8": ("compressed-tensors", compressed_int8, "Q8_0"),
    "FP8": ("fp8", fp8, None),
}


def folder_of(model, path, method, store):
    """A checkpoint with the projections of layers in low bits; the model gets the weights that
    these stand for.
    """
    generator = torch.Generator().manual_seed(0)
    save_checkpoint(
        model, tiny_loaded().tokenizer, CheckpointInfo("{prompt}\n"), str(path), torch.float32
    )
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        stored, dense = store(name.removesuffix(".weight"), weights.pop(name), generator)
        weights |= {part: tensor.contiguous() for part, tensor in stored.items()}
        if (
            expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        ) is None:
            model.get_parameter(name).data = dense
        else:
            kind = "down_proj" if expert[3] == "down" else "gate_up_proj"
            rows = model.get_parameter(f"{expert[1]}.{kind}").data[int(expert[2])]
            (rows.chunk(2)[expert[3] == "up"] if kind == "gate_up_proj" else rows).copy_(dense)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", quantization_config={"quant_method": method, "bits": 4})
    return str(path)


def decoded_as(path, expected, kinds):
    """The model of a folder, whose logits are near the expected ones and whose matrices are blocks
    of these types.
    """
    decoder = for_decoding(path, "cpu", "fp32")
    require_near(logits_of(decoder.backend, IDS), expected, 5e-3)
    if kernels() is not None:
        matrices = [matrix for layer in decoder.backend._layers.layers for matrix in layer.matrices]
        assert {name for matrix in matrices for name in matrix.form.types} == kinds
    return decoder


@pytest.mark.parametrize("form", ["W4A16", "AWQ"])
def test_experts_stored_one_by_one(form, tmp_path):
    method, store, kind = FORMS[form]
    model = tiny_model("qwen3_moe", torch.float32, vocab_size=300, **WIDE, moe_intermediate_size=32)
    path = folder_of(model, tmp_path, method, store)
    with torch.no_grad():
        expected = model(IDS).logits
    decoder = decoded_as(path, expected, {kind})
    assert kernels() is None or not decoder.notes


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_are_stored(form, tmp_path):
    method, store, kind = FORMS[form]
    model = tiny_model("llama", torch.float32, vocab_size=300, **WIDE)
    path = folder_of(model, tmp_path, method, store)
    with torch.no_grad():
        expected = model(IDS).logits
    trainable = for_training(path, "cpu", "fp32")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            trainable.model.get_parameter(name), weight, atol=1e-7, rtol=1e-6
        )
    assert not hasattr(trainable.model.config, "quantization_config")
    decoder = decoded_as(path, expected, {kind} - {None})
    note = f"{42} weights in {method} were dequantised: the kernels have no form for them"
    assert kernels() is None or decoder.notes == (() if kind else (note,))


def test_gpt_oss_as_it_is_published(tmp_path):
    """Two levels that follow one another in a byte, the lower half first; rows of gate and up in
    turns.
    """
    model = tiny_model("gpt_oss", torch.float32, vocab_size=300, hidden_size=64)
    save_checkpoint(
        model, tiny_loaded().tokenizer, CheckpointInfo("{prompt}\n"), str(tmp_path), torch.float32
    )
    weights = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [
        name
        for name in weights
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")
    ]:
        experts, inputs, outputs = weights.pop(name).shape
        levels = torch.randint(
            0, 16, (experts, outputs, inputs), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(
            119, 123, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8
        )
        pairs = levels.unflatten(2, (-1, 16, 2))
        weights |= {f"{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scales": scales}
        dense = (
            torch.where(levels > 7, -1, 1)
            * MXFP4[levels.long() % 8]
            * 2.0 ** (scales.repeat_interleave(32, 2).float() - 127)
        )
        model.get_parameter(name).data = dense.transpose(1, 2).contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    with torch.no_grad():
        expected = model(IDS).logits
    for name, weight in for_training(str(tmp_path), "cpu", "fp32").model.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    decoder = for_decoding(str(tmp_path), "cpu", "fp32")
    require_near(logits_of(decoder.backend, IDS), expected, 5e-3)
    if kernels():
        types = [matrix.form.types[:1] for matrix in decoder.backend._layers.layers[0].matrices]
        assert types == [(), (), ("MXFP4",), ("MXFP4",)] and decoder.notes == ()
    done = run("generate", "wake me up", f"--model {tmp_path} --max-new-tokens 8 --stats")
    assert done.code == 0 and ("as stored" in done.err or not kernels())


@pytest.mark.parametrize(
    "missing, message",
    [
        ("qweight", r"1 weights are missing, model\.layers\.2\.mlp\.up_proj\.weight the first"),
        (
            "scales",
            r"up_proj\.scales is missing, which model\.layers\.2\.mlp\.up_proj\.weight in gptq needs",
        ),
    ],
)
def test_a_part_of_a_projection_that_is_missing(missing, message, tmp_path):
    path = folder_of(
        tiny_model("llama", torch.float32, vocab_size=300, **WIDE), tmp_path, "gptq", gptq
    )
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"model.layers.2.mlp.up_proj.{missing}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        for_decoding(path, "cpu", "fp32")


def test_an_exit_block_beside_them_drafts(tmp_path):
    """In the model's precision: the files have no levels of it."""
    method, store, _ = FORMS["GPTQ"]
    path = folder_of(
        tiny_model("llama", torch.float32, vocab_size=300, **WIDE), tmp_path, method, store
    )
    add_blocks(tmp_path, ExitBlock(2))
    backend = for_decoding(path, "cpu", "fp32").backend
    found = []
    for strategy in ("autoregressive", "self-speculative"):
        config = DecodingConfig(strategy, exit_layer=2, num_draft_tokens=3, max_new_tokens=12)
        found.append(ids_of(decode(backend, IDS[0].tolist(), config)))
    assert found[0] == found[1] and [*backend.exit_blocks] == [2]
