"""The process that runs one program and judges it. Standard library only; started by `run_tests`, with a JSON request on stdin.

The program shares an interpreter with its tests, as in every harness of this kind, so nothing that it prints, leaves in a file
or returns to the system counts. The verdict is a random number, made when the program already runs, that lies in a socket until
the tests have come to their end, is read there only then, and is sent back to this process, which the program cannot reach.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from . import walls

_MOST_BYTES = 4096  # of what a program can make the supervisor read


def main() -> None:
    """Reads the request, writes `{"passed": ..., "reason": ..., "walls": [...]}` to stdout."""
    request = json.load(sys.stdin)
    walls.die_with_parent()
    walls.adopt_orphans()
    identity = walls.own_identity()
    separate = request["namespaces"] and walls.enter_namespaces(request["folder"])
    mine, its = socket.socketpair()
    init = os.fork()
    if init == 0:
        mine.close()
        _run_init(request, its, identity, separate)
    its.close()
    standing, passed, reason = _judge(mine, request["seconds"])
    _kill_everything(init)
    if separate:
        standing.append("processes")
    print(json.dumps({"passed": passed, "reason": reason, "walls": standing}))


def _judge(channel: socket.socket, seconds: float) -> tuple[list[str], bool, str]:
    """(the walls that stand, whether the tests passed, why not). The program's side says first which walls it has."""
    nonce = os.urandom(16).hex()
    channel.sendall(nonce.encode())
    deadline = time.monotonic() + seconds
    received = b""
    while received.count(b"\n") < 2 and len(received) < _MOST_BYTES:
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            part = channel.recv(_MOST_BYTES)
        except TimeoutError:
            return _standing(received), False, f"took more than {seconds:g} s"
        except ConnectionError:
            part = b""
        if not part:
            break
        received += part
    lines = received.decode(errors="replace").split("\n")
    if len(lines) < 3:
        return _standing(received), False, "ended, or was ended by a limit, before its tests were through"
    passed = lines[1:] == [nonce, ""]
    return _standing(received), passed, "" if passed else lines[1] or "no reason given"


def _standing(received: bytes) -> list[str]:
    first, end, _ = received.partition(b"\n")
    return list(json.loads(first)) if end else []


def _kill_everything(init: int) -> None:
    """Kills the program and all that it started, and waits until nothing of it is left.

    The end of `init` is the end of its process namespace. Where there is none, orphans have come to this process: they are
    killed until there are no more, which a bounded number of processes cannot outrun.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(init, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    with suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            for child in walls.children() if pid == 0 else ():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def _run_init(request: dict[str, Any], channel: socket.socket, identity: int | None, separate: bool) -> NoReturn:
    """Starts the program, and ends when it does."""
    try:
        os.setpgid(0, 0)
        walls.die_with_parent()
        program = os.fork()
        if program == 0:
            _run_program(request, channel, identity, separate)
        channel.close()
        while os.wait()[0] != program:
            pass
    finally:
        os._exit(0)


def _run_program(request: dict[str, Any], channel: socket.socket, identity: int | None, separate: bool) -> NoReturn:
    """Puts up the walls, runs the program and its tests, and echoes the number that waits in the channel.

    What is needed behind the program is bound to local names: it may change any module.
    """
    send, receive, leave, run, describe, trace = os.write, os.read, os._exit, exec, _describe, sys.settrace
    channel_fd = channel.fileno()
    try:
        channel_fd = _only_channel(channel)
        standing = walls.confine(request, identity, separate)
        send(channel_fd, json.dumps(standing).encode() + b"\n")
        module = ModuleType("program")  # not __main__, whose blocks the harnesses of these tasks do not run either
        sys.modules["program"] = module
        sys.path.remove(sys.argv[1])
        try:
            program = compile(request.pop("program"), "<program>", "exec")
            tests = compile(request.pop("tests"), "<tests>", "exec")
            run(program, module.__dict__)
            trace(None)
            run(tests, module.__dict__)
        except BaseException as error:
            send(channel_fd, describe(error).encode(errors="replace") + b"\n")
        else:
            send(channel_fd, receive(channel_fd, 32) + b"\n")
    except BaseException as error:
        send(channel_fd, b"[]\nthe sandbox failed: " + describe(error).encode(errors="replace") + b"\n")
    finally:
        leave(0)


def _only_channel(channel: socket.socket) -> int:
    """Leaves an input at its end, two outputs that lead nowhere, and the channel, whose descriptor is returned."""
    ended, writer = os.pipe()
    os.close(writer)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for source, stream in ((ended, 0), (nowhere, 1), (nowhere, 2), (channel.fileno(), 3)):
        if source != stream:
            os.dup2(source, stream)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    return 3


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = ""
    line = " ".join(f"{type(error).__name__}: {text}".split()) if text else type(error).__name__
    return line[:200]
