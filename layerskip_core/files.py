"""Files: read whole or by lines, written aside and renamed, locked by folder; JSON, parsed by
type.
"""

import errno
import gzip
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from .errors import DataError, LayerSkipError, LockedError, first_line

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LOCK = ".layerskip.lock"
# A folder being written; only the holder of the parent folder's lock makes one
_STAGING = ".layerskip-staging-"


def read_bytes(path: Path, name: str, error: type[LayerSkipError]) -> bytes:
    """The content of a file. Raises `error`, which begins with `name`, if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{name}: there is no such file") from None
    except OSError as reason:
        raise error(f"{name} cannot be read: {reason.strerror}") from None


def text_lines(path: Path, setting: str) -> Iterator[str]:
    """The lines of a UTF-8 file, unpacked if it ends in .gz, without a byte order mark. Raises
    DataError by line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1}"
        ) from None
    except FileNotFoundError:
        raise DataError(f"`{setting}` {path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        place = f" after line {number}" if number else ""
        raise DataError(f"`{setting}` {path} cannot be read{place}: {reason}") from None


def parse_json(text: str | bytes, where: str, error: type[LayerSkipError], kind: Any = Any) -> Any:
    """The value of a JSON text, of the type `kind`. Raises `error`, which begins with `where`."""
    try:
        content = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        return msgspec.json.decode(content.removeprefix(_BYTE_ORDER_MARK), type=kind)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON: {reason}") from None


def read_json(path: Path, error: type[LayerSkipError], kind: Any = dict[str, Any]) -> Any:
    """The value of a JSON file, of the type `kind`. Raises `error` as `parse_json` and `read_bytes`
    do.
    """
    return parse_json(read_bytes(path, str(path), error), str(path), error, kind)


def whole_lines(path: Path, error: type[LayerSkipError]) -> list[bytes]:
    """The lines of a journal with their ends, without an incomplete last one; none if there is no
    file.
    """
    content = read_bytes(path, str(path), error) if path.exists() else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def append_lines(path: Path, values: Iterable[object], error: type[LayerSkipError]) -> None:
    """Adds a JSON line for each value to a journal. Raises `error` if the file cannot be
    written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason


def write_file(path: Path, content: bytes, error: type[LayerSkipError]) -> None:
    """Replaces a file by a rename (a device is written to). Raises `error` if that fails; the file
    is then unchanged.
    """
    target = Path(os.path.realpath(path))
    # A killed process leaves this file, the next one overwrites it. No file of a model ends in
    # .part.
    temporary = target.with_name(f".layerskip-writing-{target.name}.part")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        with open(temporary, "wb") as file:
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        synchronise(target.parent)
    except BaseException as reason:
        temporary.unlink(missing_ok=True)
        if not isinstance(reason, OSError):
            raise
        raise error(f"cannot write {path}: {reason.strerror}") from reason


def require_writable(path: Path, error: type[LayerSkipError]) -> None:
    """Raises `error` for a folder, and if there is no folder to write to."""
    if path.is_dir():
        raise error(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise error(f"cannot write {path}: there is no folder {path.parent}")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but its lock."""
    return all(path.name == _LOCK for path in folder.iterdir())


def new_staging(folder: Path) -> Path:
    """A new, empty folder inside `folder`, to be renamed into place when complete. Needs the lock
    of `folder`.
    """
    staging = folder / f"{_STAGING}{secrets.token_hex(4)}"
    staging.mkdir(parents=True)
    return staging


def remove_leftovers(folder: Path) -> None:
    """Removes the staging folders of processes that were killed while writing. Needs the lock of
    `folder`.
    """
    for staging in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(written: Path, target: Path) -> None:
    """Renames a staging folder once everything in it is on disk, so that `target` is never
    incomplete.
    """
    for path in (*written.rglob("*"), written):
        synchronise(path)
    os.rename(written, target)
    synchronise(target.parent)


def discard_folder(folder: Path) -> None:
    """Removes a folder; renamed out of sight first, so that it is never seen incomplete."""
    hidden = folder.parent / f"{_STAGING}{secrets.token_hex(4)}"
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk: else a rename could survive a power cut
    without its content.
    """
    if sys.platform == "win32":  # flushes neither folders nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as reason:
        # Some network file systems cannot flush folders
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def hold(folder: str | Path, doing: str, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, and removes what killed processes left there.

    A missing folder is created, and removed again if still empty at the end. A thread may take a
    lock that it holds. `doing`: this process's work, for the message that others get. `wait`:
    seconds to wait for another process. Raises LockedError while another process holds the lock,
    LayerSkipError for a folder that cannot be created or written.
    """
    from filelock import FileLock, Timeout

    folder = Path(os.path.realpath(folder))
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / _LOCK
    lock = FileLock(file, is_singleton=True)
    first = not lock.is_locked
    holder = "another process"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait)
        except Timeout:
            with suppress(OSError):
                holder = file.read_text(encoding="utf-8", errors="replace").strip() or holder
            raise LockedError(
                f"{folder} is being written by {holder}; wait until it ends, or give another folder"
            ) from None
        except OSError as reason:
            raise LayerSkipError(f"cannot write to {folder}: {reason.strerror}") from reason
        try:
            if first:
                with suppress(OSError):  # on a full disk the lock works without its text
                    file.write_text(
                        f"pid {os.getpid()} on {socket.gethostname()}, {doing}\n", encoding="utf-8"
                    )
                remove_leftovers(folder)
            yield
        finally:
            if first:
                with suppress(OSError):
                    file.unlink()  # while the lock is held: a waiting process then makes a new file
            lock.release()
    finally:
        for path in created:
            with suppress(OSError):  # unless something was written there
                path.rmdir()
