"""Runs commands in forks of a process that has imported everything: each takes milliseconds, and a crash ends only its fork.

The forking process has imported torch and transformers but has run nothing from them, because a fork loses running threads.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from .outcome import Outcome

_PAUSE = 0.004  # seconds between two checks of a child


@dataclass(frozen=True)
class Limits:
    """Limits of a child: CPU and wall-clock seconds, MB of address space beyond what it starts with, MB per file."""

    cpu_seconds: int = 20
    wall_seconds: float = 150.0
    memory_mb: int = 4000
    file_mb: int = 512


class Child:
    """A function running in a forked process, with its output in two files. `streams`: replacements for stdout and stderr."""

    def __init__(
        self, work: Callable[[], int], logs: Path, limits: Limits, stdin: int | None, streams: tuple[int | None, int | None]
    ) -> None:
        """`work` returns the exit status. A stream of None is closed, a stream of -1 goes to a file in the folder `logs`."""
        self._logs, self._limits = logs, limits
        self._files = [open(logs / name, "wb+") for name in ("stdout", "stderr")]  # noqa: SIM115
        given = [file.fileno() if stream == -1 else stream for file, stream in zip(self._files, streams, strict=True)]
        self._deadline = time.monotonic() + limits.wall_seconds
        self._ended: Outcome | None = None
        self._timed_out = False
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = fork()
        if self.pid == 0:
            _run(work, limits, (stdin, *given))

    def running(self) -> bool:
        """Whether it still runs. Kills it if it is out of time."""
        if self._ended is not None:
            return False
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # processes that it left running
            out, err = (_content(file) for file in self._files)
            self._ended = Outcome(os.waitstatus_to_exitcode(status), out, err, self._timed_out, usage.ru_maxrss / 1024)
        elif time.monotonic() > self._deadline:
            self._timed_out = True
            self.send(signal.SIGKILL)
        return not pid

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the child and to what it started in its session."""
        if self._ended is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def wait(self, seconds: float = float("inf")) -> Outcome | None:
        """How it ended; None if it still runs after so many seconds."""
        until = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > until:
                return None
            time.sleep(_PAUSE)
        return self._ended


def fork() -> int:
    """os.fork, but waits while the machine has no free process."""
    for _ in range(50):
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.2)
    return os.fork()


def _content(file: BinaryIO) -> str:
    with file:
        file.seek(0)
        return file.read(1 << 22).decode(errors="replace")


def _run(work: Callable[[], int], limits: Limits, streams: tuple[int | None, ...]) -> NoReturn:
    """Never returns to the parent's code, whatever happens."""
    status = 70
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            if stream is None:
                with suppress(OSError):
                    os.close(number)
            elif stream != number:
                os.dup2(stream, number)
        os.closerange(3, 256)
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_mb << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if "LD_PRELOAD" not in os.environ:  # the shadow memory of a sanitizer is terabytes of address space
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (limits.memory_mb << 20),) * 2)
        for heeded in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(heeded, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
    except BaseException:
        with suppress(BaseException):
            os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
