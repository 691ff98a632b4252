"""Models by hub ids, adapters, and `layerskip import` of folders and adapters, with what lies
beside their weights.
"""

import json
import os
import shutil
import subprocess

import huggingface_hub
import pytest
import torch
from command_line import COMMAND, fails, run, words
from conftest import edit_json
from exit_block_models import add_blocks, add_eagle3
from safetensors.torch import load_file, save_file

from layerskip_core.calibration import calibrate
from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.locate import ModelRef
from layerskip_core.checkpoint.open import for_decoding, for_training, token_order
from layerskip_core.checkpoint.save import save_sidecar
from layerskip_core.checkpoint.transformers_read import stored_dtype
from layerskip_core.config.model import CalibrationConfig
from layerskip_core.errors import CheckpointError
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.vocabulary import ORDER_FILE


def test_a_folder_is_written_in_the_precision_asked_for(checkpoint, tmp_path):
    output = str(tmp_path / "half")
    assert "in bfloat16" in run(f"import {checkpoint} --output {output} --dtype bf16").err
    original = for_training(checkpoint, "cpu", "fp32")
    imported = for_training(output, "cpu", "fp32")
    assert imported.info.prompt_template == original.info.prompt_template
    for name, weight in original.model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], weight.bfloat16().float()), name
    fails(
        f"--output {output} already holds a model; give --overwrite to replace it, or another folder",
        f"import {checkpoint} --output {output}",
    )


@pytest.fixture
def with_drafter_layers(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "with-blocks")
    add_blocks(folder, ExitBlock(2))
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_exit_blocks_go_with_the_weights_that_they_were_trained_for(
    with_drafter_layers, tmp_path, dtype
):
    output = tmp_path / "imported"
    done = run(f"import {with_drafter_layers} --output {output} --dtype {dtype}")
    assert done.code == 0 and "left out" not in done.err
    assert (output / EXIT_BLOCKS_FILE).read_bytes() == (
        with_drafter_layers / EXIT_BLOCKS_FILE
    ).read_bytes()
    assert EXIT_BLOCKS_FILE in read_info(output).files and read_info(output).details[
        "exit_blocks"
    ] == {"2": {"agreement": 0.75}}
    assert list(for_decoding(str(output), "cpu").backend.exit_blocks) == [2]
    # Onto itself
    assert run(f"import {output} --output {output} --overwrite").code == 0
    assert list(for_decoding(str(output), "cpu").backend.exit_blocks) == [2]


def retrained(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, reason",
    [
        (retrained, "it was made from other weights than this model's"),
        (
            lambda folder: (folder / EXIT_BLOCKS_FILE).write_bytes(b""),
            "remove it, or make it again",
        ),
    ],
)
def test_exit_blocks_that_cannot_be_kept_are_left_out_aloud(
    with_drafter_layers, tmp_path, change, reason
):
    change(with_drafter_layers)
    output = tmp_path / "imported"
    done = run(f"import {with_drafter_layers} --output {output}")
    told, wrote = done.err.splitlines()
    assert (
        told.startswith(f"left out: {with_drafter_layers / EXIT_BLOCKS_FILE} cannot be used: ")
        and reason in told
    )
    assert (done.code, done.out) == (0, "") and wrote.startswith("wrote ")
    assert (
        not (output / EXIT_BLOCKS_FILE).exists() and "exit_blocks" not in read_info(output).details
    )
    assert not for_decoding(str(output), "cpu").backend.exit_blocks


def test_calibrated_int4_weights_go_with_the_weights_that_they_were_made_from(wide, tmp_path):
    calibrate(CalibrationConfig(str(wide), samples=2))
    output = tmp_path / "imported"
    assert "left out" not in run(f"import {wide} --output {output}").err
    assert (output / INT4_FILE).read_bytes() == (wide / INT4_FILE).read_bytes()
    retrained(wide)
    assert (
        f"left out: {wide / INT4_FILE} cannot be used: "
        in run(f"import {wide} --output {output} --overwrite").err
    )
    assert (
        not (output / INT4_FILE).exists()
        and INT4_FILE not in json.loads((output / "layerskip.json").read_text())["files"]
    )


def adapter(folder, base, rank=4, **changes):
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "task_type": "CAUSAL_LM",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_circle_of_adapters(tmp_path):
    first = adapter(tmp_path / "first", tmp_path / "second")
    second = adapter(tmp_path / "second", tmp_path / "first")
    alone = adapter(tmp_path / "alone", tmp_path / "alone")
    for folder in (first, second, alone):
        for load in (for_training, stored_dtype):
            with pytest.raises(
                CheckpointError,
                match=r"adapter_config\.json names a base that needs this adapter itself",
            ):
                load(str(folder))


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, "not valid JSON"),
        ("{}", "base_model_name_or_path must be the name of a model, got None"),
        (
            '{"base_model_name_or_path": 7}',
            "base_model_name_or_path must be the name of a model, got 7",
        ),
    ],
)
def test_damaged_adapters(tmp_path, content, message):
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/adapter_config\.json: {message}"):
        for_training(str(tmp_path))


