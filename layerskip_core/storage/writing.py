"""Atomic writes: content goes to a temporary name in the same folder, then to disk, then one rename puts it in place.

A rename replaces regular files only. A symbolic link stays, and the file that it points to is replaced; a device or a FIFO is
written to directly; anything else (a folder, a socket, a block device) is refused.
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

from ..errors import CheckpointError, LayerSkipError

_STAGING = ".layerskip-staging-"  # a folder being written; only the holder of the parent folder's lock makes one
_TEMPORARY = ".layerskip-writing-"  # a file being written; the machine and the process follow in its name
_ABANDONED = 3600.0  # seconds; writing content from memory takes less, so an older temporary file is a killed process's


def write_file(path: Path, content: bytes, error: type[LayerSkipError]) -> None:
    """Replaces a file's content, or writes to a device or FIFO. Raises `error` if it fails; a file is then unchanged."""
    require_writable(path, error)
    try:
        stream = _open_stream(path)
        if stream is not None:
            with os.fdopen(stream, "wb") as output:
                output.write(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as reason:
        cause = "no process reads this FIFO" if reason.errno == errno.ENXIO else reason.strerror
        raise error(f"cannot write {path}: {cause}") from reason


def require_writable(path: Path, error: type[LayerSkipError], regular: bool = False) -> None:
    """Raises `error` for a folder, a socket or a block device; with `regular` also for a symbolic link, a device and a FIFO."""
    try:
        mode = (path.lstat() if regular else path.stat()).st_mode
    except FileNotFoundError:
        return
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from None
    if not (stat.S_ISREG(mode) or (_is_stream(mode) and not regular)):
        raise error(f"cannot write {path}: it is {kind_of(mode)}")


def require_disk(folder: Path, needed: int, what: str, advice: str = "") -> None:
    """Raises CheckpointError if so many bytes do not fit on the disk of a folder, beside all but what that folder holds.

    It may not be there yet.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free + held
    if needed > free:
        found = f"{free >> 20} MB are free{advice and f'; {advice}'}"
        raise CheckpointError(f"{what} need {needed >> 20} MB of disk in {folder}, {found}")


def kind_of(mode: int) -> str:
    """The kind of file of a `stat` mode, as a word with its article."""
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
    """A new, empty folder inside `folder`, whose content is renamed into place when complete. Needs the lock of `folder`."""
    staging = folder / f"{_STAGING}{secrets.token_hex(4)}"
    staging.mkdir(parents=True)
    return staging


def run_staging(folder: Path) -> Path:
    """The staging folder of a training run, under a name that all its processes know. The folder is not created."""
    return folder / f"{_STAGING}run"


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of processes that were killed while writing. Needs the lock of `folder`."""
    for staging in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)
    for temporary in folder.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if _is_abandoned(temporary):
                temporary.unlink()


def publish_folder(written: Path, target: Path) -> None:
    """Renames a staging folder after everything in it is on disk, so that `target` is never seen incomplete."""
    for path in (*written.rglob("*"), written):
        synchronise(path)
    os.rename(written, target)
    synchronise(target.parent)


def discard_folder(folder: Path) -> None:
    """Removes a folder and its content. It is renamed out of sight first, so that it is never seen incomplete."""
    hidden = folder.parent / f"{_STAGING}{secrets.token_hex(4)}"
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk; in a power cut a rename could otherwise survive without the content."""
    if sys.platform == "win32":  # flushes neither folders nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file is gone: on this machine it no longer runs; elsewhere the file is old."""
    machine, _, rest = temporary.name.removeprefix(_TEMPORARY).partition("-")
    if machine == _machine():
        import psutil

        with suppress(ValueError, OverflowError):
            return not psutil.pid_exists(int(rest.partition("-")[0]))
    return time.time() - temporary.lstat().st_mtime > _ABANDONED


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.parent / f"{_TEMPORARY}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    synchronise(path.parent)


def _open_stream(path: Path) -> int | None:
    """A descriptor to write to if a path is a device, a FIFO or this process's own output; None for any other file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    own = _own_output(path, status)
    if own is not None:
        if sys.stdout is not None:
            sys.stdout.flush()  # keeps what was printed earlier in front
        return os.dup(own)
    if not _is_stream(status.st_mode):
        return None
    if sys.platform == "win32":
        return os.open(path, os.O_WRONLY | os.O_BINARY)
    descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)  # without a reader a FIFO fails instead of waiting
    os.set_blocking(descriptor, True)
    return descriptor


def _own_output(path: Path, status: os.stat_result) -> int | None:
    """1 or 2 for /dev/stdout, /proc/self/fd/2 and similar paths, which may be regular files that the shell redirects to."""
    if not os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return None
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _is_stream(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
