"""A program's temporary folder, if no file system in memory limits its size: checks its size, and removes it."""

import os
import stat
from contextlib import suppress

from .namespaces import FOLDER_FILES, FOLDER_MB

_DEEPEST = 32


def outgrown(folder: str) -> bool:
    """Whether a folder exceeds the size or number of files allowed. A folder that cannot be listed counts as too large."""
    files = size = 0
    waiting = [(folder, 0)]
    try:
        while waiting:
            path, depth = waiting.pop()
            for entry in os.scandir(path):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    files, size = files + 1, size + status.st_blocks * 512
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append((entry.path, depth + 1))
                if files > FOLDER_FILES or size > FOLDER_MB << 20 or depth > _DEEPEST:
                    return True
    except FileNotFoundError:  # the folder was just replaced; the next check sees the new one
        return False
    except OSError:
        return True
    return False


def remove(folder: str) -> None:
    """Removes a folder and its content, however deep: each pass moves the folders two levels down up by one level.

    No process may use the folder any more. What cannot be removed stays, as the folder is a temporary one.
    """
    with suppress(OSError):
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)  # moving a folder needs write permission on it
                        os.rename(inner.path, f"{folder}/{os.urandom(8).hex()}")
                    else:
                        os.unlink(inner.path)
                os.rmdir(entry.path)
        os.rmdir(folder)
