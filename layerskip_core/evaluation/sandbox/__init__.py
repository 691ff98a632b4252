"""Runs generated code in its own process, isolated by every layer that the kernel offers, and
reports whether its tests passed.

    harness -> supervisor (its own session) -> program, then its tests

supervisor.py isolates, starts, watches and ends the program, seccomp.py filters its calls.
README.md says what each layer prevents and what remains possible.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ...errors import LayerSkipError
from .supervisor import LAYERS

__all__ = ["LAYERS", "Limits", "run_tests", "standing_layers"]

_GRACE_SECONDS = 20.0  # for the supervisor itself, on a busy machine
_ROOT = str(Path(__file__).parents[3])
_START = "import sys; sys.path.insert(0, sys.argv[1]); from layerskip_core.evaluation.sandbox.supervisor import main; main()"
# The program's whole environment. The fixed hash seed makes the order of sets, and so the verdict,
# reproducible.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """Limits of a program: wall-clock and CPU time, address space and file size (MB of 2**20
    bytes), processes and threads.
    """

    # Generous, because MBPP's slowest solution (row 123) needs 2.4 s on an idle core
    seconds: float = 30.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    file_mb: int = 1
    processes: int = 8


def run_tests(
    program: str, tests: str, limits: Limits | None = None, namespaces: bool | None = None
) -> str:
    """Runs a program, then its tests in the same module; returns the reason of a failure, or an
    empty string.

    The program can forge the reason: only display it. `namespaces`: isolate it in its own; None: if
    the kernel allows them. Raises LayerSkipError if the sandbox cannot be set up.
    """
    separate = "processes" in standing_layers() if namespaces is None else namespaces
    return _judged(program, tests, limits or Limits(), separate)[0]


@cache
def standing_layers() -> tuple[str, ...]:
    """The LAYERS that work on this machine. Raises LayerSkipError if the sandbox cannot be set
    up.
    """
    with suppress(LayerSkipError):  # the kernel may forbid namespaces
        return _judged("", "", Limits(), namespaces=True)[1]
    return _judged("", "", Limits(), namespaces=False)[1]


def _judged(
    program: str, tests: str, limits: Limits, namespaces: bool
) -> tuple[str, tuple[str, ...]]:
    """`run_tests`, and the layers that isolated the program."""
    folder = tempfile.mkdtemp(prefix="layerskip-")
    request = {
        "program": program,
        "tests": tests,
        "folder": folder,
        "namespaces": namespaces,
        "limits": asdict(limits),
    }
    command = [sys.executable, "-P", "-s", "-B", "-c", _START, _ROOT]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        cwd="/",
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdin and process.stdout and process.stderr
    with process:
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(request).encode())
            with suppress(subprocess.TimeoutExpired):
                process.wait(limits.seconds + _GRACE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            # Programs can leave folders without permissions, or too deep for Python.
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
                subprocess.run([*command, "--", folder], check=False, capture_output=True)
        layers, _, reason = (
            os.read(process.stdout.fileno(), 4096).decode(errors="replace").partition("\n")
        )
        if not layers:
            error = (
                process.stderr.read().decode(errors="replace").strip() or "the supervisor has ended"
            )
            raise LayerSkipError(
                f"the sandbox for generated code cannot be set up: {error.splitlines()[-1]}"
            )
    reason = (
        reason.partition("\n")[0] or "ended, or was ended by a limit, before its tests were through"
    )
    return "" if reason == "passed" else reason, tuple(json.loads(layers))
