"""Hostile programs in the sandbox for generated code: as root and as a plain user, with namespaces and without."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .campaign import Case
from .forked import Child, Limits
from .hostile import FORGERIES, OUTLIVING, PROGRAMS
from .outcome import Miss, misses_of

_WAYS = tuple((plain, namespaces) for plain in (False, True) for namespaces in (True, False))
_NAMES = (*PROGRAMS, *FORGERIES, *OUTLIVING)
CASES, SHORT = len(_NAMES) * len(_WAYS), 24
_STEP = 37  # coprime to the number of cases: the short run takes programs and ways from the whole list
_PLAIN_USER = 61_837
_NEW_MOUNTS, _PRIVATE_MOUNTS, _BIND, _WHOLE_TREE = 0x20000, 0x44000, 0x1000, 0x4000  # unshare(2), mount(2)
_ROOT = Path(__file__).parents[2]


def attack(case: Case) -> Iterator[Miss]:
    """One program in one way."""
    place = case.number * _STEP % CASES
    name, (plain, namespaces) = _NAMES[place // len(_WAYS)], _WAYS[place % len(_WAYS)]
    case.say(f"{name}: {'plain user' if plain or os.getuid() else 'root'}, {'namespaces' if namespaces else 'no namespaces'}")
    victim = case.folder / "victim"
    victim.mkdir()
    (victim / "secret").write_text("a secret of the user, 49 characters long, no more")
    user = _PLAIN_USER if plain and os.getuid() == 0 else None
    for path in (victim, victim / "secret") if user else ():
        os.chown(path, user, user)
    before = (victim / "secret").stat()
    with subprocess.Popen(["/bin/sleep", "120"], user=user) as bystander:
        try:
            yield from _run(case, name, plain, namespaces, victim, bystander)
        finally:
            bystander.kill()
    after = (victim / "secret").stat()
    changed = [
        one
        for one in ("st_mode", "st_mtime_ns", "st_size", "st_uid", "st_nlink")
        if getattr(before, one) != getattr(after, one)
    ]
    attributes = os.listxattr(victim / "secret")
    if changed or attributes or sorted(os.listdir(victim)) != ["secret"]:
        yield Miss("breach", f"{name}: the user's files have changed: {changed}, {attributes}, {os.listdir(victim)}")


def _run(
    case: Case, name: str, plain: bool, namespaces: bool, victim: Path, bystander: "subprocess.Popen[bytes]"
) -> Iterator[Miss]:
    told = {"VICTIM": repr(str(victim)), "PID": str(bystander.pid), "SHM": str(0x4C5300 + case.number)}
    marker = case.folder / "root"
    marker.symlink_to(_ROOT)
    if name in OUTLIVING:
        yield from _outlives(case, OUTLIVING[name], plain, namespaces, marker)
        return
    program, tests = FORGERIES.get(name) or (PROGRAMS[name], "")
    for word, value in told.items():
        program = program.replace(word, value)
    child = Child(lambda: _harness(program, tests, plain, namespaces, marker), case.logs, Limits(), None, (-1, -1))
    outcome = child.wait()
    assert outcome is not None
    yield from misses_of(outcome)
    if outcome.out.startswith("passed"):
        yield Miss("breach", f"{name}: what it tried has worked")
    elif bystander.poll() is not None:
        yield Miss("breach", f"{name}: it ended a process of the user")
    if os.getpriority(os.PRIO_PROCESS, bystander.pid) != os.getpriority(os.PRIO_PROCESS, 0):
        yield Miss("breach", f"{name}: it changed the priority of a process of the user")
    if survivors := _survivors(marker):
        yield Miss("breach", f"{name}: processes outlive it: {survivors}")
    if _shared_memory(0x4C5300 + case.number):
        yield Miss("breach", f"{name}: shared memory outlives it")


def _outlives(case: Case, program: str, plain: bool, namespaces: bool, marker: Path) -> Iterator[Miss]:
    """The harness is killed while a program runs that wants to stay."""
    child = Child(lambda: _harness(program, "", plain, namespaces, marker), case.logs, Limits(), None, (-1, -1))
    child.wait(1.0 + case.random.random())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while (survivors := _survivors(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if survivors:
        yield Miss("breach", f"processes outlive the harness: {survivors}")
        for pid in survivors:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _harness(program: str, tests: str, plain: bool, namespaces: bool, marker: Path) -> int:
    """In a child: says on stdout whether the program passed."""
    from layerskip_core.evaluation import sandbox

    if plain and os.getuid() == 0:
        try:
            _become_plain(marker.parent)
        except OSError as error:  # of a machine where root may not mount
            os.write(1, f"not tried: {error}\n".encode())
            return 0
    sandbox._ROOT = str(marker)  # it stands in the command line of every process of the sandbox
    short = sandbox.Limits(seconds=6.0, cpu_seconds=3, memory_mb=512, processes=6)
    verdict = sandbox.run_tests(program, tests, short, namespaces)
    os.write(1, f"{'passed' if verdict.passed else 'failed'}: {verdict.reason}\n".encode(errors="replace"))
    return 0


def _become_plain(folder: Path) -> None:
    """Becomes a user of a number that nobody has, in a mount namespace where Python and this checkout can be reached."""
    c = ctypes.CDLL(None, use_errno=True)
    needed = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, _ROOT, folder)}
    if c.unshare(_NEW_MOUNTS) or c.mount(b"none", b"/", None, _PRIVATE_MOUNTS, None):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    for path in needed:
        closed = next((one for one in reversed(path.parents) if not one.stat().st_mode & 1), None)
        if closed is None:
            continue
        held = os.open(path, os.O_PATH)
        if c.mount(b"none", bytes(closed), b"tmpfs", 0, b"mode=755"):
            raise OSError(ctypes.get_errno(), f"nothing can be mounted at {closed}")
        path.mkdir(parents=True)
        if c.mount(f"/proc/self/fd/{held}".encode(), bytes(path), None, _BIND | _WHOLE_TREE, None):
            raise OSError(ctypes.get_errno(), f"{path} cannot be mounted")
        os.close(held)
    os.setgroups([])
    os.setresgid(_PLAIN_USER, _PLAIN_USER, _PLAIN_USER)
    os.setresuid(_PLAIN_USER, _PLAIN_USER, _PLAIN_USER)
    os.environ["HOME"] = "/nonexistent"


def _survivors(marker: Path) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(marker).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def _shared_memory(key: int) -> bool:
    """Whether there is a segment of this key; it is removed."""
    c = ctypes.CDLL(None)
    found = c.shmget(key, 0, 0)
    if found >= 0:
        c.shmctl(found, 0, None)
    return bool(found >= 0)
