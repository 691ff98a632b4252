"""CPU threads: how many a command uses."""

import os
import time
from typing import TYPE_CHECKING

from .console import narrate

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

_SMALL_WIDTH = 256  # of the hidden states
_INTERVAL = 0.25  # seconds in which other processes are watched


def use_threads(threads: int, loaded: "Decoder | None" = None) -> None:
    """Sets torch's CPU threads. With 0 they stay torch's choice, except for decoding with a small model (`loaded`): then 1.

    A small model's products take no longer than the threads' barriers, and if another process holds a core, every barrier
    waits for it. Measured on two cores with layers of width 160 and torch's kernels: the same speed on a quiet machine, far
    below half on a busy one. Our own kernels gain 1.6 times from a second thread on a quiet machine.
    """
    small = loaded is not None and loaded.backend.device.type == "cpu" and loaded.backend.hidden_size < _SMALL_WIDTH
    if threads or small:
        import torch

        torch.set_num_threads(threads or 1)


def use_free_threads(threads: int) -> None:
    """`use_threads` for a training. With 0 torch's choice is reduced by the cores that other processes keep busy, and says so.

    In torch's products every thread waits for the slowest, which on a busy core is one that does not run.
    """
    busy = 0 if threads else round(busy_cores())
    if not busy:
        return use_threads(threads)
    import torch

    most = torch.get_num_threads()
    chosen = max(1, most - busy)
    if chosen < most:
        narrate(f"{chosen} of {most} CPU threads, because other processes keep {busy} busy; --threads sets another number")
        torch.set_num_threads(chosen)


def busy_cores() -> float:
    """How many of the cores that this process may use are busy now, while it waits.

    Processes with a positive nice value are not counted: they make way.
    """
    import psutil

    def seconds() -> float:
        times = psutil.cpu_times(percpu=True)
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        return float(sum(times[core].user + times[core].system for core in usable if core < len(times)))

    before, started = seconds(), time.monotonic()
    time.sleep(_INTERVAL)
    return (seconds() - before) / (time.monotonic() - started)
