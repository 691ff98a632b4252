"""A program's temporary folder, where no file system in memory bounds it: how much lies there, and its removal."""

import os
import stat
from contextlib import suppress

from .namespaces import FOLDER_FILES, FOLDER_MB

_DEEPEST = 32


def outgrown(folder: str) -> bool:
    """Whether more lies in a folder than a program may keep. A folder that cannot be listed counts as too much."""
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
    except FileNotFoundError:  # the folder itself is replaced while it is looked at; next time it is seen
        return False
    except OSError:
        return True
    return False


def remove(folder: str) -> None:
    """Removes a folder with all that is in it, however deep: what lies two levels down comes up one level, until none does.

    Nothing may run there any more. What cannot be removed stays: it is a temporary folder.
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
                        os.chmod(inner.path, 0o700)  # a folder is moved by those who may write to it
                        os.rename(inner.path, f"{folder}/{os.urandom(8).hex()}")
                    else:
                        os.unlink(inner.path)
                os.rmdir(entry.path)
        os.rmdir(folder)
