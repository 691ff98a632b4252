"""`layerskip export --format packed`: what it writes decodes to the same bits as the model packed
at load.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from command_line import fails, run
from conftest import CHANGES, OWN_LAYERS, older, run_texts, tiny_model
from evaluating import tiny_loaded
from exit_block_models import add_blocks, add_eagle3, add_int4
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.folder import PACKED_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint, save_sidecar
from layerskip_core.config.model import ExportConfig, PackingConfig
from layerskip_core.errors import CheckpointError, shown
from layerskip_core.export.run import export_packed
from layerskip_core.model import NativeBackend, native
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.native import compiled
from layerskip_core.model.native.compiled import VARIANTS
from layerskip_core.model.vocabulary import ORDER_FILE

pytestmark = pytest.mark.skipif(
    compiled.kernels() is None, reason="no kernels were built here, or the CPU lacks what they need"
)
IDS = torch.tensor([[5, 9, 33, 7, 120]])


def add_two_blocks(folder):
    add_blocks(folder, ExitBlock(2), ExitBlock(4))


def packed_from(folder, output, quantize=None, dtype="auto"):
    return export_packed(
        ExportConfig(
            str(folder), output=str(output), format="packed", quantize=quantize, dtype=dtype
        )
    )


def states(backend):
    """Of every layer, the logits of the target, of each draft side, and of each block by itself."""
    with torch.inference_mode():
        hidden = backend.embed(IDS)
        found = [hidden]
        for side in backend.draft_sides.values():
            drafted = run_texts(side.layers, side.layers.embed(IDS), 0, 2)
            found += [drafted, side.whole.unembed(drafted), side.at_exits.unembed(drafted)]
            for block in side.exit_blocks.values():
                found.append(
                    block.head(run_texts(side.layers, drafted, block.layer, block.layer + 1))
                )
        for layer in range(backend.num_layers):
            hidden = run_texts(backend, hidden, layer, layer + 1)
            found.append(hidden)
        for drafter in backend.drafters.values():
            found.append(
                drafter.head(drafter.features(backend, dict.fromkeys(range(1, 6), hidden), hidden))
            )
        return [*found, backend.unembed(hidden)]


def assert_same(packed, plain):
    assert (
        isinstance(packed.backend, NativeBackend)
        and packed.backend.implementation == plain.backend.implementation
    )
    assert packed.backend.draft_sides.keys() == plain.backend.draft_sides.keys()
    assert packed.backend.exit_blocks.keys() == plain.backend.exit_blocks.keys()
    assert packed.backend.drafters.keys() == plain.backend.drafters.keys()
    ours = states(packed.backend)
    theirs = states(plain.backend)
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert (packed.eos_ids, packed.template, packed.info.strategy) == (
        plain.eos_ids,
        plain.template,
        plain.info.strategy,
    )


SETTINGS = {
    "fp32": (None, "fp32", PackingConfig(adaptive=True)),
    "bf16": (None, "bf16", PackingConfig(adaptive=True)),
    "int8": ("int8", "bf16", PackingConfig("int8")),
    "int4": ("int4", "fp32", PackingConfig("int4")),
    "int4 of bf16": ("int4", "bf16", PackingConfig("int4")),
}


def add_experts(folder):
    """Makes the model one with experts in all layers but the second."""
    loaded = tiny_loaded(torch.float32)
    changes = {
        **CHANGES["qwen3_moe"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 32,
    }
    sizes = {
        "vocab_size": len(loaded.tokenizer),
        "eos_token_id": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    model = tiny_model("qwen3_moe", torch.float32, **changes, **sizes)
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(folder), torch.float32)
    add_two_blocks(folder)


@pytest.mark.parametrize(
    "prepare",
    [None, add_int4, add_two_blocks, add_eagle3, older, add_experts],
    ids=["plain", "calibrated", "blocks", "eagle3", "older", "experts"],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_bits_are_those_of_the_model_packed_at_load(wide, tmp_path, setting, prepare):
    quantize, dtype, packing = SETTINGS[setting]
    if prepare is add_int4:
        add_int4(wide, lambda weight: 0.9 * weight)
    elif prepare is not None:
        prepare(wide)
    written = packed_from(wide, tmp_path / "packed", quantize, dtype)
    assert ("calibrated" in written[0]) == (prepare is add_int4 and setting != "int8")
    asked = replace(packing, quantize=None)  # what was packed is known
    assert_same(
        for_decoding(str(tmp_path / "packed"), packing=asked),
        for_decoding(str(wide), "cpu", dtype, packing),
    )


@pytest.mark.skipif(
    not getattr(compiled.kernels(), "widens_bf16", False), reason="kernels with bf16 of their own"
)
def test_fp32_weights_that_bf16_holds_are_packed_in_bf16(wide, tmp_path, monkeypatch):
    packed_from(wide, tmp_path / "before", dtype="fp32")
    weights = load_file(wide / "model.safetensors")
    save_file(
        {name: weight.bfloat16().float() for name, weight in weights.items()},
        wide / "model.safetensors",
        {"format": "pt"},
    )
    packed_from(wide, tmp_path / "packed", dtype="fp32")
    folder = str(tmp_path / "packed")
    packing = PackingConfig(adaptive=True)
    assert_same(
        for_decoding(folder, packing=packing), for_decoding(str(wide), "cpu", "fp32", packing)
    )
    sizes = [(tmp_path / name / PACKED_FILE).stat().st_size for name in ("before", "packed")]
    assert sizes[1] < 0.75 * sizes[0]
    monkeypatch.setattr(compiled.kernels(), "widens_bf16", False)
    with pytest.raises(CheckpointError, match="export it again"):
        for_decoding(folder)


@pytest.mark.parametrize(
    "model_type",
    ["qwen2", "phi3", "starcoder2", "gemma3_text", "olmo2", "gpt2", "phi", "apertus", *OWN_LAYERS],
)
def test_architectures_with_biases_fused_projections_and_other_norms(tmp_path, model_type):
    """And with a tied head; with learned positions, and numbers in activations."""
    loaded = tiny_loaded(torch.float32)
    widths = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 300}
    ropes = {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
        }
    }
    model = tiny_model(
        model_type,
        torch.float32,
        tie_word_embeddings=True,
        **widths,
        **(ropes if model_type == "phi3" else {}),
    )
    save_checkpoint(model, loaded.tokenizer, loaded.info, str(tmp_path / "plain"), torch.float32)
    packed_from(tmp_path / "plain", tmp_path / "packed", "int8", "bf16")
    plain = for_decoding(str(tmp_path / "plain"), "cpu", "bf16", PackingConfig("int8"))
    assert_same(for_decoding(str(tmp_path / "packed")), plain)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_draft_vocabularies_are_rows_of_the_packed_head(wide, tmp_path, quantize, ordered):
    """Also where neither they nor the vocabulary fill panels of 32 rows."""
    if ordered:
        save_sidecar(str(wide), ORDER_FILE, json.dumps([7, 299, 33, 120, 5]).encode())
    for dtype in ("fp32", "bf16"):
        packed_from(wide, tmp_path / dtype, quantize, dtype)
        packing = PackingConfig(quantize, draft_vocab=45)
        assert_same(
            for_decoding(str(tmp_path / dtype), packing=packing),
            for_decoding(str(wide), "cpu", dtype, packing),
        )


def test_what_saved_policies_draft_with_is_packed_too(wide, tmp_path):
    info = read_info(wide)
    policy = {
        "strategy": "self-speculative",
        "exit_layer": 2,
        "num_draft_tokens": 4,
        "draft_weights": "int4",
    }
    policy |= {"draft_head": "int4", "draft_vocab": 64}
    (wide / "layerskip.json").write_text(replace(info, policies={"exact": policy}).to_json())
    assert packed_from(wide, tmp_path / "packed", dtype="bf16")[0] == "bf16 with int4 for drafts"
    plain = for_decoding(str(wide), "cpu", "bf16", policies=["exact"])
    assert_same(for_decoding(str(tmp_path / "packed"), policies=["exact"]), plain)


def test_commands_decode_with_it_and_training_refuses_it(checkpoint, tmp_path):
    output = str(tmp_path / "packed")
    done = run(f"export {checkpoint} --format packed --output {output}")
    size = (tmp_path / "packed" / PACKED_FILE).stat().st_size
    assert (done.code, done.out) == (0, "")
    assert done.err == f"wrote {checkpoint}, packed in fp32, to {output}: {size / 1e6:,.1f} MB\n"
    prompt = ("set an alarm", "--max-new-tokens 8")
    assert run("generate", *prompt, f"--model {output}") == run(
        "generate", *prompt, f"--model {checkpoint}"
    )
    info = read_info(output)
    assert (
        info.exit_layer == 1
        and info.details["packed_from"] == checkpoint
        and PACKED_FILE in info.files
    )
    refused = (
        f"cannot load model {output}: needed the weights of a model, found {PACKED_FILE}, which only decoding can use: "
        "give the model that it was packed from"
    )
    fails(refused, f"finetune --model {output} --output {tmp_path}/trained")
    fails(refused, f"calibrate --model {output}")
    fails(refused, f"export {output} --format packed --output {tmp_path}/again")
    assert run(f"export {checkpoint} --exit 2 --output {output} --overwrite").code == 0
    assert not (tmp_path / "packed" / PACKED_FILE).exists()


@pytest.fixture
def packed(wide, tmp_path):
    packed_from(wide, tmp_path / "packed", "int4", "bf16")
    return tmp_path / "packed"


def test_what_was_not_packed_is_one_error(wide, packed, tmp_path):
    generate = ("generate", "a", f"--model {packed}")
    fails(
        "--dtype must be auto or bf16, as the model was packed, got fp32", *generate, "--dtype fp32"
    )
    own = f"export {wide} --format packed --output {wide} --overwrite"
    fails(f"--output must be another folder than the model's, got {shown(wide)}", own)


def test_the_kernels_variants_share_the_file(packed, wide, monkeypatch):
    for variant in VARIANTS:
        if (chosen := compiled.kernels(variant)) is not None:
            monkeypatch.setattr(native, "kernels", lambda chosen=chosen: chosen)
            assert_same(
                for_decoding(str(packed)),
                for_decoding(str(wide), "cpu", "bf16", PackingConfig("int4")),
            )
            assert f"native ({variant}, int4)" in for_decoding(str(packed)).backend.implementation


def test_damaged_and_foreign_files_are_one_error(packed, wide):
    path = packed / PACKED_FILE
    whole = path.read_bytes()

    def refused(content, reason):
        path.write_bytes(content)
        done = run("generate", "a", f"--model {packed}")
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert (
            done.err.startswith(f"error: cannot load model {packed}: {path} cannot be used: ")
            and reason in done.err
        )
        assert done.err.endswith("; export the model again with `--format packed`\n")

    refused(whole[:-1], "")
    refused(b"", "")
    refused((wide / "model.safetensors").read_bytes(), "its format must be layerskip packed 1")
    refused(whole.replace(b'"layout":"2"', b'"layout":"1"'), "its layout must be 2, found 1")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(
        whole,
        "int4.layers.0.up.weight must be ('U8', (8, 2, 4, 32, 4)), as config.json says, found ('U8', (6, 2, 4",
    )


@pytest.mark.parametrize("packing", [PackingConfig(adaptive=True), PackingConfig(draft_vocab=40)])
def test_bf16_takes_12_bits_in_files_too(wide, tmp_path, monkeypatch, packing):
    plain = for_decoding(str(wide), "cpu", "bf16", packing)
    monkeypatch.setattr(native, "LEAST_CODED", 0)
    packed_from(wide, tmp_path / "coded", dtype="bf16")
    coded = for_decoding(str(tmp_path / "coded"), packing=packing)
    assert "bf16 in 12 bits" in coded.backend.implementation
    assert_same(coded, for_decoding(str(wide), "cpu", "bf16", packing))
    assert all(map(torch.equal, states(coded.backend), states(plain.backend)))


def test_damaged_exceptions_are_one_error(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LEAST_CODED", 0)
    packed_from(wide, tmp_path / "coded", dtype="bf16")
    path = tmp_path / "coded" / PACKED_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    name = "bf16.layers.0.down.exceptions"
    end = weights[name][-1:]
    place = 1 << 16
    lists = [
        torch.tensor(3),
        end[:0],
        end - place,
        end + place,
        torch.cat((-end, end)),
        torch.cat((end, end)),
        torch.cat((end + place, end)),
        torch.cat((end // 2, end // 2 + 1, end)),
    ]
    for damaged in lists:
        save_file(weights | {name: damaged}, path, metadata)
        with pytest.raises(CheckpointError, match="export the model again"):
            for_decoding(str(tmp_path / "coded"))


def test_an_interrupted_export_leaves_nothing(wide, tmp_path):
    """Weights that are not finite are found while they are packed."""
    from safetensors.torch import load_file, save_file

    weights = load_file(wide / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "packed"
    done = run(f"export {wide} --format packed --output {output}")
    assert done.code == 1 and "the weight model.layers.4.mlp.down_proj.weight holds NaN" in done.err
    assert done.err.count("\n") == 1 and not output.exists()


def test_machines_without_kernels_are_told_so_and_a_folder_with_weights_is_not_packed(
    wide, packed, tmp_path, monkeypatch
):
    both = shutil.copytree(wide, tmp_path / "both")
    shutil.copy(packed / PACKED_FILE, both)
    assert "int4" not in for_decoding(str(both), "cpu").backend.implementation
    monkeypatch.setenv("LAYERSKIP_KERNELS", "torch")
    export = (f"export {wide} --format packed --output {tmp_path}/other",)
    for code, command in ((1, ("generate", "a", f"--model {packed}")), (2, export)):
        failed = run(*command)
        assert failed.code == code and "compiled kernels" in failed.err
        assert "LAYERSKIP_KERNELS is torch\n" in failed.err
