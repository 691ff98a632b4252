"""The process that starts one program, watches and ends it. Standard library only.

The program writes two lines to stdout: the names of its layers as JSON, and `passed` or the reason why not.
"""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from . import layers
from .layers import FOLDER_FILES, FOLDER_MB


def main() -> None:
    """Ends with all processes of its group. A traceback on stderr means that the sandbox cannot be set up."""
    signal.signal(signal.SIGTERM, _end_all)
    layers.end_with_parent(signal.SIGTERM)
    os.set_blocking(1, False)
    request = json.load(sys.stdin)
    identity = layers.own_identity(request["folder"])
    if request["namespaces"]:
        layers.enter_namespaces(identity)
    ready, start = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(ready)
        _run_program(request, start, identity)
    os.close(start)
    os.read(ready, 1)  # until the program closes its end: the setup does not count
    reason = _watched(program, request["folder"], request["limits"]["seconds"])
    with suppress(BlockingIOError):  # a program can fill the pipe
        os.write(1, reason.encode())
    _end_all()


def _watched(program: int, folder: str, seconds: float) -> str:
    """Waits for the program's end; why it must be ended earlier."""
    deadline = time.monotonic() + seconds
    while os.waitpid(program, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            return f"took more than {seconds:g} s"
        if _too_large(folder):
            return f"its folder grew beyond {FOLDER_MB} MB or {FOLDER_FILES} files"
        time.sleep(0.005)
    return ""


def _too_large(folder: str) -> bool:
    """Whether a folder on a disk exceeds the size or number of files allowed; with namespaces a file system limits it."""
    files = size = 0
    with suppress(OSError, RecursionError):  # too deep
        for path, folders, names in os.walk(folder):
            files += len(folders) + len(names)
            for name in names:
                with suppress(FileNotFoundError):
                    size += os.lstat(os.path.join(path, name)).st_blocks * 512
            if files > FOLDER_FILES or size > FOLDER_MB << 20:
                return True
        return False
    return True


def _end_all(*_: object) -> None:
    """Kills this process and its group at once, so that none can fork meanwhile.

    The first process of a process namespace ends with this one, and ends the others. Without a namespace the system call filter
    keeps all of them in the group.
    """
    os.killpg(0, signal.SIGKILL)


def _run_program(request: dict[str, Any], start: int, identity: int | None) -> NoReturn:
    """In the program's process: isolates it, runs the program and its tests, and writes the verdict."""
    write, leave, own_id = os.write, os._exit, os.getpid()  # before the program can replace them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    standing = layers.isolate(request["folder"], request["limits"], identity, request["namespaces"])
    write(verdict, json.dumps(standing).encode() + b"\n")
    for output in (1, 2):
        os.dup2(nowhere, output)
    os.close(nowhere)
    os.close(start)
    sys.path.remove(sys.argv[1])
    # Not __main__: other harnesses of these tasks do not run `if __name__ == "__main__"` either.
    module = sys.modules["program"] = ModuleType("program")
    try:
        exec(compile(request["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
        exec(compile(request["tests"], "<tests>", "exec", dont_inherit=True), module.__dict__)
        reason = "passed"
    except BaseException as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())[:200]
    if os.getpid() == own_id:  # not a process that the program forked
        write(verdict, reason.encode(errors="replace") + b"\n")
    leave(0)
