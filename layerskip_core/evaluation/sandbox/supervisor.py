"""The process that isolates one program by every layer that the kernel offers, starts, watches and
ends it.

The program writes two lines to stdout: the names of its layers as JSON, and `passed` or the reason
of a failure. Standard library only.
"""

import ctypes
import json
import os
import signal
import struct
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from . import seccomp

# Windows lacks it; code tasks are scored there without running programs
with suppress(ImportError):
    import resource

LAYERS = ("files", "file names", "network", "processes", "system calls", "privileges")
FOLDER_MB = 16
FOLDER_FILES = 1000

_LINUX = sys.platform == "linux"
_SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)
# The last one has links to numeric libraries on Debian
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/etc/alternatives")
_FIRST_IDENTITY = 1_879_048_192
_NOBODY = 65534
# Prctl(2)
_DEATH_SIGNAL = 1
_KEEP_CAPABILITIES = 8
_NO_NEW_PRIVILEGES = 38
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH, capabilities(7)

# Unshare(2)
_MOUNTS = 0x20000
_USERS = 0x10000000
_NETWORK_PROCESSES_IPC_NAME = 0x6C000000
# Mount(2) and, with the same values, mount_setattr(2)
_READ_ONLY = 1
_NO_SETUID = 2
_NO_DEVICES = 4
_BIND = 0x1000
_RECURSIVE = 0x4000
_PRIVATE = 0x40000
_DETACH = 2  # umount2(2)
# AT_RECURSIVE
_MOUNT_SETATTR = 442
_WHOLE_TREE = 0x8000

# landlock(7). Access bits: 0 executes, 1 writes and 2 reads a file, 3 lists a folder.
_CREATE_RULES = 444
_ADD_RULE = 445
_RESTRICT = 446
# Number of access bits in each version; later versions add none
_FILE_BITS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_WRITE = 1 << 1
_READ = 1 << 2
_READ_AND_LIST = 1 << 2 | 1 << 3
_NETWORK_SINCE = 4  # the version that restricts TCP
_SIGNALS_SINCE = 6  # the version that restricts signals


def main() -> None:
    """Runs the request on stdin, then kills its whole process group. A traceback on stderr: the
    sandbox cannot be set up.
    """
    signal.signal(signal.SIGTERM, _end_all)
    end_with_parent(signal.SIGTERM)
    os.set_blocking(1, False)
    request = json.load(sys.stdin)
    identity = own_identity(request["folder"])
    if request["namespaces"]:
        enter_namespaces(identity)
    ready, start = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(ready)
        _run_program(request, start, identity)
    os.close(start)
    os.read(ready, 1)  # returns when the sandbox is set up: the time limit starts here
    reason = _watched(program, request["folder"], request["limits"]["seconds"])
    with suppress(BlockingIOError):  # a program can fill the pipe
        os.write(1, reason.encode())
    _end_all()


