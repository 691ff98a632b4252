"""The cores that this process may use, and how busy other processes keep them."""

import os
import time
from dataclasses import dataclass

import psutil


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class _Reading:
    wall: float  # seconds of a clock
    busy: float  # seconds of all processes on the usable cores
    own: float  # seconds of this process and of children that have ended


class OtherLoad:
    """Measures how many of the usable cores other processes keep busy, from one call to the
    next.
    """

    def __init__(self) -> None:
        self._last = _read()

    @property
    def seconds(self) -> float:
        """Seconds since the last measurement."""
        return time.monotonic() - self._last.wall

    def busy_cores(self) -> float:
        """The cores that others kept busy since the last call, on average."""
        before = self._last
        self._last = now = _read()
        others = (now.busy - before.busy) - (now.own - before.own)
        return max(0.0, others / max(now.wall - before.wall, 1e-9))


def _read() -> _Reading:
    times = psutil.cpu_times(percpu=True)
    busy = 0.0
    for core in usable_cores():
        if core < len(times):
            busy += times[core].user + times[core].system
            if _is_nice():
                busy += times[core].nice
    own = os.times()
    return _Reading(
        time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system
    )


def _is_nice() -> bool:
    """True if this process has a positive nice value: then other such processes have no lower
    priority.
    """
    return hasattr(os, "getpriority") and os.getpriority(os.PRIO_PROCESS, 0) > 0
