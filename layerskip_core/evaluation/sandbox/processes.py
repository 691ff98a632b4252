"""Processes that end with the one that started them, whatever ends it, and take with them all that they started.

The kernel tells a process of its parent's end by SIGTERM. It is noticed in `wait`, so that nothing interrupts a clean-up.
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
    """The signals that this process waits for, as bytes in a pipe: its parent's end and its children's."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, _only_wake)

    def wait(self, seconds: float | None, files: Sequence[int] = ()) -> tuple[bool, list[int]]:
        """(whether this process was told to end, which of the files can be read), when there is anything to tell."""
        ready, _, _ = select.select([self._reader, *files], [], [], seconds)
        told = b""
        with suppress(BlockingIOError):
            told = os.read(self._reader, 4096)
        return signal.SIGTERM in told, [file for file in files if file in ready]

    def close(self) -> None:
        """In a child that is to have signals of its own."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)


def _only_wake(number: int, frame: object) -> None:
    """The byte in the pipe says it all."""


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """The kernel sends this signal when the parent ends. A change of user undoes it."""
    if LINUX:
        prctl(_DEATH_SIGNAL, number)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, wherever they hide."""
    if LINUX:
        prctl(_SUBREAPER, 1)


def descendants(ancestor: int) -> list[int]:
    """All living processes below one; none where /proc does not tell."""
    parents: dict[int, list[int]] = {}
    for pid in _numbers():
        with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as status:
            state, parent = status.read().rpartition(b")")[2].split()[:2]
            # A process whose first thread has ended looks dead, though its other threads live.
            if state != b"Z" or len(os.listdir(f"/proc/{pid}/task")) > 1:
                parents.setdefault(int(parent), []).append(int(pid))
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_descendants(ancestor: int, spared: Sequence[int] = ()) -> bool:
    """Kills all processes below one; children of this process are reaped. False when there were always new ones: a process
    that forks and ends, over and over, is a step ahead of whoever looks for it.
    """
    deadline = time.monotonic() + _SECONDS_TO_KILL
    while left := [one for one in descendants(ancestor) if one not in spared]:
        for one in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(one, os.WNOHANG)
        if time.monotonic() > deadline:
            return False
    return True


def _numbers() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()] if LINUX else []
    except OSError:
        return []
