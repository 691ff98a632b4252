"""Resource limits of a program: time, memory, file size, processes. The only restriction outside Linux."""

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any


def set_limits(settings: dict[str, Any], others: int) -> None:
    """Sets the limits. `others`: how many tasks of other programs count against the limit of processes."""
    memory, file = settings["memory_mb"] << 20, settings["file_mb"] << 20
    limits = [
        (resource.RLIMIT_CPU, settings["cpu_seconds"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NPROC, settings["processes"] + others),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    for kind, value in limits:
        _, most = resource.getrlimit(kind)
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        with suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(kind, (bound, bound))


def tasks_of(uid: int) -> int:
    """How many tasks, threads included, already run as this user."""
    count = 0
    for process in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process))
    return count
