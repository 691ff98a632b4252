"""A model is replaced in one step, wherever the process is killed and whoever reads meanwhile."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import fails, run
from conftest import tiny_model
from safetensors.torch import load_file

from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.checkpoint.swap import READY, files_below, read_whole, replace_files, settle
from layerskip_core.errors import CheckpointError
from layerskip_core.files import hold, new_staging
from layerskip_core.training.encoding import train_tokenizer

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


def write_old_model(folder):
    """Writes an old model of three files, one of them in a sub-folder, and a user's notes; returns the model's files."""
    old = {"config.json": "old", "a.safetensors": "old", "templates/x": "old"}
    for name, text in old.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "notes").write_text("a user's")
    return old


def replace_with_new(folder, old):
    with hold(folder, "test"):
        settle(folder)
        staging = new_staging(folder)
        for name in ("config.json", "b.safetensors", "a.safetensors", "other/y"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text("new")
        replace_files(folder, staging, old)


def state(folder):
    files = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".layerskip")
        ]  # another process may remove them at any time
        for file in (Path(place) / name for name in names if not name.startswith(".layerskip")):
            files[file.relative_to(folder).as_posix()] = file.read_text()
    return files


NEW = {"config.json": "new", "b.safetensors": "new", "a.safetensors": "new", "other/y": "new", "notes": "a user's"}


def test_killed_at_any_operation_the_folder_holds_the_old_model_or_the_new_one(tmp_path, killed_at, monkeypatch):
    folder = tmp_path / "whole"
    folder.mkdir()
    old = write_old_model(folder)
    count = killed_at(None)
    replace_with_new(folder, old)
    monkeypatch.undo()
    assert state(folder) == NEW and len(os.listdir(folder)) == 5
    outcomes = []
    for step in range(1, count[0] + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        old = write_old_model(folder)
        killed_at(step)
        with pytest.raises(Killed):
            replace_with_new(folder, old)
        monkeypatch.undo()
        settle(folder)  # what every reader does first
        assert state(folder) in ({**old, "notes": "a user's"}, NEW), step
        outcomes.append(state(folder) == NEW)
        replace_with_new(folder, files_below(folder) if not outcomes[-1] else [])
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}  # old up to some step, new from then on


def test_finishing_a_replacement_can_be_interrupted_too(tmp_path, killed_at, monkeypatch):
    """With one operation per command, killed again and again, it still finishes."""
    old = write_old_model(tmp_path)
    killed_at(12)
    with pytest.raises(Killed):
        replace_with_new(tmp_path, old)
    monkeypatch.undo()
    assert (tmp_path / READY).exists()
    for _ in range(40):
        killed_at(3)
        try:
            settle(tmp_path)
        except Killed:
            continue
        finally:
            monkeypatch.undo()
        break
    settle(tmp_path)
    assert state(tmp_path) == NEW


@pytest.fixture(scope="module")
def tokenizer():
    from layerskip_core.config.data import DataConfig
    from layerskip_core.data.examples import load_examples

    return train_tokenizer(load_examples(DataConfig(limit=100)), 300)


def save(folder, tokenizer, layers):
    model = tiny_model(dtype=torch.float32, vocab_size=300, num_hidden_layers=layers)
    save_checkpoint(model, tokenizer, CheckpointInfo(details={"layers": layers}), str(folder), torch.float32)


def layers_of(folder):
    """The number of layers in the config, in the weights and in layerskip.json."""
    loaded = for_decoding(str(folder), "cpu", "fp32")
    weights = {name.split(".")[2] for name in load_file(Path(folder) / "model.safetensors") if name.startswith("model.layers")}
    return loaded.backend.num_layers, len(weights), loaded.info.details["layers"]


def test_saving_over_a_model_killed_at_any_operation(tmp_path, tokenizer, killed_at, monkeypatch):
    """All of `save_checkpoint`: loading afterwards gives the old model or the new one."""
    save(tmp_path / "first", tokenizer, 2)
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    count = killed_at(None)
    save(tmp_path / "counted", tokenizer, 3)
    monkeypatch.undo()
    outcomes = set()
    for step in range(1, count[0] + 1):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "first", folder)
        killed_at(step)
        with pytest.raises(Killed):
            save(folder, tokenizer, 3)
        monkeypatch.undo()
        outcomes.add(layers_of(folder))
        assert outcomes <= {(2, 2, 2), (3, 3, 3)}, step
        shutil.rmtree(folder)
    assert outcomes == {(2, 2, 2), (3, 3, 3)}


def test_every_command_finishes_an_interrupted_save(tmp_path, tokenizer, killed_at, monkeypatch):
    for step in range(1, 99):
        folder = tmp_path / str(step)
        killed_at(step)
        with pytest.raises(Killed):
            save(folder, tokenizer, 2)
        monkeypatch.undo()
        if (folder / READY).exists():
            break
    assert not (folder / "config.json").exists()
    fails(
        f"--output {folder} already holds a model; give --overwrite to replace it, or another folder",
        "import", "no/model", "--output", str(folder),
    )  # fmt: skip
    assert layers_of(folder) == (2, 2, 2) and not (folder / READY).exists()


def test_a_reader_sees_one_model_whatever_happens_meanwhile(tmp_path):
    old = write_old_model(tmp_path)
    seen = []

    def slow_read():
        seen.append(state(tmp_path))
        if len(seen) == 1:
            replace_with_new(tmp_path, old)
        return state(tmp_path)

    assert read_whole(tmp_path, slow_read) == NEW and seen == [{**old, "notes": "a user's"}, NEW]

    def always_replaced():
        replace_with_new(tmp_path, [])

    with pytest.raises(CheckpointError, match="is being replaced again and again"):
        read_whole(tmp_path, always_replaced)


@pytest.mark.parametrize("plan", ["{", '{"old": ["../x"]}', "{}"])
def test_a_damaged_plan_is_an_error_and_moves_nothing(tmp_path, plan):
    (tmp_path / "x").write_text("outside")
    folder = tmp_path / "model"
    (folder / READY).mkdir(parents=True)
    (folder / READY / "plan.json").write_text(plan)
    (folder / READY / "config.json").write_text("{}")
    result = run("generate", "hi", "--model", str(folder))
    assert result.code == 1 and result.err.count("\n") == 1 and "plan.json" in result.err
    assert (tmp_path / "x").exists() and not (folder / "config.json").exists()


SAVING = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from conftest import tiny_model
from layerskip_core.config.data import DataConfig
from layerskip_core.data.examples import load_examples
from layerskip_core.training.encoding import train_tokenizer
from test_swap import save
tokenizer = train_tokenizer(load_examples(DataConfig(limit=100)), 300)
save(sys.argv[1], tokenizer, 2)
print("ready", flush=True)
for line in sys.stdin:  # one child per line, which saves again and again until it is killed
    child = os.fork()
    if child == 0:
        for turn in range(10**6):
            save(sys.argv[1], tokenizer, 3 - turn % 2)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_time_loses_no_model(tmp_path):
    folder = tmp_path / "model"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", SAVING, str(folder), str(Path(__file__).parent)], text=True, **pipes)
    try:
        assert parent.stdout.readline() == "ready\n"
        chance = random.Random(15)
        interrupted = 0
        for number in range(30):
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            wait = time.monotonic() + chance.uniform(0.02, 0.3)
            if number % 2:  # kill half of them during the replacement itself
                while not (folder / READY).exists() and time.monotonic() < wait + 5:
                    pass
            else:
                time.sleep(max(0.0, wait - time.monotonic()))
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            interrupted += (folder / READY).exists()
            assert layers_of(folder) in {(2, 2, 2), (3, 3, 3)}, number
        assert interrupted
    finally:
        parent.kill()
        parent.communicate()
    assert json.loads((folder / "layerskip.json").read_text())["files"]
    assert set(read_info(folder).files) >= {"config.json", "model.safetensors", "layerskip.json"}