def _watched(program: int, folder: str, seconds: float) -> str:
    """Waits for the program's end; returns why it must be killed before, or an empty string."""
    deadline = time.monotonic() + seconds
    while os.waitpid(program, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            return f"took more than {seconds:g} s"
        if _too_large(folder):
            return f"its folder grew beyond {FOLDER_MB} MB or {FOLDER_FILES} files"
        time.sleep(0.005)
    return ""


def _too_large(folder: str) -> bool:
    """True if the folder exceeds its size or number of files. With namespaces its tmpfs enforces
    both.
    """
    files = size = 0
    with suppress(OSError, RecursionError):  # too deep
        for path, folders, names in os.walk(folder):
            files += len(folders) + len(names)
            for name in names:
                with suppress(FileNotFoundError):
                    size += os.lstat(os.path.join(path, name)).st_blocks * 512
            if files > FOLDER_FILES or size > FOLDER_MB << 20:
                return True
        return False
    return True


def _end_all(*_: object) -> None:
    """Kills this process and its group at once, so that none can fork meanwhile.

    A process namespace's first process dies with its parent, this one, and takes the others with
    it. Without a namespace the seccomp filter keeps all processes in the group.
    """
    os.killpg(0, signal.SIGKILL)


def _run_program(request: dict[str, Any], start: int, identity: int | None) -> NoReturn:
    """In the forked process: isolates it, runs the program and its tests, and writes the
    verdict.
    """
    # Before the program can replace them
    write = os.write
    leave = os._exit
    own_id = os.getpid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    standing = isolate(request["folder"], request["limits"], identity, request["namespaces"])
    write(verdict, json.dumps(standing).encode() + b"\n")
    for output in (1, 2):
        os.dup2(nowhere, output)
    os.close(nowhere)
    os.close(start)
    sys.path.remove(sys.argv[1])
    # Not __main__: other harnesses of these tasks do not run `if __name__ == "__main__"` either.
    module = sys.modules["program"] = ModuleType("program")
    try:
        exec(compile(request["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
        exec(compile(request["tests"], "<tests>", "exec", dont_inherit=True), module.__dict__)
        reason = "passed"
    except BaseException as error:
        reason = " ".join(traceback.format_exception_only(error)[-1].split())[:200]
    if os.getpid() == own_id:  # not a process that the program forked
        write(verdict, reason.encode(errors="replace") + b"\n")
    leave(0)


def isolate(folder: str, limits: dict[str, Any], identity: int | None, separate: bool) -> list[str]:
    """Restricts this process to its `folder`, permanently, as user `identity`; returns the names of
    the layers that are up.
    """
    if separate:
        _enter_small_tree(folder)
    os.chdir(folder)
    user = os.getuid() if identity is None else identity
    counted_alone = separate if identity is None else identity != _NOBODY
    _set_limits(limits, 0 if counted_alone else _tasks_of(user))
    if not _LINUX:
        return []
    _prctl(_NO_NEW_PRIVILEGES, 1)
    landlock = _allow_files_only(folder)
    _drop_privileges(folder, identity, may_read=landlock > 0)
    end_with_parent(signal.SIGKILL)
    only_signalled = None if separate or landlock >= _SIGNALS_SINCE else os.getpid()
    filtered = seccomp.filter_calls(separate, only_signalled)
    standing = (landlock > 0, separate, filtered or separate, separate, filtered, os.getuid() != 0)
    return [layer for layer, stands in zip(LAYERS, standing, strict=True) if stands]


def end_with_parent(number: int) -> None:
    """Makes the kernel send this signal when the parent ends. A change of user clears it."""
    if _LINUX:
        _prctl(_DEATH_SIGNAL, number)


def own_identity(folder: str) -> int | None:
    """Under root: gives `folder` to an unused user id, whose process limit counts the program
    alone, and returns the id.

    `nobody` if that id is not mapped in this user namespace. None for other users, or if `nobody`
    is not mapped either.
    """
    if _LINUX and os.getuid() == 0:
        for identity in (_FIRST_IDENTITY + os.getpid() % 65536, _NOBODY):
            with suppress(OSError):
                os.chown(folder, identity, identity)
                return identity
    return None


def _drop_privileges(folder: str, identity: int | None, may_read: bool) -> None:
    """Becomes an unprivileged user, who gets `folder`, and drops the capabilities.

    `may_read` keeps CAP_DAC_READ_SEARCH, so that an interpreter under /root can load its library;
    Landlock must restrict it.
    """
    kept = [0]
    if identity is not None:
        os.chown(folder, identity, identity)
        _prctl(_KEEP_CAPABILITIES, 1)
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
        kept = [_READ_ANY_FILE, 0] if may_read else kept
    for bits in kept:
        with suppress(OSError) if bits else nullcontext():  # in a container without this capability
            _call(
                "capset",
                struct.pack("Ii", 0x20080522, 0),
                struct.pack("6I", bits, bits, 0, 0, 0, 0),
            )  # none inheritable
            return


def _set_limits(limits: dict[str, Any], others: int) -> None:
    """Sets resource limits, all there is outside Linux. `others`: other programs' tasks, which the
    process limit counts too.
    """
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NPROC, limits["processes"] + others),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        # A lower limit is set already; macOS does not limit the address space
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _tasks_of(uid: int) -> int:
    """How many tasks, threads included, already run as this user."""
    count = 0
    for process in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process))
    return count


def enter_namespaces(identity: int | None) -> None:
    """Gives this process its own network, host name and IPC, and its children their own process
    ids.

    Without an `identity` to switch to, in a user namespace that maps only this user. Raises OSError
    if the kernel forbids it.
    """
    uid = os.getuid()
    gid = os.getgid()
    _call("unshare", _NETWORK_PROCESSES_IPC_NAME | (_USERS if identity is None else 0))
    if identity is None:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _enter_small_tree(folder: str) -> None:
    """Replaces the root by a tmpfs with read-only bind mounts of all readable paths, and an empty
    `folder` of limited size.
    """
    _call("unshare", _MOUNTS)
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NO_SETUID | _NO_DEVICES, "size=1m,nr_inodes=1000,mode=755")
    for path in _readable_folders():
        os.makedirs(folder + path, exist_ok=True)
        _bind(path, folder + path, _NO_SETUID | _NO_DEVICES)
    for path in filter(os.path.exists, _SYSTEM_FILES):
        os.makedirs(os.path.dirname(folder + path), exist_ok=True)
        os.close(os.open(folder + path, os.O_CREAT | os.O_WRONLY, 0o644))
        _bind(path, folder + path, _NO_SETUID)
    own = folder + folder
    os.makedirs(own)
    _mount(
        "tmpfs",
        own,
        "tmpfs",
        _NO_SETUID | _NO_DEVICES,
        f"size={FOLDER_MB}m,nr_inodes={FOLDER_FILES},mode=700",
    )
    os.chdir(folder)
    _call("pivot_root", b".", b".")  # mounts the old root on top of the new one
    _call("umount2", b".", _DETACH)


