"""One writer for each folder: a lock that ends with its process, however that ends."""

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
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # what a file system without locks answers
_held: set[tuple[str, int, int]] = set()  # folder, process and thread


@contextmanager
def hold(folder: str | Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder, which is made if there is none; one that is still empty at the end is removed again.
    What killed processes left aside there is removed.

    `doing` is what others are told. Who holds a lock already, in the same thread, may take it again.

    The lock is the system's (flock) on a file that stays open: killing the process frees it. Where the system has none, it is
    the file itself, which a killed process leaves behind.

    Raises:
        LockedError: somebody else holds it; the message says who.
        LayerSkipError: the folder cannot be made or written.
    """
    mine = (os.path.realpath(folder), os.getpid(), threading.get_ident())
    if mine in _held:
        yield
        return
    made: list[Path] = []
    try:
        try:
            descriptor = _acquire(Path(folder), doing, made)
        except OSError as reason:
            raise LayerSkipError(f"cannot write to {folder}: {reason.strerror}") from reason
        _held.add(mine)
        try:
            remove_leftovers(Path(folder))
            yield
        finally:
            _held.discard(mine)
            try:
                with suppress(OSError):
                    os.unlink(Path(folder) / _FILE)  # while it is held: see _acquire
            finally:
                os.close(descriptor)
    finally:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def _acquire(folder: Path, doing: str, made: list[Path]) -> int:
    """A descriptor of the lock file, held. Adds the folders that it makes to `made`, the innermost first."""
    file = folder / _FILE
    while True:
        made += [path for path in (folder, *folder.parents) if not path.exists() and path not in made]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open_held(file, folder)
        except FileNotFoundError:  # another process has just removed the folder, which it had made
            continue
        # Whoever holds the lock removes its file at the end: what was locked may be no longer what stands there.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                break
        os.close(descriptor)
    told = f"pid {os.getpid()} on {socket.gethostname()}, {doing}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with suppress(OSError):  # a full disk: the lock holds without its text
        os.ftruncate(descriptor, 0)
        os.write(descriptor, told.encode())
    return descriptor


def _open_held(file: Path, folder: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor, made = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor, made = os.open(file, flags), False
    try:
        known = _lock(descriptor)
        if known or (known is None and made):
            return descriptor
        told = f"{folder} is being written by {_holder(descriptor)}; wait until it ends, or give another folder"
        raise LockedError(told if known is False else f"{told}; if no such process runs, remove {file}")
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int) -> bool | None:
    """Whether the system gives the lock; None where it has none to give."""
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
        first = os.pread(descriptor, 300, 0).decode("utf-8", "replace").partition("\n")[0]
        return "".join(letter for letter in first if letter.isprintable()) or "another process"
    return "another process"
