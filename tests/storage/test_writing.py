"""Atomic writes: regular files are replaced as a whole, and nothing else is ever renamed over."""

import errno
import os
import select
import socket
import stat
import subprocess
import threading
from types import SimpleNamespace

import pytest
from command_line import COMMAND, fails, finish, run, start

from layerskip_core.errors import CheckpointError, LayerSkipError
from layerskip_core.evaluation.output_folder import prepare_output
from layerskip_core.evaluation.report.files import FIGURE_NAMES
from layerskip_core.evaluation.report.plots import FIGURES
from layerskip_core.storage.writing import (
    _machine,
    discard_folder,
    new_staging,
    remove_leftovers,
    require_disk,
    require_writable,
    write_file,
)

INSPECT = ("inspect", "hi", "--max-new-tokens", "1")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def node(path, kind):
    """A device like /dev/null; only root may make one."""
    try:
        os.mknod(path, kind | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making devices needs root")
    return path


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path):
    file = tmp_path / "a"
    write_file(file, b"one", LayerSkipError)
    file.chmod(0o640)
    write_file(file, b"two", LayerSkipError)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), names(tmp_path)) == (b"two", 0o640, ["a"])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LayerSkipError, match=r"cannot write .*a: No space left on device"):
        write_file(tmp_path / "a", b"new", LayerSkipError)
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", ["a"])


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("old")
    (tmp_path / "link").symlink_to("data/file")
    (tmp_path / "dangling").symlink_to("data/new")
    for link in ("link", "dangling"):
        write_file(tmp_path / link, b"new", LayerSkipError)
        assert (tmp_path / link).is_symlink() and (tmp_path / link).read_text() == "new"
    assert names(tmp_path / "data") == ["file", "new"]


def test_a_device_is_written_to(tmp_path):
    device = node(tmp_path / "null", stat.S_IFCHR)
    (tmp_path / "link").symlink_to("null")
    before = device.stat()
    for path in (device, tmp_path / "link"):
        write_file(path, b"gone", LayerSkipError)
    assert (device.stat().st_ino, device.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["link", "null"]


def test_a_fifo_is_written_to_if_a_process_reads_it(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(LayerSkipError, match=r"cannot write .*fifo: no process reads this FIFO"):
        write_file(fifo, b"x", LayerSkipError)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(held, True)
    received = []

    def read():
        select.select([held], [], [], 10)  # before a writer opens it, a read would return the end of the file
        with os.fdopen(held, "rb") as stream:
            received.append(stream.read())

    reader = threading.Thread(target=read)
    write = threading.Thread(target=write_file, args=(fifo, b"x" * 100_000, LayerSkipError))  # more than a pipe holds
    write.start()
    reader.start()
    write.join(10)
    reader.join(10)
    assert received == [b"x" * 100_000] and stat.S_ISFIFO(fifo.stat().st_mode)


def test_folders_sockets_and_block_devices_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, kind in (("folder", "a folder"), ("socket", "a socket")):
            with pytest.raises(LayerSkipError, match=f"cannot write .*{name}: it is {kind}"):
                write_file(tmp_path / name, b"x", LayerSkipError)
    os.mkfifo(tmp_path / "fifo")
    require_writable(tmp_path / "fifo", LayerSkipError)
    with pytest.raises(LayerSkipError, match="it is a FIFO"):
        require_writable(tmp_path / "fifo", LayerSkipError, regular=True)
    node(tmp_path / "disk", stat.S_IFBLK)
    with pytest.raises(LayerSkipError, match="it is a block device"):
        write_file(tmp_path / "disk", b"x", LayerSkipError)
    assert names(tmp_path) == ["disk", "fifo", "folder", "socket"]


def test_leftovers_of_dead_processes_go_and_nothing_else(tmp_path):
    staging = new_staging(tmp_path)
    (staging / "half").write_text("x")
    (tmp_path / ".layerskip-writing-old").write_text("x")
    os.utime(tmp_path / ".layerskip-writing-old", (0, 0))
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".layerskip-writing-{_machine()}-{ended.pid}-1").write_text("x")
    alive = [f".layerskip-writing-{_machine()}-{os.getpid()}-1", ".layerskip-writing-elsewhere-1-1"]
    for name in alive:
        (tmp_path / name).write_text("x")
    (tmp_path / ".writing").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*alive, ".writing"])
    discard_folder(tmp_path / ".writing")
    assert names(tmp_path) == sorted(alive)


def test_inspect_writes_to_devices_and_refuses_folders(checkpoint, tmp_path):
    device = node(tmp_path / "null", stat.S_IFCHR)
    assert run(*INSPECT, "--model", checkpoint, "--output", str(device)).code == 0
    assert stat.S_ISCHR(device.stat().st_mode) and names(tmp_path) == ["null"]
    (tmp_path / "folder").mkdir()
    fails(f"cannot write {tmp_path}/folder: it is a folder", *INSPECT, "--model", "nobody", "--output", f"{tmp_path}/folder")


@pytest.mark.slow
def test_inspect_writes_to_the_standard_output_it_was_given(checkpoint, tmp_path):
    with (tmp_path / "both").open("wb") as both:
        process = start(*INSPECT, "--model", checkpoint, "--output", "/dev/stdout", command=COMMAND, stdout=both)
        assert finish(process).code == 0
    text = (tmp_path / "both").read_text()
    assert text.startswith("<!doctype html>") and "A token needed" in text.split("</html>")[1]
    assert names(tmp_path) == ["both"]


def test_an_output_folder_with_files_in_the_way_is_refused_before_the_run(tmp_path):
    for name in ("report.html", "pareto.png", "outputs.jsonl"):
        (tmp_path / name).mkdir()
        with pytest.raises(LayerSkipError, match=f"cannot write .*{name}: it is a folder"):
            prepare_output(str(tmp_path))
        (tmp_path / name).rmdir()
    (tmp_path / "unfinished.jsonl").symlink_to("elsewhere")
    with pytest.raises(LayerSkipError, match=r"unfinished.jsonl: it is a symbolic link"):
        prepare_output(str(tmp_path))


def test_every_figure_is_a_known_file():
    assert set(FIGURE_NAMES) == set(FIGURES)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there"
    require_disk(folder, 1000, "the states")
    with pytest.raises(CheckpointError, match=r"^the states need \d+ MB of disk in .*there, \d+ MB are free; give fewer rows$"):
        require_disk(folder, 1 << 60, "the states", "give fewer rows")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "file").write_bytes(bytes(3 << 20))
    require_disk(tmp_path, 4 << 20, "the states")  # what is there is written over
    with pytest.raises(CheckpointError, match=r"^the states need 4 MB of disk in .*, 1 MB are free$"):
        require_disk(tmp_path / "other", 4 << 20, "the states")
