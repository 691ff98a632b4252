"""Writes files so that each is whole or as it was: aside in the same folder, to disk, then one rename over a regular file.

Only regular files are ever renamed over. A symbolic link stays, and the file that it names is replaced; a device or a FIFO is
written to; anything else (a folder, a socket, a block device) is refused.
"""

import errno
import os
import secrets
import shutil
import socket
import stat
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

from ..errors import LayerSkipError

_STAGING = ".layerskip-staging-"  # a folder that is being written; only who holds the lock of the folder around it makes one
_ASIDE = ".layerskip-writing-"  # a file that is being written, by the machine and the process that follow
_DEAD = 3600.0  # seconds: what is in memory is written in less, so an older file aside is what a killed process left


def write_file(path: Path, content: bytes, error: type[LayerSkipError]) -> None:
    """Replaces a file's content, or writes to a device or FIFO. Raises `error` when it cannot; a file is then as it was."""
    require_writable(path, error)
    try:
        stream = _open_stream(path)
        if stream is not None:
            with os.fdopen(stream, "wb") as output:
                output.write(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as reason:
        told = "no process reads this FIFO" if reason.errno == errno.ENXIO else reason.strerror
        raise error(f"cannot write {path}: {told}") from reason


def require_writable(path: Path, error: type[LayerSkipError], regular: bool = False) -> None:
    """Raises `error` for what must not be written over: a folder, a socket, a block device.

    With `regular` also for a symbolic link, a device and a FIFO.
    """
    try:
        mode = (path.lstat() if regular else path.stat()).st_mode
    except FileNotFoundError:
        return
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from None
    if not (stat.S_ISREG(mode) or (_is_stream(mode) and not regular)):
        raise error(f"cannot write {path}: it is {kind_of(mode)}")


def kind_of(mode: int) -> str:
    """What a mode of `stat` is, as a word with its article."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def new_staging(folder: Path) -> Path:
    """A new folder of its own in `folder`, for what becomes part of it when it is whole. Needs the lock of `folder`."""
    staging = folder / f"{_STAGING}{secrets.token_hex(4)}"
    staging.mkdir(parents=True)
    return staging


def run_staging(folder: Path) -> Path:
    """As `new_staging`, but by a name that all processes of a distributed run know; the folder is not made."""
    return folder / f"{_STAGING}run"


def remove_leftovers(folder: Path) -> None:
    """Removes what processes left here that were killed while they wrote. Needs the lock of `folder`."""
    for staging in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)
    for aside in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError):
            if _is_left(aside):
                aside.unlink()


def discard_folder(folder: Path) -> None:
    """Removes a folder with all that is in it: out of sight by one rename first, so that half of it is never seen."""
    hidden = folder.parent / f"{_STAGING}{secrets.token_hex(4)}"
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Has the system write a file or a folder's entries to disk: a rename may otherwise outlive its content in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _is_left(aside: Path) -> bool:
    """Whether a file aside is what a killed process left: one of this machine that no longer runs, or a long time ago."""
    machine, _, rest = aside.name.removeprefix(_ASIDE).partition("-")
    if machine == _machine():
        with suppress(ValueError, OverflowError):
            try:
                os.kill(int(rest.partition("-")[0]), 0)
            except ProcessLookupError:
                return True
            except PermissionError:  # another user's
                return False
            return False
    return time.time() - aside.lstat().st_mtime > _DEAD


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _replace(path: Path, content: bytes) -> None:
    aside = path.parent / f"{_ASIDE}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    synchronise(path.parent)


def _open_stream(path: Path) -> int | None:
    """A descriptor to write to where a path is a device, a FIFO or this process's own output; None for any other file."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return None
    own = _own_output(path, there)
    if own is not None:
        if sys.stdout is not None:
            sys.stdout.flush()  # what was printed before stands before
        return os.dup(own)
    if not _is_stream(there.st_mode):
        return None
    descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)  # a FIFO without a reader is an error, not a wait
    os.set_blocking(descriptor, True)
    return descriptor


def _own_output(path: Path, there: os.stat_result) -> int | None:
    """1 or 2 for /dev/stdout, /proc/self/fd/2 and the like, which may be regular files that a shell redirects to."""
    if not os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return None
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
    return None


def _is_stream(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
