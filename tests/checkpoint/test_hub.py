"""Models by hub ids: a folder in the layout of the hub's cache stands for the hub."""

import json
import os
import shutil
import subprocess

import huggingface_hub
import pytest
from command_line import COMMAND, run
from conftest import edit_json
from exit_block_models import add_eagle3

from layerskip_core.checkpoint.locate import present
from layerskip_core.checkpoint.open import for_decoding, for_training

TEMPLATE = "ask: {prompt}\n"


@pytest.fixture
def snapshot(checkpoint, tmp_path, monkeypatch):
    """The files of team/model: a model with a drafter and a template."""
    folder = shutil.copytree(checkpoint, tmp_path / "hub" / "models--team--model" / "snapshots" / "1f")
    add_eagle3(folder)
    info = json.loads((folder / "layerskip.json").read_text())
    (folder / "layerskip.json").write_text(json.dumps(info | {"prompt_template": TEMPLATE}))
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("1f")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return folder


def test_a_model_from_the_hub_has_what_lies_beside_its_weights(snapshot, tmp_path):
    edit_json(snapshot / "generation_config.json", do_sample=True, temperature=0.5)
    decoder = for_decoding("team/model", "cpu")
    assert decoder.own_sampling == {"temperature": 0.5}
    assert decoder.name == "team/model" and decoder.template.text == TEMPLATE
    assert decoder.backend.eagle3 is not None and decoder.info.exit_layer == 1
    assert for_training("team/model", "cpu").info == decoder.info
    assert run("import", "team/model", "--output", str(tmp_path / "imported")).code == 0
    assert for_decoding(str(tmp_path / "imported"), "cpu").backend.eagle3 is not None
    told = run("export", "team/model", "--exit", "1", "--engine", "vllm", "--output", str(tmp_path / "draft"))
    assert "vllm serve team/model " in told.out


def test_a_model_without_safetensors_is_left_to_transformers(snapshot):
    (snapshot / "model.safetensors").unlink()
    assert present("team/model").folder is None


def test_a_model_in_the_cache_of_the_hub_needs_no_network(snapshot, tmp_path):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [*COMMAND, "generate", "--model", "team/model", "hello", "--max-new-tokens", "4", "--stats"]
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 0 and f"prompt template: {TEMPLATE!r}" in done.stderr
