"""The cores that this process may use, how busy other processes keep them, and its free memory."""

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


# By the controllers of /proc/self/cgroup (versions 2 and 1): limit, use, prefix of names in
# memory.stat
_CGROUP_FILES = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def memory_budget(kv_megabytes: int | None = None) -> tuple[int, int]:
    """Divides the memory that is free before a model is loaded: bytes for KV entries (by default a
    fifth), and bytes left for its weights and their low-bit copies.
    """
    free = available_memory()
    kv_bytes = free // 5 if kv_megabytes is None else kv_megabytes * 2**20
    return kv_bytes, free - kv_bytes


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate, by the machine's memory and the limits of its
    cgroups (of a container).

    Cached files count as free, because Linux evicts them.
    """
    available = int(psutil.virtual_memory().available)
    listed = root / "proc/self/cgroup"
    if not listed.exists():
        return available
    for line in listed.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUP_FILES:
            continue
        own = root / "sys/fs/cgroup" / controllers / path.strip("/")
        # A container may see only its own group, mounted in place of the machine's root
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # no such file; no limit ("max")
                available = min(available, _free_in(group, *_CGROUP_FILES[controllers]))
    return available


def _free_in(group: Path, limit_file: str, used_file: str, prefix: str) -> int:
    """Bytes below a cgroup's limit, cached files included."""
    limit = int((group / limit_file).read_text())
    used = int((group / used_file).read_text())
    stat = (group / "memory.stat").read_text()
    cached = re.findall(rf"\b{prefix}(?:in)?active_file (\d+)", stat)
    return limit - used + sum(map(int, cached))
