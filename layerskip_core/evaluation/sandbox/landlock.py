"""Landlock: allows reading the libraries of Python and the system, and everything in one folder; no signals to others."""

import os
import struct
from contextlib import suppress

from .kernel import LINUX, system_call
from .paths import SYSTEM_FILES, python_folders, system_folders

# landlock(7). Access bits: 1 is writing and 2 reading a file, 3 is listing a folder, the others create and remove entries.
# These system calls have the same numbers on every architecture.
_CREATE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446
_FILE_BITS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of access bits in each version; later ones have no more
_WRITE, _READ, _READ_AND_LIST = 1 << 1, 1 << 2, 1 << 2 | 1 << 3
_SIGNALS_SINCE = 6


def version() -> int:
    """The version of the kernel's Landlock; 0 without Landlock."""
    try:
        return system_call(_CREATE_RULES, None, 0, 1) if LINUX else 0
    except OSError:
        return 0


def bounds_signals() -> bool:
    return version() >= _SIGNALS_SINCE


def allow_files_only(folder: str) -> bool:
    """Restricts this process, permanently. False if the kernel has no Landlock."""
    known = version()
    if not known:
        return False
    every_file_bit = (1 << _FILE_BITS_BY_VERSION[min(known, 5)]) - 1
    handled = [every_file_bit, *([3] if known >= 4 else []), *([3] if known >= _SIGNALS_SINCE else [])]
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    rules = system_call(_CREATE_RULES, attributes, len(attributes), 0)
    allowed = [(path, _READ_AND_LIST) for path in (*system_folders(), *python_folders())]
    allowed += [(path, _READ) for path in SYSTEM_FILES]
    allowed += [("/dev/null", _READ | _WRITE), (folder, every_file_bit & ~1)]
    for path, access in allowed:
        with suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            system_call(_ADD_RULE, rules, 1, struct.pack("=Qi", access, opened), 0)
            os.close(opened)
    system_call(_RESTRICT, rules, 0)
    os.close(rules)
    return True