def _bind(source: str, target: str, flags: int) -> None:
    """A read-only bind mount, including the mounts below it."""
    _mount(source, target, None, _BIND | _RECURSIVE)
    attributes = (_READ_ONLY | flags).to_bytes(8, "little") + bytes(24)
    _system_call(_MOUNT_SETATTR, -100, target.encode(), _WHOLE_TREE, attributes, len(attributes))


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    def encoded(text: str | None) -> bytes | None:
        return text.encode() if text else None

    _call("mount", encoded(source), target.encode(), encoded(kind), flags, encoded(options))


def _readable_folders() -> list[str]:
    """The folders of the system, of the standard library and of installed packages, the outer ones
    first.
    """
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return sorted(
        filter(
            os.path.isdir,
            {*_SYSTEM_FOLDERS, *packages, sys.prefix, sys.base_prefix, sys.exec_prefix},
        )
    )


def _allow_files_only(folder: str) -> int:
    """Allows reading libraries, and in `folder` all but execution; no signals. Returns Landlock's
    version, 0 without it.
    """
    try:
        version = _system_call(_CREATE_RULES, None, 0, 1)
    except OSError:
        return 0
    every_file_bit = (1 << _FILE_BITS_BY_VERSION[min(version, 5)]) - 1
    handled = [every_file_bit]
    if version >= _NETWORK_SINCE:
        handled.append(3)  # binding and connecting by TCP
    if version >= _SIGNALS_SINCE:
        handled.append(3)  # abstract sockets and signals
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    rules = _system_call(_CREATE_RULES, attributes, len(attributes), 0)
    allowed = [(path, _READ_AND_LIST) for path in _readable_folders()]
    allowed += [(path, _READ) for path in _SYSTEM_FILES]
    allowed += [("/dev/null", _READ | _WRITE), (folder, every_file_bit & ~1)]
    for path, access in allowed:
        with suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _system_call(_ADD_RULE, rules, 1, struct.pack("=Qi", access, opened), 0)
            os.close(opened)
    _system_call(_RESTRICT, rules, 0)
    os.close(rules)
    return version


def _call(name: str, *arguments: Any) -> int:
    """Calls a function of the C library. Raises OSError if it returns a negative value."""
    result = int(getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _system_call(number: int, *arguments: Any) -> int:
    """A system call by its number. Integers are passed as longs, so that their upper halves are
    defined.
    """
    longs = (ctypes.c_long(value) if type(value) is int else value for value in arguments)
    return _call("syscall", ctypes.c_long(number), *longs)


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, *map(ctypes.c_ulong, (value, 0, 0, 0)))
