"""Resource limits of one program: time, memory, file size, processes. The only wall that other systems than Linux have too."""

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any


def set_limits(settings: dict[str, Any], others: int) -> None:
    """`others`: how many tasks count against the limit of processes although they are not the program's."""
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
        with suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (bound, bound))


def tasks_of(uid: int) -> int:
    """Tasks, threads included, that already run as a user."""
    count = 0
    for process in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process))
    return count
