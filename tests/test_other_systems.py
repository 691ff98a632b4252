"""Without what only Unix has, as on Windows, a model answers and files are written. No run there is
replaced by this.
"""

import subprocess
import sys

HERE = """
import os, sys

import psutil, torch  # which have code of their own for Windows

for name in ("pread", "preadv", "sysconf", "fchmod", "sched_getaffinity", "getuid", "geteuid", "fork", "getloadavg"):
    delattr(os, name)
for name in ("fcntl", "resource", "pwd", "termios"):
    sys.modules[name] = None


def kill(*_):
    raise AssertionError("os.kill ends any process on Windows, whatever the signal")


os.kill = kill
from pathlib import Path

from layerskip_core import load
from layerskip_core.errors import LayerSkipError
from layerskip_core.files import hold
from layerskip_core.files import write_file

folder = Path(sys.argv[1])
for content in (b"first\\n", b"second\\n"):
    with hold(folder, "a test"):
        (folder / f".layerskip-writing-00000000-{os.getpid()}-0").touch()
        write_file(folder / "file", content, LayerSkipError)
assert (folder / "file").read_bytes() == b"second\\n"
import layerskip_core.evaluation.tasks.code
import layerskip_core.training.plan

print(load("embedded", device="cpu").generate("play some jazz").text)
"""


def test_a_model_answers_and_files_are_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HERE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.startswith("[IN:PLAY_MUSIC "), done.stderr
