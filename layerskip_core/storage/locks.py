"""A lock per folder, so that only one process writes there. It ends with its process, even if that is killed."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LayerSkipError, LockedError
from .writing import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FILE = ".layerskip.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # errors of file systems without locks
_held: set[tuple[str, int, int]] = set()  # folder, process, thread


@contextmanager
def hold(folder: str | Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder and removes the temporary files that killed processes left there.

    A missing folder is created, and removed again if it is still empty at the end. `doing` tells other processes what this one
    does. A thread may take a lock that it already holds.

    The lock is a flock on an open file, so killing the process releases it. On systems without flock the file itself is the
    lock, and a killed process leaves it behind.

    Raises:
        LockedError: another process holds the lock; the message names it.
        LayerSkipError: the folder cannot be created or written.
    """
    key = (os.path.realpath(folder), os.getpid(), threading.get_ident())
    if key in _held:
        yield
        return
    created: list[Path] = []
    try:
        try:
            descriptor = _acquire(Path(folder), doing, created)
        except OSError as reason:
            raise LayerSkipError(f"cannot write to {folder}: {reason.strerror}") from reason
        _held.add(key)
        try:
            remove_leftovers(Path(folder))
            yield
        finally:
            _held.discard(key)
            _release(descriptor, Path(folder) / _FILE)
    finally:
        for path in created:
            with suppress(OSError):  # unless something was written there
                path.rmdir()


def _acquire(folder: Path, doing: str, created: list[Path]) -> int:
    """A descriptor of the locked file. Adds the folders that it creates to `created`, the innermost first."""
    file = folder / _FILE
    while True:
        created += [path for path in (folder, *folder.parents) if not path.exists() and path not in created]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open_held(file, folder)
        except FileNotFoundError:  # another process has just removed the folder that it had created
            continue
        # The holder of a lock removes its file at the end, so the locked file may no longer be the one in the folder.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                break
        os.close(descriptor)
    holder = f"pid {os.getpid()} on {socket.gethostname()}, {doing}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with suppress(OSError):  # on a full disk the lock works without its text
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
    return descriptor


def _release(descriptor: int, file: Path) -> None:
    """Removes the file while the lock is held: see _acquire. Windows removes no open file, but there the file is the lock."""
    try:
        if fcntl is not None:
            with suppress(OSError):
                os.unlink(file)
    finally:
        os.close(descriptor)
    if fcntl is None:
        with suppress(OSError):
            os.unlink(file)


def _open_held(file: Path, folder: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor, is_new = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor, is_new = os.open(file, flags), False
    try:
        granted = _lock(descriptor)
        if granted or (granted is None and is_new):
            return descriptor
        message = f"{folder} is being written by {_holder(descriptor)}; wait until it ends, or give another folder"
        raise LockedError(message if granted is False else f"{message}; if no such process runs, remove {file}")
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int) -> bool | None:
    """Whether the system grants the lock; None if it has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as reason:
        if reason.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if reason.errno in _NO_LOCKS:
            return None
        raise
    return True


def _holder(descriptor: int) -> str:
    with suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        first = os.read(descriptor, 300).decode("utf-8", "replace").partition("\n")[0]
        return "".join(letter for letter in first if letter.isprintable()) or "another process"
    return "another process"
