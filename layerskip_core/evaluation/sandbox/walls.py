"""What keeps a program from the machine: namespaces, limits, an identity of its own, Landlock and a filter of system calls.

Standard library only, and Linux but for the limits. A wall that the kernel does not allow is left out; each function says
whether its own stands.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"
_SUBREAPER, _DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _KEEP_CAPABILITIES, _SECCOMP = 36, 1, 38, 8, 22  # prctl(2)
_MOUNTS, _IPC, _USERS, _PROCESSES, _NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # unshare(2)
_PRIVATE_MOUNTS = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE, mount(2)
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH, capabilities(7)
_FIRST_IDENTITY, _NOBODY = 1_879_048_192, 65534
_FOLDER_MB = 16

# landlock(7). Bits of file access: 1 is writing, 2 reading a file, 3 listing a folder, the others make and remove things.
_CREATE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446
_FILE_BITS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # bits known to each version, the last for all later ones
_READ, _READ_AND_LIST = 1 << 2, 1 << 2 | 1 << 3
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# seccomp(2): audit number of the architecture; calls that make a socket, by hand or through a ring of requests.
_ARCHITECTURES = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however that may be."""
    if LINUX:
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, wherever they hide."""
    if LINUX:
        _prctl(_SUBREAPER, 1)


def children() -> list[int]:
    """The living children of this process; none where /proc does not tell."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat") if LINUX else ():
        with suppress(OSError):
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[1]) == os.getpid():
                found.append(int(status.parent.name))
    return found


def enter_namespaces(folder: str) -> bool:
    """Network, mounts and IPC of this process become its own, and the processes of its children theirs.

    `folder` becomes a file system in memory of its own. False when the kernel forbids namespaces: nothing has changed then.
    """
    if not LINUX:
        return False
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _MOUNTS | _IPC | _PROCESSES | _NETWORK | (_USERS if uid else 0))
    except OSError:
        return False
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with suppress(OSError):
        _call("mount", b"none", b"/", None, _PRIVATE_MOUNTS, None)
        _call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={_FOLDER_MB}m,nr_inodes=1000,mode=700".encode())
    return True


def confine(request: dict[str, Any], identity: int | None, separate: bool) -> list[str]:
    """Confines this process for good; returns the walls that stand. `separate`: it is in namespaces of its own."""
    os.environ.clear()
    os.chdir(request["folder"])
    counted_alone = separate if identity is None else identity != _NOBODY
    _set_limits(request, 0 if counted_alone else _tasks_of(os.getuid() if identity is None else identity))
    standing = []
    if LINUX:
        _prctl(_NO_NEW_PRIVILEGES, 1)
        if _allow_files_only(request["folder"]):
            standing.append("files")
        if identity is not None:
            _become(identity, request["folder"], keep_reading="files" in standing)
        elif separate:
            _set_capabilities(0)
        if os.getuid():
            standing.append("privileges")
        if _forbid_sockets() or separate:
            standing.append("network")
    return standing


def _set_limits(request: dict[str, Any], others: int) -> None:
    """`others`: how many tasks count against the limit of processes although they are not the program's."""
    memory, file = request["memory_mb"] << 20, request["file_mb"] << 20
    cpu = request["cpu_seconds"]
    limits = [
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NPROC, request["processes"] + others),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    for kind, value in limits:
        _, most = resource.getrlimit(kind)
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        with suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (bound, bound))


def own_identity() -> int | None:
    """For root: a user that nobody else is, so that the limit of processes is the program's alone; `nobody` where users are
    not mapped. None for everybody else, who cannot change.
    """
    if not LINUX or os.getuid() != 0:
        return None
    candidate = _FIRST_IDENTITY + os.getpid() % 65536
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return _NOBODY
    return candidate if any(int(start) <= candidate < int(start) + int(count) for start, _, count in mapped) else _NOBODY


def _become(identity: int, folder: str, keep_reading: bool) -> None:
    """From root to an unprivileged user. It keeps root's right to read where Landlock bounds that: an interpreter under
    /root could else not load its own library.
    """
    os.chown(folder, identity, identity)
    _prctl(_KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(identity, identity, identity)
    os.setresuid(identity, identity, identity)
    try:
        _set_capabilities(_READ_ANY_FILE if keep_reading else 0)
    except OSError:  # of a container that has not got that one
        _set_capabilities(0)


def _set_capabilities(bits: int) -> None:
    """The effective and permitted ones; none can be inherited."""
    _call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", bits, bits, 0, 0, 0, 0))


def _tasks_of(uid: int) -> int:
    """Tasks, threads included, that already run as a user."""
    count = 0
    for process in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process))
    return count


def _allow_files_only(folder: str) -> bool:
    """Landlock: reading the system's libraries and Python's, all else in `folder` alone; no signals nor TCP to the outside."""
    try:
        version = _syscall(_CREATE_RULES, None, 0, 1)
    except OSError:
        return False
    every_file_bit = (1 << _FILE_BITS_BY_VERSION[min(version, 5)]) - 1
    handled = [every_file_bit, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    rules = _syscall(_CREATE_RULES, attributes, len(attributes), 0)
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    readable = {*_SYSTEM_FOLDERS, *packages, sys.prefix, sys.base_prefix, sys.exec_prefix}
    allowed = [(path, _READ_AND_LIST) for path in sorted(readable)] + [(path, _READ) for path in _SYSTEM_FILES]
    allowed += [("/dev/null", _READ | 1 << 1), (folder, every_file_bit & ~1)]
    for path, access in allowed:
        with suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", access, opened), 0)
            os.close(opened)
    _syscall(_RESTRICT, rules, 0)
    os.close(rules)
    return True


def _forbid_sockets() -> bool:
    """A seccomp filter (in classic BPF) under which no socket can be made. True when it stands."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    architecture, forbidden = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # the process; with EPERM
    count = len(forbidden)
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, count + 1, 0, 0x40000000),  # the same calls in their 32-bit form
        *((equal, count - place, 0, call) for place, call in enumerate(forbidden)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    instructions = b"".join(struct.pack("HBBI", code, true, false, value) for code, true, false, value in program)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    try:
        _prctl(_SECCOMP, 2, ctypes.addressof(head))
    except OSError:
        return False
    return True


def _prctl(option: int, *values: int) -> None:
    _call("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def _syscall(number: int, *arguments: Any) -> int:
    # The numbers are the same on every architecture from Linux 5.13 on.
    return _call("syscall", ctypes.c_long(number), *arguments)


def _call(name: str, *arguments: Any) -> int:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
