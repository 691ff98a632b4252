"""Only one process writes to a folder."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import fails, finish, run, start
from safetensors.torch import load_file

from layerskip_core.checkpoint.info import read_info
from layerskip_core.errors import LayerSkipError, LockedError
from layerskip_core.storage import locks
from layerskip_core.storage.locks import hold

HOLDING = """
import sys
from layerskip_core.storage.locks import hold
with hold(sys.argv[1], "a test"):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder():
    """Starts a process that holds a folder until it gets a line, or is killed."""
    started = []

    def start(folder):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDING, str(folder)], text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_gets_an_error_that_names_the_first(holder, tmp_path):
    folder = tmp_path / "out"
    process = holder(folder)
    message = rf"{folder} is being written by pid {process.pid} on \S+, a test, since [-\d]+ [:\d]+; wait until it ends, or "
    with pytest.raises(LockedError, match=message), hold(folder, "me"):
        pass
    process.communicate("\n")
    assert not folder.exists()  # it was made for the lock, and nothing was put there
    with hold(folder, "me"):
        (folder / "file").touch()
    assert os.listdir(folder) == ["file"]


def test_killing_the_process_releases_the_lock(holder, tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [".layerskip.lock"]
    with hold(tmp_path, "me"):
        assert Path(tmp_path, ".layerskip.lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert os.listdir(tmp_path) == []


def test_only_the_same_thread_may_take_a_lock_again(tmp_path):
    def elsewhere():
        with pytest.raises(LockedError), hold(tmp_path, "another thread"):
            pass
        done.append(True)

    done = []
    with hold(tmp_path / "." / "out", "one"), hold(f"{tmp_path}/out", "two"):
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    with hold(tmp_path, "one"):
        with hold(tmp_path / "link", "two"):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert done == [True]
        assert (tmp_path / ".layerskip.lock").exists()
    assert sorted(os.listdir(tmp_path)) == ["link"]


def test_only_folders_created_for_the_lock_are_removed_and_only_if_empty(tmp_path):
    with hold(tmp_path / "a" / "b" / "c", "me"):
        (tmp_path / "a" / "file").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/file"]


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(LayerSkipError, match=r"cannot write to .*file/out: Not a directory"),
        hold(tmp_path / "file" / "out", "me"),
    ):
        pass


def test_on_a_system_without_locks_the_file_is_the_lock(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with hold(tmp_path, "me"):
        monkeypatch.setattr(locks, "_held", set())  # as in another process
        with pytest.raises(LockedError, match=re.escape("; if no such process runs, remove")), hold(tmp_path, "other"):
            pass
        monkeypatch.setattr(locks, "fcntl", None)
        with pytest.raises(LockedError, match=re.escape("; if no such process runs, remove")), hold(tmp_path, "other"):
            pass
    assert os.listdir(tmp_path) == []


def test_every_command_that_writes_a_folder_takes_its_lock(holder, checkpoint, tmp_path):
    """Before it does any work: the models that the commands name do not exist."""
    process = holder(tmp_path / "out")
    for command in (("import", "no/model"), ("finetune", "--model", "no/model"), ("bench", "--model", "no/model"),
                    ("sweep-exits", "--model", "no/model")):  # fmt: skip
        result = run(*command, "--output", str(tmp_path / "out"))
        assert result.code == 1 and result.err.startswith(f"error: {tmp_path}/out is being written by pid {process.pid} on ")
        assert result.err.count("\n") == 1
    assert os.listdir(tmp_path / "out") == [".layerskip.lock"]
    holder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    saved = run("sweep-exits", "--model", str(tmp_path / "model"), "--save")
    assert saved.code == 1 and saved.err.startswith(f"error: {tmp_path}/model is being written by pid ")


def test_a_failed_command_leaves_no_folder(tmp_path):
    output = tmp_path / "new" / "out"
    assert run("import", "here/none/such", "--output", str(output)).code == 1
    assert list(tmp_path.iterdir()) == []
    fails(f"--output must be a folder, got the file {tmp_path}/file", "import", "x/y", "--output", broken(tmp_path / "file"))


def broken(link):
    link.symlink_to("nowhere")
    return str(link)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_of_two_concurrent_commands_one_writes_and_the_other_gets_an_error(checkpoint, tmp_path, overwrite):
    """Their files are never mixed. (Before there was a lock, 9 of 30 such pairs left a mixed or incomplete model.)"""
    output = tmp_path / "out"
    if overwrite:
        assert run("import", checkpoint, "--output", str(output)).code == 0
    both = [start("import", checkpoint, "--output", str(output), "--dtype", dtype, *overwrite) for dtype in ("fp32", "bf16")]
    ended = [finish(process) for process in both]
    codes = [result.code for result in ended]
    assert 0 in codes and len(load_file(output / "model.safetensors")) > 6
    for result in ended:
        assert result.err.count("\n") == 1 and (result.code == 0 or re.search("is being written by|already holds", result.err))
    written = {str(weight.dtype) for weight in load_file(output / "model.safetensors").values()}
    message = next(result.err for result in reversed(ended) if result.code == 0)
    assert len(written) == 1 and (codes == [0, 0] or f"in {written.pop().removeprefix('torch.')}" in message)
    assert sorted(os.listdir(output)) == sorted(read_info(output).files)
