"""Calls of the kernel that Python has no function for. Standard library only."""

import ctypes
import os
import platform
import sys
from typing import Any

LINUX = sys.platform == "linux"


def call(name: str, *arguments: Any) -> int:
    """A function of the C library. Raises OSError when it returns less than 0."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def system_call(number: int, *arguments: Any) -> int:
    """A system call by its number: integers are passed as longs, so that no upper half is left to chance."""
    return call("syscall", ctypes.c_long(number), *(ctypes.c_long(one) if type(one) is int else one for one in arguments))


def prctl(option: int, *values: int) -> None:
    call("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def machine() -> str | None:
    """`x86_64` or `aarch64` for a 64-bit Linux process there, whose system calls are known here; else None."""
    known = LINUX and sys.maxsize > 2**32 and platform.machine() in ("x86_64", "aarch64")
    return platform.machine() if known else None
