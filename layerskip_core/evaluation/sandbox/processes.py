"""Processes that end when their parent ends, for whatever reason, and that end all their own descendants.

The kernel sends SIGTERM to a process when its parent ends. `wait` reports it, so that it cannot interrupt a clean-up.
"""

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from .kernel import LINUX, prctl

_DEATH_SIGNAL, _SUBREAPER = 1, 36  # prctl(2)
_SECONDS_TO_KILL = 2.0


class Alarms:
    """The signals for the end of the parent and of children, as bytes in a pipe."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, _only_wake)

    def wait(self, seconds: float | None, files: Sequence[int] = ()) -> tuple[bool, list[int]]:
        """Waits for either: (whether this process should end, which of the files can be read)."""
        ready, _, _ = select.select([self._reader, *files], [], [], seconds)
        received = b""
        with suppress(BlockingIOError):
            received = os.read(self._reader, 4096)
        return signal.SIGTERM in received, [file for file in files if file in ready]

    def close(self) -> None:
        """Restores the default signal handling, in a child process."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)


def _only_wake(number: int, frame: object) -> None:
    """Does nothing: the byte in the pipe is the message."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Makes the kernel send this signal when the parent ends. A change of user undoes this."""
    if LINUX:
        prctl(_DEATH_SIGNAL, number)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    if LINUX:
        prctl(_SUBREAPER, 1)


def descendants(ancestor: int) -> list[int]:
    """All living descendants of a process; none if /proc is not available."""
    parents: dict[int, list[int]] = {}
    for pid in _numbers():
        with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as status:
            state, parent = status.read().rpartition(b")")[2].split()[:2]
            # A process whose first thread has ended looks like a zombie while its other threads live.
            if state != b"Z" or len(os.listdir(f"/proc/{pid}/task")) > 1:
                parents.setdefault(int(parent), []).append(int(pid))
    living: list[int] = []
    waiting = [ancestor]
    while waiting:
        children = parents.get(waiting.pop(), [])
        living += children
        waiting += children
    return living


def kill_descendants(ancestor: int, spared: Sequence[int] = ()) -> bool:
    """Kills all descendants of a process, except `spared`, and reaps those that are children of this process.

    False if new ones keep appearing: a process that keeps forking and ending can stay ahead of this search.
    """
    deadline = time.monotonic() + _SECONDS_TO_KILL
    while left := [pid for pid in descendants(ancestor) if pid not in spared]:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            return False
    return True


def _numbers() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()] if LINUX else []
    except OSError:
        return []
