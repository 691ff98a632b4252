"""Gives a program its own network, processes, IPC and mounts, and a file tree that holds only what it may read."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .kernel import LINUX, call, system_call
from .paths import SYSTEM_FILES, python_folders, system_folders

FOLDER_MB, FOLDER_FILES = 16, 1000
_MOUNTS, _HOST_NAME, _IPC, _USERS = 0x20000, 0x4000000, 0x8000000, 0x10000000  # unshare(2)
_PROCESSES, _NETWORK = 0x20000000, 0x40000000
_READ_ONLY, _NO_SETUID, _NO_DEVICES = 1, 2, 4  # mount(2) and, with the same values, mount_setattr(2)
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 32, 0x1000, 0x4000, 0x40000
_DETACH = 2  # umount2(2)
_MOUNT_SETATTR, _WHOLE_TREE = 442, 0x8000  # AT_RECURSIVE
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def enter_namespaces() -> bool:
    """Gives this process its own network, host name and IPC, and its children their own process ids.

    False if the kernel forbids namespaces; then nothing has changed.
    """
    if not LINUX:
        return False
    kinds = _HOST_NAME | _IPC | _PROCESSES | _NETWORK
    try:
        if os.getuid() == 0:
            call("unshare", kinds)
        elif _succeeds_in_a_child(_own_users):
            _own_users(kinds)
        else:
            return False
    except OSError:
        return False
    return True


def _own_users(more_kinds: int = 0) -> None:
    """Creates a user namespace with this user alone. Some systems allow the namespace but refuse to map its ids."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", _USERS | more_kinds)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _succeeds_in_a_child(act: Callable[[], None]) -> bool:
    """Tries in a child process what could not be undone in this one."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def enter_small_tree(folder: str, machine: str | None) -> bool:
    """Replaces this process's root by a tree in memory: read-only views of what may be read, and an empty, limited `folder`.

    The process gets its own mounts. False if mounts are forbidden.
    """
    if machine is None:
        return False
    try:
        call("unshare", _MOUNTS)
        _mount(None, "/", None, _RECURSIVE | _PRIVATE)
        _mount("tmpfs", folder, "tmpfs", _NO_SETUID | _NO_DEVICES, "size=1m,nr_inodes=1000,mode=755")
        for path in _outermost([*system_folders(), *python_folders()]):
            os.makedirs(folder + path, exist_ok=True)
            _bind(path, folder + path, _NO_SETUID | _NO_DEVICES)
        for path in SYSTEM_FILES:
            if os.path.exists(path):
                os.makedirs(os.path.dirname(folder + path), exist_ok=True)
                os.close(os.open(folder + path, os.O_CREAT | os.O_WRONLY, 0o644))
                _bind(path, folder + path, _NO_SETUID)
        own = folder + folder
        os.makedirs(own)
        _mount("tmpfs", own, "tmpfs", _NO_SETUID | _NO_DEVICES, f"size={FOLDER_MB}m,nr_inodes={FOLDER_FILES},mode=700")
        _enter(folder, _PIVOT_ROOT[machine])
    except OSError:
        with suppress(OSError):  # undo what has been mounted
            call("umount2", folder.encode(), _DETACH)
        return False
    return True


def _enter(root: str, pivot_root: int) -> None:
    os.chdir(root)
    system_call(pivot_root, b".", b".")  # mounts the old root on top of the new one
    call("umount2", b".", _DETACH)
    os.chdir("/")
    with suppress(OSError):  # Landlock forbids writing there anyway
        _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES)


def _bind(source: str, target: str, flags: int) -> None:
    """A read-only bind mount, including the mounts below it."""
    _mount(source, target, None, _BIND | _RECURSIVE)
    attributes = (_READ_ONLY | flags).to_bytes(8, "little") + bytes(24)
    system_call(_MOUNT_SETATTR, -100, target.encode(), _WHOLE_TREE, attributes, len(attributes))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    source_, kind_, options_ = (text.encode() if text else None for text in (source, kind, options))
    call("mount", source_, target.encode(), kind_, flags, options_)


def _outermost(paths: list[str]) -> list[str]:
    """The paths that lie in none of the others."""
    kept: list[str] = []
    for path in sorted(paths):
        if not any(path == other or path.startswith(other.rstrip("/") + "/") for other in kept):
            kept.append(path)
    return kept
