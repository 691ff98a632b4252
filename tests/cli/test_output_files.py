"""Whose files an output folder holds: only those of a model of ours are replaced, and what is in
the way is told first.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import fails, run

from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.save import RUN_FILES, model_files, write_info
from layerskip_core.errors import CheckpointError

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
LISTED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "layerskip.json",
    *TOKENIZER,
}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def imported(checkpoint, output, *arguments):
    return run(f"import {checkpoint} --output {output}", *arguments)


@pytest.fixture
def model(checkpoint, tmp_path):
    folder = tmp_path / "model"
    assert imported(checkpoint, folder).code == 0
    return folder


@pytest.mark.parametrize(
    "name, text",
    [
        ("model.safetensors", "mine"),
        ("additional_chat_templates/tools.jinja", "mine"),
        ("config.json", "{}"),
    ],
)
def test_files_of_others_are_in_the_way_before_any_work(tmp_path, name, text):
    """The model does not exist: nobody has looked for it yet."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    told = f"--output {tmp_path}/out: in the way is {name}, which layerskip did not write; move it away, or give another folder"
    for command in (("import", "no/model"), ("finetune --threads 1 --model no/model",)):
        fails(told, *command, f"--output {tmp_path}/out --overwrite")
    assert contents(tmp_path) == {f"out/{name}": text.encode()}


def test_finetune_asks_for_what_it_writes_too(tmp_path):
    for name in RUN_FILES:
        (tmp_path / name).write_text("mine")
        told = f"--output {tmp_path}: in the way is {name}, which layerskip did not write; move it away, or give another folder"
        fails(told, f"finetune --threads 1 --model no/model --output {tmp_path}")
        assert contents(tmp_path) == {name: b"mine"}
        (tmp_path / name).unlink()


def test_a_folder_is_in_the_way_even_under_a_name_of_ours(model):
    """It would break --overwrite when the old model is gone."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    told = f"--output {model}: in the way is model.safetensors, which layerskip did not write; "
    fails(
        f"{told}move it away, or give another folder",
        f"import no/model --output {model} --overwrite",
    )
    assert (model / "model.safetensors").is_dir() and (model / "config.json").exists()


def test_files_that_no_loader_reads_stay(checkpoint, tmp_path):
    folder = tmp_path / "out"
    (folder / "notes").mkdir(parents=True)
    mine = dict.fromkeys(
        ("notes.txt", "README.md", "notes/model.safetensors", "weights.bin", "config.yaml"), "mine"
    )
    for name, text in mine.items():
        (folder / name).write_text(text)
    assert imported(checkpoint, folder).code == 0
    assert imported(checkpoint, folder, "--overwrite").code == 0
    found = contents(folder)
    assert found.keys() == LISTED | mine.keys() and all(
        found[name] == text.encode() for name, text in mine.items()
    )


def test_layerskip_json_lists_what_is_replaced(checkpoint, model):
    assert model_files(model) == LISTED == set(read_info(model).files)
    write_info(str(model), replace(read_info(model), exit_layer=2))
    assert set(read_info(model).files) == LISTED
    (model / "other.safetensors").write_text("mine")
    told = "in the way is other.safetensors, which layerskip did not write; move it away, or give another folder"
    fails(f"--output {model}: {told}", f"import {checkpoint} --output {model} --overwrite")
    (model / "other.safetensors").unlink()
    assert imported(str(model), model, "--overwrite").code == 0  # from itself
    assert for_training(str(model), "cpu").backend.num_layers == 6


def test_of_a_plain_checkpoint_only_its_own_files_are_replaced(checkpoint, model):
    (model / "layerskip.json").unlink()
    (model / "losses.jsonl").write_text("mine")
    (model / "model-00002-of-00002.safetensors").write_text("theirs")  # loaders read it
    assert model_files(model) == LISTED - {"layerskip.json"} | {"model-00002-of-00002.safetensors"}
    assert imported(checkpoint, model, "--overwrite").code == 0
    assert contents(model).keys() == LISTED | {"losses.jsonl"}


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "", "a/../../b"])
def test_a_list_that_leaves_the_folder_is_refused(model, name):
    document = json.loads((model / "layerskip.json").read_text())
    (model / "layerskip.json").write_text(json.dumps(document | {"files": [name]}))
    with pytest.raises(CheckpointError, match=r"layerskip\.json is not valid: a file's name must"):
        read_info(model)


def test_a_folder_behind_a_link_is_written_through_it(checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert imported(checkpoint, tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real").keys() == LISTED


TRAINED = "--samples 4 --steps 1 --batch-size 2 --max-length 48 --device cpu --dtype fp32"


def test_an_adapter_does_not_replace_its_base(base, tmp_path):
    model = tmp_path / "model"
    assert imported(base, model).code == 0
    before = contents(model)
    told = f"--lora-keep: the adapter needs its base {model}, which --output {model} would replace"
    lora = ("finetune", TRAINED, "--lora-rank 2 --lora-keep --overwrite")
    fails(told, *lora, f"--model {model} --output {model}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    assert run(*lora, f"--model {model} --output {tmp_path}/out").code == 0
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    fails(told, *lora, f"--model {tmp_path}/out --output {model}")
    assert contents(model) == before


def test_checkpoints_of_others_are_in_the_way(base, tmp_path):
    """transformers' own Trainer writes folders of the same name."""
    theirs = tmp_path / "checkpoints" / "checkpoint-7"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("mine")
    (theirs.parent / "checkpoint-best-7").mkdir()  # whose name no checkpoint of ours can have
    told = f"--output: {theirs} is in the way: not written by layerskip; move it away, or give another folder"
    for flag in ("--overwrite --resume",):
        fails(told, f"finetune --model no/model --output {tmp_path}", flag)
    assert contents(tmp_path) == {"checkpoints/checkpoint-7/model.safetensors": b"mine"}
