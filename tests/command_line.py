"""Runs the command line: `run` in this process, `start` in a new process."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from unittest.mock import patch

from pytest import MonkeyPatch

from cli.main import main

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-m", "cli")
_LISTING = """
import shlex, sys
from cli.main import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["layerskip", *shlex.split(line)]
    try:
        main()
    except SystemExit:
        pass
print(*sys.modules, file=sys.stderr)
"""
# Runs the commands in its lines, and prints the names of all loaded modules to stderr
LISTING_MODULES = (sys.executable, "-c", _LISTING)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def words(arguments: Iterable[str]) -> list[str]:
    """The words of a command line. Its first part, and each that begins with a flag, may hold
    several words.
    """
    found = []
    for number, part in enumerate(arguments):
        found += part.split() if number == 0 or part.startswith("--") else [part]
    return found


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def run(*arguments: str, stdin: str | bytes = b"", encoding: str = "utf-8") -> Result:
    """Calls `main()`, which turns every error into its message and exit status, as for a user."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with (
        TemporaryFile() as file,
        redirect_stdout(out),
        redirect_stderr(err),
        patch("sys.argv", ["layerskip", *words(arguments)]),
    ):
        file.write(stdin.encode() if isinstance(stdin, str) else stdin)
        file.seek(0)
        try:
            with patch("sys.stdin", io.TextIOWrapper(file, encoding)):
                main()
        except SystemExit as exit:
            code = exit.code or 0
    return Result(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def fails(message: str, *arguments: str, **keywords: str | bytes) -> None:
    """The command ends with status 1 or 2, one line that is exactly `error: message`, and nothing
    on stdout.
    """
    result = run(*arguments, **keywords)
    assert result == Result(result.code, "", f"error: {message}\n") and result.code in (1, 2)


def refused(part: str, *arguments: str, **keywords: str | bytes) -> None:
    """The command ends with status 1 or 2, one line of error that has this part, and nothing on
    stdout.
    """
    result = run(*arguments, **keywords)
    assert (result.out, result.err.count("\n")) == ("", 1) and part in result.err, (part, result)
    assert result.code in (1, 2)


def start(
    *arguments: str, command: tuple[str, ...] = COMMAND, **keywords: object
) -> subprocess.Popen[str]:
    """Starts a command that reacts to Ctrl-C, even if the tests run in the background, where the
    shell ignores it.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*command, *words(arguments)],
        text=True,
        preexec_fn=heed,
        **{"env": ENVIRONMENT, **pipes, **keywords},
    )


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> Result:
    out, err = process.communicate(stdin, timeout=120)
    return Result(process.returncode, out or "", err or "")


def measure_little(patch: MonkeyPatch) -> None:
    """Sweeps time passes once, after a short warm-up: the figures do not matter here."""
    measure = "layerskip_core.evaluation.measure"
    for name, count in (
        ("measuring._WARM_UP_TOKENS", 1),
        ("recommendation._FEWEST_TURNS", 2),
        ("prediction._MOST", 1),
        ("draft_profile._TIMES", 1),
    ):
        patch.setattr(f"{measure}.{name}", count)
