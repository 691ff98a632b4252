"""Runs `layerskip` commands in forked children, as the shell would: streams, locale, closed descriptors."""

import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .forked import Child, Limits
from .outcome import Outcome

STREAMS = ("file", "closed", "full", "broken")  # what stdout or stderr may be


@dataclass(frozen=True)
class Command:
    """A command line with its environment. A `stdin` of None is closed; stdout and stderr are each one of STREAMS."""

    arguments: tuple[str, ...]
    stdin: bytes | None = b""
    stdout: str = "file"
    stderr: str = "file"
    encoding: str = "utf-8"
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = shlex.join(("layerskip", *(_short(argument) for argument in self.arguments)))
        more = [f"stdin={self.stdin[:80]!r}"] if self.stdin else ["stdin closed"] if self.stdin is None else []
        more += [f"{name} {kind}" for name, kind in (("stdout", self.stdout), ("stderr", self.stderr)) if kind != "file"]
        more += [self.encoding] if self.encoding != "utf-8" else []
        more += [f"{name}={value}" for name, value in self.environment.items()]
        return text + (f"  [{', '.join(more)}]" if more else "")


def start(
    command: Command, folder: Path, logs: Path, limits: Limits | None = None, prepare: Callable[[], None] | None = None
) -> Child:
    """Starts a command in a folder. Its output goes to files under `logs`. `prepare` runs first, in the command's process."""
    logs.mkdir(parents=True, exist_ok=True)
    opened: list[int] = []
    source = None
    if command.stdin is not None:
        (logs / "stdin").write_bytes(command.stdin)
        source = os.open(logs / "stdin", os.O_RDONLY)
        opened.append(source)
    streams = tuple(_stream(kind, opened) for kind in (command.stdout, command.stderr))
    try:
        return Child(lambda: _main(command, folder, prepare), logs, limits or Limits(), source, streams)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def run(command: Command, folder: Path, logs: Path, limits: Limits | None = None) -> Outcome:
    """Runs a command to its end."""
    outcome = start(command, folder, logs, limits).wait()
    assert outcome is not None
    return outcome


def interrupt_late(command: Command, folder: Path, logs: Path, seconds: float = 3.0) -> tuple[Outcome, bool]:
    """Sends Ctrl-C after so many seconds, for a command that may run long. Returns whether that was needed."""
    child = start(command, folder, logs)
    outcome = child.wait(seconds)
    if outcome is not None:
        return outcome, False
    child.send(signal.SIGINT)
    outcome = child.wait()
    assert outcome is not None
    return outcome, True


def _short(argument: str) -> str:
    return argument if len(argument) <= 200 else f"{argument[:60]}...({len(argument)} characters)"


def _stream(kind: str, opened: list[int]) -> int | None:
    if kind == "file":
        return -1
    if kind == "closed":
        return None
    if kind == "full":
        opened.append(os.open("/dev/full", os.O_WRONLY))
    else:
        reader, writer = os.pipe()
        os.close(reader)
        opened.append(writer)
    return opened[-1]


def _main(command: Command, folder: Path, prepare: Callable[[], None] | None) -> int:
    """Does what the console script does, until the interpreter ends."""
    import torch

    from cli.main import main

    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(command.environment)
    sys.argv = ["layerskip", *command.arguments]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _text(number, command.encoding))
        setattr(sys, f"__{name}__", getattr(sys, name))
    if prepare is not None:
        prepare()
    status = _status_of(main)
    sys.audit("layerskip.attack.done")
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception as error:  # as the interpreter does when it cannot flush a stream at exit
            status = 120
            with suppress(OSError):
                os.write(2, f"Exception ignored in: {stream.name}\n{type(error).__name__}: {error}\n".encode())
    return status


def _status_of(main: object) -> int:
    try:
        main()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        with suppress(Exception):
            os.write(2, str(ended.code).encode(errors="replace") + b"\n")
        return 1
    except KeyboardInterrupt:
        os.write(2, traceback.format_exc().encode(errors="replace"))
        return 130
    except BaseException:
        with suppress(OSError):
            os.write(2, traceback.format_exc().encode(errors="replace"))
        return 1
    return 0


def _text(descriptor: int, encoding: str) -> io.TextIOWrapper | None:
    """A standard stream as Python opens it; None for a closed one."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    raw = io.FileIO(descriptor, "rb" if descriptor == 0 else "wb", closefd=False)
    buffered = io.BufferedReader(raw) if descriptor == 0 else io.BufferedWriter(raw)
    errors = ("surrogateescape", "strict", "backslashreplace")[descriptor]
    return io.TextIOWrapper(buffered, encoding, errors, line_buffering=descriptor == 2)
