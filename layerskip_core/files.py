"""Files: read whole or by lines, written aside and renamed, locked by folder; JSON, and its values by type."""

import errno
import gzip
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from .errors import CheckpointError, DataError, LayerSkipError, LockedError, first_line

_QUOTED = 80  # characters of a value in an error
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LOCK = ".layerskip.lock"
_STAGING = ".layerskip-staging-"  # a folder being written; only the holder of the parent folder's lock makes one
_TEMPORARY = ".layerskip-writing-"  # a file being written
_ABANDONED = 3600.0  # seconds; writing content from memory takes less, so an older temporary file is a killed process's


# Reading


def read_bytes(path: Path, name: str, error: type[LayerSkipError]) -> bytes:
    """The content of a file. Raises `error`, whose message begins with `name`, if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{name}: there is no such file") from None
    except OSError as reason:
        raise error(f"{name} cannot be read: {reason.strerror}") from None


def read_text(path: Path, name: str, error: type[LayerSkipError]) -> str:
    """The text of a UTF-8 file without a byte order mark. Raises `error` as `read_bytes` does."""
    try:
        return read_bytes(path, name, error).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{name} must be UTF-8 text: {reason.reason} at byte {reason.start + 1}") from None


def text_lines(path: Path, setting: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends, without a byte order mark; unpacked if its name ends in .gz.

    Raises DataError for a file that cannot be read (`setting` named it), and, with its number, for a line that is not UTF-8.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except FileNotFoundError:
        raise DataError(f"`{setting}` {path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        place = f" after line {number}" if number else ""
        raise DataError(f"`{setting}` {path} cannot be read{place}: {reason}") from None


def quoted(value: Any) -> str:
    """A value for an error message: on one line, at most 80 characters."""
    return _cut(repr(value[: 2 * _QUOTED] if isinstance(value, str | bytes | list) else value))


def listed(names: Iterable[str]) -> str:
    """Names for an error message: on one line, at most 80 characters."""
    return _cut(", ".join(name if name.isprintable() else repr(name) for name in names) or "none")


def _cut(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


# JSON


def parse_json(text: str | bytes, where: str, error: type[LayerSkipError]) -> Any:
    """The value of a JSON text. Raises `error`, whose message begins with `where`, for anything but valid JSON in UTF-8."""
    try:
        content = text.encode() if isinstance(text, str) else text
        return msgspec.json.decode(content.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON: {reason}") from None


def read_json(path: Path, error: type[LayerSkipError]) -> Any:
    """The value of a JSON file. Raises `error` as `parse_json` does, and for a file that cannot be read."""
    return parse_json(read_bytes(path, str(path), error), str(path), error)


def read_json_object(path: Path, error: type[LayerSkipError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` as `read_json` does, and for any other value."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: needed a JSON object, found {type(value).__name__}")
    return value


def whole_lines(path: Path, error: type[LayerSkipError]) -> list[bytes]:
    """The lines of a journal with their ends; none if there is no file. A killed process may leave the last one incomplete: it
    is left out.
    """
    content = read_bytes(path, str(path), error) if path.exists() else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def append_lines(path: Path, values: Iterable[object], error: type[LayerSkipError]) -> None:
    """Adds a JSON line for each value to a journal. Raises `error` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason


# Writing


def write_file(path: Path, content: bytes, error: type[LayerSkipError]) -> None:
    """Replaces a file's content as a whole, by a rename. A symbolic link stays; a device or FIFO is written to.

    Raises `error` if it fails; the file is then unchanged.
    """
    require_writable(path, error)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason


def require_writable(path: Path, error: type[LayerSkipError]) -> None:
    """Raises `error` for a folder."""
    if path.is_dir():
        raise error(f"cannot write {path}: it is a folder")


def require_disk(folder: Path, needed: int, what: str, advice: str = "") -> None:
    """Raises CheckpointError if `needed` bytes do not fit on the disk of a folder, whose present content will be replaced.

    The folder may not exist yet.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free + held
    if needed > free:
        found = f"{free >> 20} MB are free{advice and f'; {advice}'}"
        raise CheckpointError(f"{what} need {needed >> 20} MB of disk in {folder}, {found}")


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
            if time.time() - temporary.lstat().st_mtime > _ABANDONED:
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


def _replace(path: Path, content: bytes) -> None:
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(4)}"
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


# Locking


@contextmanager
def hold(folder: str | Path, doing: str, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, and removes what killed processes left there.

    A missing folder is created, and removed again if it is still empty at the end. A thread may take a lock that it already
    holds. The system releases the lock of a process that is killed.

    Args:
        folder: the folder to write to.
        doing: what this process does there, for the message that others get.
        wait: seconds to wait for another process.

    Raises:
        LockedError: another process holds the lock; the message names it.
        LayerSkipError: the folder cannot be created or written.
    """
    from filelock import FileLock, Timeout

    folder = Path(os.path.realpath(folder))
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / _LOCK
    lock = FileLock(file, is_singleton=True)
    first = not lock.is_locked
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait)
        except Timeout:
            message = f"{folder} is being written by {_holder(file)}; wait until it ends, or give another folder"
            raise LockedError(message) from None
        except OSError as reason:
            raise LayerSkipError(f"cannot write to {folder}: {reason.strerror}") from reason
        try:
            if first:
                with suppress(OSError):  # on a full disk the lock works without its text
                    file.write_text(f"pid {os.getpid()} on {socket.gethostname()}, {doing}\n", encoding="utf-8")
                remove_leftovers(folder)
            yield
        finally:
            if first:
                with suppress(OSError):
                    file.unlink()  # while the lock is held: who waits for this file then makes a new one
            lock.release()
    finally:
        for path in created:
            with suppress(OSError):  # unless something was written there
                path.rmdir()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
