"""The process that judges one program. Standard library only.

`run_tests` starts it, with the settings in its arguments and the program and its tests on stdin. The program shares an
interpreter with its tests, as in every harness of this kind, so its output, files and exit status do not count. Two random keys
do: see runner.py. The tests stay here until the first key has arrived and every other process of the program is dead.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from . import folder, processes
from .identity import leave_session_keyring, own_identity
from .kernel import machine
from .namespaces import FOLDER_FILES, FOLDER_MB, enter_namespaces, enter_small_tree
from .processes import Alarms
from .runner import KEY_BYTES, run_program

_MOST_BYTES = 4096  # longest line that the supervisor reads
_SECONDS_TO_START = 15.0
_SECONDS_TO_END = 5.0  # for init, which first kills the program
_FOLDER_SECONDS = 0.02  # between two checks of a folder whose size nothing else limits


class _Ended(Exception):
    """The program's run is over; the message says why."""


def main() -> None:
    """Reads `{"program": ..., "tests": ...}`, writes `{"passed": ..., "reason": ..., "walls": [...]}`.

    Exits with status 1 and a line on stderr if the sandbox cannot be set up.
    """
    settings = json.loads(sys.argv[2])
    alarms = Alarms()
    processes.adopt_orphans()
    identity = own_identity()
    leave_session_keyring(machine())
    separate = settings["namespaces"] and enter_namespaces()
    processes.end_with_parent()
    if os.getppid() != settings["harness"]:
        sys.exit("the harness has ended")
    own_end, program_end = socket.socketpair()
    init = os.fork()  # before the tests are read, so that the child's memory does not hold them
    if init == 0:
        own_end.close()
        alarms.close()
        _run_init(settings, program_end, identity, separate)
    program_end.close()
    try:
        answer = _Run(settings, own_end, alarms, init).judge(**json.load(sys.stdin))
    finally:
        _kill_everything(init, separate)
        folder.remove(settings["folder"])  # in case the harness has ended
    print(json.dumps(answer))


class _Run:
    """The supervisor's side of one run: sends the program and its tests, and reads the answers, until the time is over."""

    def __init__(self, settings: dict[str, Any], channel: socket.socket, alarms: Alarms, init: int) -> None:
        self._channel, self._alarms, self._init = channel, alarms, init
        self._seconds: float = settings["seconds"]
        self._deadline = time.monotonic() + _SECONDS_TO_START
        self._folder: str = settings["folder"]
        self._folder_bounded = False
        self._received = b""

    def judge(self, program: str, tests: str) -> dict[str, Any]:
        try:
            ready = json.loads(self._line())
        except _Ended as end:
            raise SystemExit(f"the sandbox could not be set up: {end}") from None
        if "failure" in ready:
            raise SystemExit(f"the sandbox could not be set up: {ready['failure']}")
        self._deadline = time.monotonic() + self._seconds  # the time of the setup is not the program's
        walls = ready["walls"]
        try:
            self._folder_bounded = "file names" in walls
            first = processes.descendants(self._init)  # the program's own process, which is spared
            key = self._send_keyed(program)
            self._expect(key)
            if not processes.kill_descendants(self._init, first):
                raise _Ended("left a process running that does not end")
            self._expect(self._send_keyed(tests))
        except _Ended as end:
            return {"passed": False, "reason": str(end), "walls": walls}
        return {"passed": True, "reason": "", "walls": walls}

    def _send_keyed(self, text: str) -> bytes:
        """Sends a new key and a text. The key comes back when the text has run."""
        key = os.urandom(KEY_BYTES // 2).hex().encode()
        data = text.encode("utf-8", "surrogatepass")
        self._channel.settimeout(self._left())
        try:
            self._channel.sendall(key + len(data).to_bytes(8, "little") + data)
        except TimeoutError:
            raise self._late() from None
        except OSError:
            raise _Ended(self._line().decode(errors="replace")) from None
        return key

    def _expect(self, key: bytes) -> None:
        line = self._line()
        if line != key:
            raise _Ended(line.decode(errors="replace") or "no reason given")

    def _line(self) -> bytes:
        """The next line from the program's side. Raises _Ended if none arrives."""
        while b"\n" not in self._received:
            should_end, ready = self._alarms.wait(self._left(), [self._channel.fileno()])
            if should_end:
                raise SystemExit("the harness has ended")
            if not self._folder_bounded and folder.outgrown(self._folder):
                raise _Ended(f"its folder grew beyond {FOLDER_MB} MB or {FOLDER_FILES} files")
            if ready:
                self._hear()
            elif time.monotonic() >= self._deadline:
                raise self._late()
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _hear(self) -> None:
        part = b""
        with suppress(ConnectionError):
            part = self._channel.recv(_MOST_BYTES)
        if not part or len(self._received) > _MOST_BYTES:
            raise _Ended("ended, or was ended by a limit, before its tests were through")
        self._received += part

    def _left(self) -> float:
        left: float = max(self._deadline - time.monotonic(), 0.001)
        return left if self._folder_bounded else min(left, _FOLDER_SECONDS)

    def _late(self) -> _Ended:
        return _Ended(f"took more than {self._seconds:g} s")


def _kill_everything(init: int, separate: bool) -> None:
    """Kills the program and everything that it started, and waits for their end.

    When `init` ends, the kernel ends its process namespace. Without a namespace, init kills the program's group before it
    ends, and processes outside the group become children of this process.
    """
    with suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL if separate else signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    while not _has_ended(init):
        if time.monotonic() > deadline:
            os.kill(init, signal.SIGKILL)
        time.sleep(0.001)
    os.waitpid(init, 0)
    if not separate:
        processes.kill_descendants(os.getpid())


def _run_init(settings: dict[str, Any], channel: socket.socket, identity: int | None, separate: bool) -> NoReturn:
    """Starts the program. Ends when the program or the supervisor ends, and leaves no process of the program behind."""
    program = 0
    try:
        alarms = Alarms()
        processes.adopt_orphans()
        processes.end_with_parent()
        small_tree = separate and enter_small_tree(settings["folder"], machine())
        program = os.fork()
        if program == 0:
            os.setpgid(0, 0)
            alarms.close()
            run_program(settings, channel, identity, separate, small_tree)
        while not _supervisor_is_gone(channel) and not alarms.wait(None)[0] and not _has_ended(program):
            pass
    finally:
        if not separate and program:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(program, signal.SIGKILL)  # the whole group at once, so that none of it can fork meanwhile
            processes.kill_descendants(os.getpid())
        os._exit(0)


def _supervisor_is_gone(channel: socket.socket) -> bool:
    """Whether the supervisor ended before this process could ask for a signal at its end."""
    try:
        return channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _has_ended(child: int) -> bool:
    """Whether this child has ended; it keeps its process id until it is waited for. Reaps other children that have ended."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == child:
                return True
            os.waitpid(ended.si_pid, 0)
    return False
