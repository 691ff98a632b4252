"""Hostile programs in the sandbox for generated code: as root and as a plain user, with namespaces and without."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hostile_programs import HostileProgram

from .campaign import Case
from .forked import Child, Limits
from .hostile import OUTLIVING, PROGRAMS
from .outcome import Miss, Outcome, misses_of

_WAYS = tuple((plain, namespaces) for plain in (False, True) for namespaces in (True, False))
_ALL = (*PROGRAMS, *OUTLIVING)
CASES, SHORT = len(_ALL) * len(_WAYS), range(0, 60, 8)
_STEP = 359  # a prime, so that the first cases are spread over the whole list
_PLAIN_USER = 61_837
_NEW_MOUNTS, _PRIVATE_MOUNTS, _BIND, _WHOLE_TREE = 0x20000, 0x44000, 0x1000, 0x4000  # unshare(2), mount(2)
_ROOT = Path(__file__).parents[2]
_KEY = 0x4C5300  # of System V shared memory; the case's number is added to it


def attack(case: Case) -> Iterator[Miss]:
    """One program in one setting."""
    place = case.number * _STEP % CASES
    program, (plain, namespaces) = _ALL[place // len(_WAYS)], _WAYS[place % len(_WAYS)]
    name = program if isinstance(program, str) else program.name
    case.say(f"{name}: {'plain user' if plain or os.getuid() else 'root'}, {'namespaces' if namespaces else 'no namespaces'}")
    marker = case.folder / "root"
    marker.symlink_to(_ROOT)
    (case.folder / "temporary").mkdir()
    (case.folder / "temporary").chmod(0o777)
    if isinstance(program, str):
        yield from _outlives(case, OUTLIVING[program], plain, namespaces, marker)
        return
    home = _home(case.folder / "home", plain)
    with subprocess.Popen(["/bin/sleep", "300"], user=_user(plain)) as bystander:
        try:
            before = _of_user(home, bystander.pid)
            outcome = _run(case, program, plain, namespaces, marker, home, bystander.pid)
            yield from misses_of(outcome)
            if outcome.out.startswith("passed"):
                yield Miss("breach", program.must_not_happen)
            if bystander.poll() is not None or (after := _of_user(home, bystander.pid)) != before:
                now = "gone" if bystander.poll() is not None else after
                yield Miss("breach", f"what is the user's has changed: {before} became {now}")
        finally:
            bystander.kill()
    if survivors := _survivors(marker):
        yield Miss("breach", f"processes outlive it: {survivors}")
    if _shared_memory(_KEY + case.number):
        yield Miss("breach", "shared memory outlives it")


def _run(case: Case, hostile: HostileProgram, plain: bool, namespaces: bool, marker: Path, home: Path, pid: int) -> Outcome:
    text = hostile.against(str(home), pid).replace("SHM", str(_KEY + case.number))

    def judge() -> int:
        from layerskip_core.evaluation.sandbox import standing_layers

        verdict = _harness(text, plain, namespaces, marker)
        missing = hostile.layer is not None and (not namespaces or hostile.layer not in standing_layers())
        os.write(1, f"{'passed' if verdict and not missing else 'failed'}\n".encode())
        return 0

    outcome = Child(judge, case.logs, Limits(), None, (-1, -1)).wait()
    assert outcome is not None
    return outcome


def _outlives(case: Case, program: str, plain: bool, namespaces: bool, marker: Path) -> Iterator[Miss]:
    """Kills the harness while a program runs that tries to survive it."""
    work = lambda: int(_harness(program, plain, namespaces, marker))  # noqa: E731
    child = Child(work, case.logs, Limits(), None, (-1, -1))
    child.wait(1.0 + case.random.random())
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while (survivors := _survivors(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in survivors:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if survivors:
        yield Miss("breach", f"processes outlive the harness: {survivors}")


def _harness(program: str, plain: bool, namespaces: bool, marker: Path) -> bool:
    """In a child: whether the program passed."""
    from layerskip_core.evaluation import sandbox

    if plain and os.getuid() == 0:
        try:
            _become_plain(marker.parent)
        except OSError:  # root may not mount on this machine: there is nothing to test
            return False
    tempfile.tempdir = str(marker.with_name("temporary"))  # files that a killed harness leaves are removed with the case
    sandbox._ROOT = str(marker)  # it appears in the command line of every process of the sandbox
    short = sandbox.Limits(seconds=3.0, cpu_seconds=2, memory_mb=512, processes=6)
    return sandbox.run_tests(program, "", short, namespaces).passed


def _become_plain(folder: Path) -> None:
    """Becomes a user with an unused id, in a mount namespace where Python and this checkout can be read."""
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


def _user(plain: bool) -> int | None:
    return _PLAIN_USER if plain and os.getuid() == 0 else None


def _home(home: Path, plain: bool) -> Path:
    """Creates the user's files that hostile programs look for."""
    home.mkdir()
    (home / "secret").write_text("secret")
    (home / "link").symlink_to("secret")
    with suppress(OSError):  # the file system has no extended attributes
        os.setxattr(home / "secret", "user.kept", b"kept")
    user = _user(plain)
    for path in (home, home / "secret", home / "link") if user is not None else ():
        os.lchown(path, user, user)
    return home


def _of_user(home: Path, pid: int) -> object:
    """Everything about a folder and a process that no program may change."""
    files = {}
    for path in (home, *sorted(home.iterdir())):
        status = path.lstat()
        files[path.name] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size, status.st_nlink)
    attributes = {name: os.getxattr(home / "secret", name) for name in os.listxattr(home / "secret")}
    limits = Path(f"/proc/{pid}/limits").read_text()
    return (
        files,
        attributes,
        os.getpriority(os.PRIO_PROCESS, pid),
        os.sched_getaffinity(pid),
        os.sched_getscheduler(pid),
        limits,
    )


def _survivors(marker: Path) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(marker).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def _shared_memory(key: int) -> bool:
    """Whether a segment with this key exists. Removes it."""
    c = ctypes.CDLL(None)
    found = c.shmget(key, 0, 0)
    if found >= 0:
        c.shmctl(found, 0, None)
    return bool(found >= 0)