def test_an_adapter_without_one_of_its_weights(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        for_training(checkpoint, "cpu", "fp32").model, LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=checkpoint)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    message = r"the adapter is incomplete: 1 weights are missing, .*q_proj\.lora_B\.weight the"
    with pytest.raises(CheckpointError, match=message):
        for_training(str(tmp_path), "cpu")


def test_an_adapter_on_an_adapter_is_merged_into_both(checkpoint, tmp_path, capfd):
    from peft import LoraConfig, get_peft_model

    base = for_training(checkpoint, "cpu", "fp32")
    expected = base.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    below = checkpoint
    for name in ("inner", "outer"):
        torch.manual_seed(len(name) + ord(name[0]))
        model = get_peft_model(
            for_training(checkpoint, "cpu", "fp32").model,
            LoraConfig(r=2, target_modules=["q_proj"]),
        )
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        expected += layer.get_delta_weight("default").detach()
        model.peft_config["default"].base_model_name_or_path = below
        model.save_pretrained(tmp_path / name)
        base.tokenizer.save_pretrained(tmp_path / name)
        below = str(tmp_path / name)
    capfd.readouterr()
    merged = for_training(below, "cpu", "fp32").model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, expected)
    assert capfd.readouterr() == ("", "")


TEMPLATE = "ask: {prompt}\n"


@pytest.fixture
def snapshot(checkpoint, tmp_path, monkeypatch):
    """The files of team/model: a model with a drafter and a template."""
    folder = shutil.copytree(
        checkpoint, tmp_path / "hub" / "models--team--model" / "snapshots" / "1f"
    )
    add_eagle3(folder)
    info = json.loads((folder / "layerskip.json").read_text())
    (folder / "layerskip.json").write_text(json.dumps(info | {"prompt_template": TEMPLATE}))
    (folder.parents[1] / "refs").mkdir()
    for name in ("main", "v2"):
        (folder.parents[1] / "refs" / name).write_text("1f")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return folder


def test_a_model_from_the_hub_has_what_lies_beside_its_weights(snapshot, tmp_path):
    edit_json(snapshot / "generation_config.json", do_sample=True, temperature=0.5)
    decoder = for_decoding("team/model", "cpu")
    assert decoder.own_sampling == {"temperature": 0.5}
    assert decoder.name == "team/model" and decoder.template.text == TEMPLATE
    assert "eagle3" in decoder.backend.drafters and decoder.info.exit_layer == 1
    assert for_training("team/model", "cpu").info == decoder.info
    told = run(f"export team/model --exit 1 --engine vllm --output {tmp_path}/draft")
    assert "vllm serve team/model " in told.out
    # Below the folder where it is given
    assert run("import", "team/model", "--output team/model").code == 0
    assert "eagle3" in for_decoding("./team/model", "cpu").backend.drafters


@pytest.mark.parametrize("name", ["team/model", "team/model@v2"])
def test_a_model_in_the_cache_of_the_hub_needs_no_network(snapshot, tmp_path, name):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [*COMMAND, *words(["generate --model", name, "hello", "--max-new-tokens 4 --stats"])]
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 0 and f"prompt template: {TEMPLATE!r}" in done.stderr


def test_a_revision_is_asked_of_the_hub_and_safetensors_are_needed(snapshot, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *name, **how: asked.append((*name, how["revision"])) or str(snapshot),
    )
    assert ModelRef.of("team/model@refs/pr/1").fetched().folder == str(snapshot)
    assert ModelRef.of("team/model").fetched().folder == str(snapshot)
    assert asked == [("team/model", "refs/pr/1"), ("team/model", None)]
    wrong = run("generate", "x", "--model team/model --revision v2")
    assert wrong.code == 2 and "--model ID@REVISION" in wrong.err
    (snapshot / "model.safetensors").unlink()
    assert ModelRef.of("team/model").fetched().folder is None


def test_an_adapters_weights_are_not_those_of_the_blocks_of_its_base(with_drafter_layers, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(with_drafter_layers), config
    ).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(with_drafter_layers / name, tmp_path / "adapter")
    done = run(f"import {tmp_path}/adapter --output {tmp_path}/merged")
    assert done.err.startswith(
        f"left out: {with_drafter_layers / EXIT_BLOCKS_FILE} cannot be used: it was made from other weights"
    )
    assert done.code == 0 and not (tmp_path / "merged" / EXIT_BLOCKS_FILE).exists()


def test_the_drafter_s_agreement_and_the_order_of_tokens_go_with_the_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "drafting")
    output = tmp_path / "imported"
    add_eagle3(folder)
    save_sidecar(
        str(folder),
        ORDER_FILE,
        b"[7,3]",
        lambda info: info.with_exit_blocks({"eagle3": {"agreement": 0.75}}),
    )
    assert run(f"import {folder} --output {output}").code == 0
    assert read_info(output).details["exit_blocks"] == {"eagle3": {"agreement": 0.75}}
    assert token_order(output, 300) == [7, 3] and ORDER_FILE in read_info(output).files
    another = f"--drafter {folder}/eagle3"
    assert run(f"import {output} --output {output} --overwrite", another).code == 0
    assert "exit_blocks" not in read_info(output).details  # the agreement was another's
