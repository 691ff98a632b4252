"""Models are saved as plain transformers checkpoints; a failed save changes nothing, and no other file is lost."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_core.checkpoint.importing import stored_dtype
from layerskip_core.checkpoint.info import CheckpointInfo, holds_model, read_info
from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.save import refuse_overwrite, save_checkpoint, write_info
from layerskip_core.errors import CheckpointError, ConfigError

INFO = CheckpointInfo("{prompt} ->", 3, 5, {"rows": 7, "note": "naïve"})
IDS = torch.tensor([[5, 9, 33, 7]])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_loaded().tokenizer


def model_of(vocab_size=300, **changes):
    return tiny_model(dtype=torch.float32, vocab_size=vocab_size, **changes)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A saved model of six layers."""
    path = tmp_path / "model"
    save_checkpoint(model_of(), tokenizer, INFO, str(path), torch.float32)
    return path


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def test_plain_transformers_loads_it(folder):
    written = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(folder)) == {*written, "layerskip.json"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.testing.assert_close(model(IDS).logits, model_of()(IDS).logits)
    assert tokenizer.eos_token_id == 2


def test_layerskip_json_is_documented_and_readable(folder):
    assert json.loads((folder / "layerskip.json").read_text(encoding="utf-8")) == {
        "format": 1,
        "prompt_template": "{prompt} ->",
        "recommended": {"exit_layer": 3, "num_draft_tokens": 5},
        "rows": 7,
        "note": "naïve",
        "files": [*sorted(contents(folder).keys() - {"layerskip.json"}), "layerskip.json"],
    }
    write_info(str(folder), CheckpointInfo("x {prompt}"))
    assert read_info(str(folder)) == CheckpointInfo("x {prompt}")
    (folder / "layerskip.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"layerskip\.json: not valid"):
        read_info(str(folder))


def test_all_files_have_the_same_permissions(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_weights_are_stored_in_the_precision_asked_for(tmp_path, tokenizer):
    save_checkpoint(model_of(), tokenizer, INFO, str(tmp_path), torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert stored_dtype(str(tmp_path)) == torch.bfloat16
    assert for_training(str(tmp_path), "cpu", "fp32").backend.dtype == torch.float32
    assert for_training(str(tmp_path), "cpu", "bf16").backend.dtype == torch.bfloat16


def test_a_full_disk_leaves_the_older_model(folder, tokenizer, monkeypatch):
    before = contents(folder)
    other = model_of(num_hidden_layers=2)

    def full(*_, **__):
        (next(folder.glob(".layerskip-staging-*")) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(other), "save_pretrained", full)
    with pytest.raises(CheckpointError, match=f"cannot write the model to {folder}: .*No space left on device"):
        save_checkpoint(other, tokenizer, CheckpointInfo(), str(folder), torch.float32)
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_an_interrupt_while_saving_leaves_no_model(tmp_path, tokenizer, monkeypatch):
    model = model_of()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, tokenizer, INFO, str(tmp_path), torch.float32)
    assert not holds_model(tmp_path)
    monkeypatch.undo()
    save_checkpoint(model, tokenizer, INFO, str(tmp_path), torch.float32)  # what the interrupt left is no obstacle
    assert holds_model(tmp_path) and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_is_not_overwritten_without_the_flag(folder, tmp_path):
    with pytest.raises(ConfigError, match=f"`output` {folder} already holds a model; give `overwrite`"):
        refuse_overwrite(str(folder), overwrite=False)
    refuse_overwrite(str(folder), overwrite=True)
    refuse_overwrite(str(tmp_path / "new"), overwrite=False)


def test_nothing_is_written_to_the_terminal(folder, tokenizer, capfd):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "unexpected": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = for_training(str(folder))
    save_checkpoint(loaded.model, tokenizer, INFO, str(folder), torch.float32)
    assert capfd.readouterr() == ("", "")


def test_overwriting_leaves_no_file_of_the_older_model(folder, tokenizer):
    stale = ("model-00002-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja")
    for name in stale:
        (folder / name).write_text("{}")
    (folder / "notes.md").write_text("a user's")
    write_info(str(folder), replace(read_info(folder), files=(*read_info(folder).files, *stale)))
    save_checkpoint(model_of(), tokenizer, INFO, str(folder), torch.float32)
    assert sorted(file.name for file in folder.glob("*model*")) == ["model.safetensors"]
    assert not (folder / "chat_template.jinja").exists()
    assert (folder / "notes.md").read_text() == "a user's"
