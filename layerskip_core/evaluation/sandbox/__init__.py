"""Runs generated code in its own process, restricted in every way that the kernel allows, and reports whether its tests passed.

harness -> supervisor (own session) -> init (process 1 of its own process namespace) -> program

Each process ends when the one before it ends. supervisor.py and runner.py make the verdict, walls.py isolates the program.
README.md describes what each wall prevents and what remains possible.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import LayerSkipError
from . import folder as folders
from .walls import WALLS

__all__ = ["WALLS", "Limits", "Verdict", "run_tests", "standing_walls"]

_GRACE_SECONDS = 20.0  # for the supervisor itself, on a busy machine
_SECONDS_TO_END = 10.0
_ROOT = str(Path(__file__).parents[3])
_START = "import sys; sys.path.insert(0, sys.argv[1]); from layerskip_core.evaluation.sandbox.supervisor import main; main()"


@dataclass(frozen=True)
class Limits:
    """Limits of a program: wall-clock and CPU time, address space and file size (MB of 2**20 bytes), processes and threads."""

    seconds: float = 30.0  # generous, because MBPP's slowest solution (row 123) needs 2.4 s of an idle core
    cpu_seconds: int = 10
    memory_mb: int = 512
    file_mb: int = 1
    processes: int = 8


@dataclass(frozen=True)
class Verdict:
    """Whether a program's tests ran to their end without an error. `reason` is for display: the program can write to it."""

    passed: bool
    reason: str


def run_tests(program: str, tests: str, limits: Limits | None = None, namespaces: bool = True) -> Verdict:
    """Runs a program, then its tests in the same module. It passes if both run to their end.

    A program that passes runs again with a failing assertion after its tests, and must fail with exactly that assertion. This
    catches programs that make every test pass or end the tests early. `namespaces=False` runs without namespaces, as on a
    kernel that forbids them; tests use it.

    Raises LayerSkipError when the sandbox itself cannot be started.
    """
    limits = limits or Limits()
    verdict, _ = _supervised(program, tests, limits, namespaces)
    if verdict.passed:
        token = secrets.token_hex(16)
        again, _ = _supervised(program, f"{tests}\nraise AssertionError({token!r})\n", limits, namespaces)
        if again != Verdict(False, f"AssertionError: {token}"):
            return Verdict(False, "a failing assertion after its tests was not reached")
    return verdict


@cache
def standing_walls() -> tuple[str, ...]:
    """Those of WALLS that this machine supports."""
    return _supervised("", "", Limits(), namespaces=True)[1]


def _supervised(program: str, tests: str, limits: Limits, namespaces: bool) -> tuple[Verdict, tuple[str, ...]]:
    """One run: its verdict and its walls."""
    folder = tempfile.mkdtemp(prefix="layerskip-")
    settings = {"folder": folder, "namespaces": namespaces, "harness": os.getpid(), **asdict(limits)}
    try:
        answer = _ask_supervisor(settings, json.dumps({"program": program, "tests": tests}), limits.seconds + _GRACE_SECONDS)
    finally:
        folders.remove(folder)
    if answer is None:
        return Verdict(False, f"took more than {limits.seconds:g} s"), ()
    return Verdict(answer["passed"], answer["reason"]), tuple(answer["walls"])


def _ask_supervisor(settings: dict[str, Any], request: str, seconds: float) -> dict[str, Any] | None:
    """The supervisor's answer, or None if it does not answer in time."""
    # The fixed seed makes the order of sets, and so the verdict, reproducible. The program cannot see it.
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-B", "-c", _START, _ROOT, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=settings["folder"],
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
        text=True,
        encoding="utf-8",
    )
    try:
        answer, errors = process.communicate(request, seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
    if process.returncode != 0 or not answer:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        raise LayerSkipError(f"generated code cannot be run here: {lines[-1]}")
    verdict: dict[str, Any] = json.loads(answer)
    return verdict


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends a supervisor that is still running, so that it can kill its program first."""
    if process.returncode is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_SECONDS_TO_END)
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
