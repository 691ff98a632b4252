"""A model is replaced in one step, wherever the process is killed and whoever reads meanwhile."""

import os

import pytest
import torch
from command_line import fails
from conftest import tiny_model
from evaluating import tiny_loaded

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import READY, read_whole, save_checkpoint, save_files, settle

OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """Stands for kill -9: after it the process changes nothing on disk."""


@pytest.fixture
def killed_at(monkeypatch):
    """Makes the k-th disk operation and all later ones fail before they do anything; counts the operations."""

    def arm(step):
        count = [0]

        def guarded(operation):
            def act(*arguments, **keywords):
                count[0] += 1
                if step is not None and count[0] >= step:
                    raise Killed
                return operation(*arguments, **keywords)

            return act

        for name in OPERATIONS:
            monkeypatch.setattr(os, name, guarded(getattr(os, name)))
        return count

    yield arm
    monkeypatch.undo()


OLD = {"config.json": "old", "a.safetensors": "old", "c.safetensors": "old", "templates/x": "old"}
NEW = {"config.json": "new", "b.safetensors": "new", "a.safetensors": "new", "other/y": "new"}


def replace_by(files, folder):
    def write(staging):
        for name, text in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)

    save_files(write, CheckpointInfo(), str(folder))


def old_model(folder):
    """A folder with an old model, one of whose files is in a sub-folder, and a user's notes."""
    replace_by(OLD, folder)
    (folder / "notes").write_text("a user's")
    return folder


def state(folder):
    """The model's files, without layerskip.json."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".layerskip" not in str(path.relative_to(folder))]
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    del found["layerskip.json"]
    assert found.pop("notes") == "a user's"
    return found


def test_killed_at_any_operation_the_folder_holds_the_old_model_or_the_new_one(tmp_path, killed_at, monkeypatch):
    folder = old_model(tmp_path / "whole")
    count = killed_at(None)
    replace_by(NEW, folder)
    monkeypatch.undo()
    assert state(folder) == NEW and len(os.listdir(folder)) == 6
    outcomes = []
    for step in range(1, count[0] + 1, 2):
        folder = old_model(tmp_path / str(step))
        killed_at(step)
        with pytest.raises(Killed):
            replace_by(NEW, folder)
        monkeypatch.undo()
        settle(folder)  # what every reader does first
        assert state(folder) in (OLD, NEW), step
        outcomes.append(state(folder) == NEW)
        replace_by(OLD, folder)
        assert state(folder) == OLD and not (folder / "other").exists()
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}  # old up to some step, new from then on


def test_finishing_a_replacement_can_be_interrupted_too(tmp_path, killed_at, monkeypatch):
    """With a few operations per command, killed again and again, it still finishes."""
    folder = old_model(tmp_path / "model")
    for step in range(1, 99):
        killed_at(step)
        with pytest.raises(Killed):
            replace_by(NEW, folder)
        monkeypatch.undo()
        if (folder / READY).exists():
            break
    for _ in range(40):
        killed_at(7)
        try:
            settle(folder)
        except Killed:
            continue
        finally:
            monkeypatch.undo()
        break
    assert state(folder) == NEW and not (folder / READY).exists()


def test_every_command_finishes_an_interrupted_save(tmp_path, killed_at, monkeypatch):
    tokenizer, model = tiny_loaded().tokenizer, tiny_model(dtype=torch.float32, vocab_size=300, num_hidden_layers=2)
    for step in range(1, 99):
        folder = tmp_path / str(step)
        killed_at(step)
        with pytest.raises(Killed):
            save_checkpoint(model, tokenizer, CheckpointInfo(), str(folder), torch.float32)
        monkeypatch.undo()
        if (folder / READY).exists():
            break
    assert not (folder / "config.json").exists()
    fails(
        f"--output {folder} already holds a model; give --overwrite to replace it, or another folder",
        "import", "no/model", "--output", str(folder),
    )  # fmt: skip
    assert for_decoding(str(folder), "cpu", "fp32").backend.num_layers == 2 and not (folder / READY).exists()


def test_a_reader_sees_one_model_whatever_happens_meanwhile(tmp_path):
    folder = old_model(tmp_path / "model")
    seen = []

    def slow_read():
        seen.append(state(folder))
        if len(seen) == 1:
            replace_by(NEW, folder)
        return state(folder)

    assert read_whole(folder, slow_read) == NEW and seen == [OLD, NEW]
