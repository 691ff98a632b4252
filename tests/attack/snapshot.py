"""The contents of a folder, to compare before and after an attack."""

import hashlib
import os
import stat
from pathlib import Path

Snapshot = dict[str, str]  # path below the folder -> description of its content


def snapshot(folder: Path) -> Snapshot:
    """Every file, folder, link, FIFO and device below a folder, without following links."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            found[str(path.relative_to(folder))] = _kind(path)
    return found


def changes(before: Snapshot, after: Snapshot, allowed: tuple[str, ...] = ()) -> list[str]:
    """What is gone or changed, except paths that begin with one of `allowed`. New files are no loss."""
    return [
        f"{path} ({kind.split()[0]}) {'is gone' if path not in after else f'became {after[path]}'}"
        for path, kind in before.items()
        if after.get(path) != kind and not path.startswith(allowed or ("\0",))
    ]


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file " + hashlib.sha1(path.read_bytes()).hexdigest()
    return f"node {stat.S_IFMT(mode):o} {path.lstat().st_rdev}"
