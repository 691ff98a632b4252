"""Kernel interfaces that Python has no functions for. Standard library only."""

import ctypes
import os
import platform
import sys
from typing import Any

LINUX = sys.platform == "linux"


def call(name: str, *arguments: Any) -> int:
    """Calls a function of the C library. Raises OSError if it returns a negative value."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def system_call(number: int, *arguments: Any) -> int:
    """A system call by its number. Integers are passed as longs, so that their upper halves are defined."""
    return call(
        "syscall", ctypes.c_long(number), *(ctypes.c_long(value) if type(value) is int else value for value in arguments)
    )


def prctl(option: int, *values: int) -> None:
    call("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def machine() -> str | None:
    """`x86_64` or `aarch64` for a 64-bit Linux process on these processors, whose system calls we know; else None."""
    known = LINUX and sys.maxsize > 2**32 and platform.machine() in ("x86_64", "aarch64")
    return platform.machine() if known else None
