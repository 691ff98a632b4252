"""Files are replaced as a whole, one process writes a folder at a time, and bad JSON is one
error.
"""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
from command_line import fails, run

from layerskip_core.checkpoint.save import _usual
from layerskip_core.errors import DataError, LayerSkipError, LockedError
from layerskip_core.files import (
    append_lines,
    discard_folder,
    hold,
    new_staging,
    parse_json,
    read_json,
    remove_leftovers,
    whole_lines,
    write_file,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "text",
    ["{", b"\xff", "NaN", "[-1e999]", '{"a": "\\ud800 "}', '"\udc80"', "[" * 100_000, "1" * 5000],
    ids=range(8),
)
def test_bad_json_is_one_error_of_one_line(text):
    with pytest.raises(DataError, match=r"^here: not valid JSON: ") as caught:
        parse_json(text, "here", DataError)
    assert "\n" not in str(caught.value)


def test_a_journal_loses_only_a_line_that_was_cut(tmp_path):
    file = tmp_path / "new" / "journal.jsonl"
    assert whole_lines(file, LayerSkipError) == []
    append_lines(file, [{"a": 1}, "é"], LayerSkipError)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"cut')
    assert b"".join(whole_lines(file, LayerSkipError)) == whole


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path):
    file = tmp_path / "a"
    write_file(file, b"one", LayerSkipError)
    file.chmod(0o640)
    write_file(file, b"two", LayerSkipError)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), names(tmp_path)) == (
        b"two",
        0o640,
        ["a"],
    )
    (tmp_path / "link").symlink_to("a")
    write_file(tmp_path / "link", b"three", LayerSkipError)
    assert (tmp_path / "link").is_symlink() and file.read_bytes() == b"three"
    with pytest.raises(LayerSkipError, match=r"cannot write .*: Is a directory"):
        write_file(tmp_path, b"x", LayerSkipError)
    write_file(tmp_path.joinpath("/dev/null"), b"gone", LayerSkipError)
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LayerSkipError, match=r"cannot write .*a: No space left on device"):
        write_file(tmp_path / "a", b"new", LayerSkipError)
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", ["a"])


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    (new_staging(tmp_path) / "half").write_text("x")
    (tmp_path / ".layerskip-writing-a.part").write_text("x")
    (tmp_path / "folder").mkdir()
    remove_leftovers(tmp_path)
    write_file(tmp_path / "a", b"whole", LayerSkipError)
    assert names(tmp_path) == ["a", "folder"]
    discard_folder(tmp_path / "folder")
    assert names(tmp_path) == ["a"]


HOLDING = """
import sys
from layerskip_core.files import hold
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
    message = rf"{folder} is being written by pid {process.pid} on \S+, a test; wait until it ends, or give another folder"
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
    assert names(tmp_path) == [".layerskip.lock"]
    with hold(tmp_path, "me"):
        assert (tmp_path / ".layerskip.lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert names(tmp_path) == []


def test_only_the_same_thread_may_take_a_lock_again(tmp_path):
    def elsewhere():
        with pytest.raises(LockedError), hold(tmp_path, "another thread"):
            pass
        done.append(True)

    done = []
    (tmp_path / "link").symlink_to(tmp_path)
    with hold(tmp_path, "one"):
        with hold(tmp_path / "link", "two"):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert done == [True]
    assert names(tmp_path) == ["link"]


def test_only_folders_created_for_the_lock_are_removed_and_only_if_empty(tmp_path):
    with hold(tmp_path / "a" / "b" / "c", "me"):
        (tmp_path / "a" / "file").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/file"]
    with (
        pytest.raises(LayerSkipError, match=r"cannot write to .*file/out: "),
        hold(tmp_path / "a" / "file" / "out", "me"),
    ):
        pass


def test_every_command_that_writes_a_folder_takes_its_lock(holder, checkpoint, tmp_path):
    """Before it does any work: the models that the commands name do not exist."""
    process = holder(tmp_path / "out")
    for command in (
        ("import", "no/model"),
        ("finetune --model no/model",),
        ("bench --model no/model",),
    ):
        result = run(*command, f"--output {tmp_path}/out")
        assert result.code == 1 and result.err.startswith(
            f"error: {tmp_path}/out is being written by pid {process.pid} on "
        )
        assert result.err.count("\n") == 1
    assert names(tmp_path / "out") == [".layerskip.lock"]
    holder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    saved = run(f"sweep-exits --model {tmp_path}/model --save")
    assert saved.code == 1 and saved.err.startswith(
        f"error: {tmp_path}/model is being written by pid "
    )


def test_a_failed_command_leaves_no_folder(tmp_path):
    assert run(f"import here/none/such --output {tmp_path}/new/out").code == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    fails(f"cannot write to {tmp_path}/file: File exists", f"import x/y --output {tmp_path}/file")


def test_half_a_file_is_not_taken_for_part_of_a_model(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(os, "replace", lambda *_: found.append((names(tmp_path), _usual(tmp_path))))
    write_file(tmp_path / "int4.safetensors", b"new", LayerSkipError)
    assert found == [([".layerskip-writing-int4.safetensors.part"], set())]


def test_json_is_read_by_type(tmp_path):
    with pytest.raises(DataError, match="absent: there is no such file"):
        read_json(tmp_path / "absent", DataError)
    (tmp_path / "list").write_text("[]")
    with pytest.raises(DataError, match="list: not valid JSON: Expected `object`, got `array`"):
        read_json(tmp_path / "list", DataError)
    assert read_json(tmp_path / "list", DataError, list[int]) == []
    assert parse_json('{"a": [1, "\\u00e9\\ud83d\\ude00"]}', "here", DataError) == {"a": [1, "é😀"]}
    assert parse_json(b"\xef\xbb\xbf{}", "here", DataError) == {}
