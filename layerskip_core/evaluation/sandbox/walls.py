"""Restricts a program, in the right order. A wall that the kernel does not allow is left out, and not reported."""

import os
import signal
from typing import Any

from . import identity as users
from . import landlock
from .kernel import LINUX, machine
from .limits import set_limits, tasks_of
from .paths import python_folders
from .processes import end_with_parent
from .seccomp import filter_calls

WALLS = ("files", "file names", "network", "processes", "system calls", "privileges")
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def confine(settings: dict[str, Any], identity: int | None, separate: bool, small_tree: bool) -> list[str]:
    """Restricts this process, permanently. Returns the names of the walls that are up.

    `separate`: it has its own namespaces. `small_tree`: its root holds only what it may read.
    """
    folder = settings["folder"]
    os.environ.clear()
    for name in _ONE_THREAD:  # for numeric libraries; os.environ stays empty
        os.putenv(name, "1")
    os.chdir(folder)
    counted_alone = separate if identity is None else identity != users.NOBODY
    set_limits(settings, 0 if counted_alone else tasks_of(os.getuid() if identity is None else identity))
    if not LINUX:
        return []
    users.gain_no_privileges()
    bounded = landlock.allow_files_only(folder)
    if identity is not None:
        users.become(identity, folder, keep_reading=bounded and (small_tree or not users.readable_by_all(python_folders())))
    elif separate:
        users.drop_capabilities()
    end_with_parent(signal.SIGKILL)
    only_signalled = None if separate or landlock.bounds_signals() else os.getpid()
    here = machine()
    filtered = here is not None and filter_calls(here, separate, only_signalled)
    standing = {
        "files": bounded,
        "file names": small_tree,
        "network": filtered or separate,
        "processes": separate,
        "system calls": filtered,
        "privileges": os.getuid() != 0,
    }
    return [wall for wall in WALLS if standing[wall]]
