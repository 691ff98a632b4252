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
    for name in ("main", "v2"):
        (folder.parents[1] / "refs" / name).write_text("1f")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return folder


def test_a_model_from_the_hub_has_what_lies_beside_its_weights(snapshot, tmp_path):
    edit_json(snapshot / "generation_config.json", do_sample=True, temperature=0.5)
    decoder = for_decoding("team/model", "cpu")
    assert decoder.own_sampling == {"temperature": 0.5}
    assert decoder.name == "team/model" and decoder.template.text == TEMPLATE
    assert decoder.backend.eagle3 is not None and decoder.info.exit_layer == 1
    assert for_training("team/model", "cpu").info == decoder.info
    told = run("export", "team/model", "--exit", "1", "--engine", "vllm", "--output", str(tmp_path / "draft"))
    assert "vllm serve team/model " in told.out
    assert run("import", "team/model", "--output", "team/model").code == 0  # below the folder where it is given
    assert for_decoding("./team/model", "cpu").backend.eagle3 is not None


def test_a_model_without_safetensors_is_left_to_transformers(snapshot):
    (snapshot / "model.safetensors").unlink()
    assert present("team/model").folder is None


@pytest.mark.parametrize("name", ["team/model", "team/model@v2"])
def test_a_model_in_the_cache_of_the_hub_needs_no_network(snapshot, tmp_path, name):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [*COMMAND, "generate", "--model", name, "hello", "--max-new-tokens", "4", "--stats"]
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 0 and f"prompt template: {TEMPLATE!r}" in done.stderr


def test_a_revision_is_asked_of_the_hub(snapshot, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *name, **how: asked.append((*name, how["revision"])) or str(snapshot)
    )
    assert present("team/model@refs/pr/1").folder == str(snapshot)
    assert present("team/model").folder == str(snapshot)
    assert asked == [("team/model", "refs/pr/1"), ("team/model", None)]
    wrong = run("generate", "x", "--model", "team/model", "--revision", "v2")
    assert wrong.code == 2 and "--model ID@REVISION" in wrong.err


class Hub:
    """Of huggingface_hub.HfApi what a push calls."""

    uploads, refused = [], False

    def create_repo(self, repository, exist_ok):
        if repository != "me/mine":
            raise OSError("401 Client Error\nand more")

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        if self.refused:
            raise OSError("the network is down")
        self.uploads.append((repo_id, folder_path, allow_patterns))


def test_a_result_is_pushed_if_the_repository_is_ours(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out, short = tmp_path / "out", ("--steps", "1", "--batch-size", "2", "--samples", "2", "--threads", "1")
    command = ("finetune", "--model", checkpoint, *short, "--output", str(out), "--overwrite", "--push-to-hub")
    refused = run(*command, "other/theirs")
    assert refused.code == 1 and refused.err.splitlines()[-1] == "error: --push-to-hub other/theirs: 401 Client Error"
    assert not (out / "config.json").exists()
    assert run(*command, "me/mine").code == 0
    [(repository, folder, files)] = Hub.uploads
    assert (repository, folder) == ("me/mine", str(out)) and {"model.safetensors", "exit_blocks.safetensors"} <= set(files)
    monkeypatch.setattr(Hub, "refused", True)
    failed = run(*command, "me/mine")
    assert failed.code == 1 and failed.err.endswith(
        f"the network is down; it is saved; upload it by: hf upload me/mine {out}\n"
    )
    assert (out / "config.json").exists()
