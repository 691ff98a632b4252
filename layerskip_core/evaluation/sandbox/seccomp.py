"""A filter of system calls, as a program in classic BPF: calls that are not on the list are refused.

A call of another architecture or of the x32 ABI ends the process, because its number has another meaning.
"""

import ctypes
import struct
from dataclasses import dataclass
from itertools import groupby

from .kernel import prctl
from .system_calls import ARCHITECTURES, NEWEST, Check, allowed, checked, missing

_SECCOMP, _FILTER = 22, 2  # prctl(2)
_KILL, _REFUSE, _NOT_THERE, _ALLOW = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000  # the process; EPERM; ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in seccomp_data, which describes a call
_LOAD, _AND, _EQUAL, _AT_LEAST, _MORE_THAN, _GIVE = 0x20, 0x54, 0x15, 0x35, 0x25, 0x06
_LONG_NUMBERS = 0x40000000  # calls of the x32 ABI are numbered from here


@dataclass(frozen=True)
class _Step:
    """One instruction. `true` and `false` are the numbers of instructions to skip."""

    code: int
    value: int
    true: int = 0
    false: int = 0

    def packed(self) -> bytes:
        return struct.pack("HBBI", self.code, self.true, self.false, self.value)


def filter_calls(machine: str, separate: bool, only_signalled: int | None) -> bool:
    """Filters the calls of this process and its descendants, permanently. False if the kernel cannot.

    See `checked` for `separate` and `only_signalled`.
    """
    steps = _program(machine, separate, only_signalled)
    packed = b"".join(step.packed() for step in steps)
    code = ctypes.create_string_buffer(packed, len(packed))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    try:
        prctl(_SECCOMP, _FILTER, ctypes.addressof(head))
    except OSError:
        return False
    return True


def _program(machine: str, separate: bool, only_signalled: int | None) -> list[_Step]:
    steps = [_load(_ARCHITECTURE), _Step(_EQUAL, ARCHITECTURES[machine], true=1), _give(_KILL), _load(_NUMBER)]
    steps += [_Step(_AT_LEAST, _LONG_NUMBERS, false=1), _give(_KILL)]
    for first, last in _ranges(allowed(machine)):
        steps += [_Step(_AT_LEAST, first, false=2), _Step(_MORE_THAN, last, true=1), _give(_ALLOW)]
    for number in missing(machine):
        steps += [_Step(_EQUAL, number, false=1), _give(_NOT_THERE)]
    for number, checks in checked(machine, separate, only_signalled).items():
        block = [step for check in checks for step in _test(check)] + [_give(_ALLOW)]
        steps += [_Step(_EQUAL, number, false=len(block)), *block]
    return [*steps, _Step(_MORE_THAN, NEWEST, false=1), _give(_NOT_THERE), _give(_REFUSE)]


def _test(check: Check) -> list[_Step]:
    """Refuses the call unless the check holds. Of these arguments the kernel reads the lower half only."""
    count = len(check.values)
    matches = [_Step(_EQUAL, value, true=count - place) for place, value in enumerate(check.values)]
    return [_load(_ARGUMENTS + 8 * check.argument), _Step(_AND, check.mask), *matches, _give(_REFUSE)]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of ascending numbers."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [(run[0][1], run[-1][1]) for run in runs]


def _load(offset: int) -> _Step:
    return _Step(_LOAD, offset)


def _give(verdict: int) -> _Step:
    return _Step(_GIVE, verdict)
