"""A seccomp filter that allows a list of system calls and refuses all others; README.md gives the
reasons.
"""

import ctypes
import platform
import struct
import sys
from collections.abc import Iterator

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's AUDIT_ARCH_ constants
_NEWEST = 450  # the highest call number known to this table; higher ones fail with ENOSYS

# Each call with its numbers on x86_64 and aarch64 (`-`: none).
_ALLOWED = (
    # memory
    "brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227, membarrier 324 283",
    # files
    "read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70",
    "preadv2 327 286, pwritev2 328 287, lseek 8 62, sendfile 40 71, copy_file_range 326 285, fadvise64 221 223, fsync 74 82",
    "fdatasync 75 83, ftruncate 77 46, fallocate 285 47, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24",
    "stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439",
    "readlink 89 -, readlinkat 267 78, fstatfs 138 44, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49",
    "fchdir 81 50, umask 95 166, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -",
    "renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, creat 85 -",
    # waiting
    "pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20",
    "epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19",
    "timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87, signalfd 282 -, signalfd4 289 74, futex 202 98",
    "futex_waitv 449 449",
    # connected pairs
    "sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockopt 55 209, getsockname 51 204",
    "getpeername 52 205",
    # time and random numbers
    "clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -",
    "times 100 153, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -, getrandom 318 278",
    # signals
    "rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137",
    "rt_sigsuspend 130 133, sigaltstack 131 132",
    # processes
    "fork 57 -, vfork 58 -, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94, set_tid_address 218 96",
    "set_robust_list 273 99, rseq 334 293, restart_syscall 219 128, sched_yield 24 124",
    # identity, limits and system information
    "getpid 39 172, getppid 110 173, gettid 186 178, getpgid 121 155, getpgrp 111 -, getsid 124 156, getuid 102 174",
    "geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150",
    "getrusage 98 165, getrlimit 97 163, setrlimit 160 164, uname 63 160, sysinfo 99 179, getcpu 309 168",
    "sched_getaffinity 204 123, sched_get_priority_max 146 125, sched_get_priority_min 147 126",
)
# Calls that fail with ENOSYS, as on an older kernel: the C library then falls back to an allowed
# one.
_MISSING = "clone3 435 435, openat2 437 437"

_ALL = 0xFFFFFFFF
# Open(2)
_PATH_ONLY = 0o10000000
_TRUNCATE = 0o1000
_ACCESS_MODE = 0o3
_OPENING = _PATH_ONLY | _TRUNCATE | _ACCESS_MODE
# Landlock does not check O_PATH, nor, before version 3, O_TRUNC with O_RDONLY: both are refused
# here.
_OPENINGS = (0, 1, 2, _TRUNCATE | 1, _TRUNCATE | 2)
# Duplicating descriptors, their flags, a pipe's size; not F_SETOWN, which directs signals, nor
# leases or notifications.
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032)
# Reading a terminal's settings and size; blocking mode, close-on-exec, bytes available.
_REQUESTS = (0x5401, 0x5413, 0x802C542A, 0x5421, 0x5450, 0x5451, 0x541B)
_THREAD_NAMES = (15, 16, 0x53564D41)  # prctl(2); the last one names memory areas
# CLONE_NEW*; CLONE_PARENT, whose child belongs to the caller's parent
_NEW_NAMESPACES = 0x7E020080
_SIBLING = 0x8000
# Datagram pairs could send to any address
_LOCAL = 1
_STREAM = 1
_SOCKET_FLAGS = 0o2004000

# (index, mask, values) of arguments: the call is allowed if each, masked, is one of its values.
Checks = tuple[tuple[int, int, tuple[int, ...]], ...]
_CHECKED: dict[str, Checks] = {
    "open 2 -": ((1, _OPENING, _OPENINGS),),
    "openat 257 56": ((2, _OPENING, _OPENINGS),),
    "fcntl 72 25": ((1, _ALL, _DESCRIPTOR_COMMANDS),),
    "ioctl 16 29": ((1, _ALL, _REQUESTS),),
    "prctl 157 167": ((0, _ALL, _THREAD_NAMES),),
    "prlimit64 302 261": ((0, _ALL, (0,)),),
    "clone 56 220": ((0, _NEW_NAMESPACES | _SIBLING, (0,)),),
    "socketpair 53 199": ((0, _ALL, (_LOCAL,)), (1, _ALL & ~_SOCKET_FLAGS, (_STREAM,))),
}
_KILLS = "kill 62 129, tgkill 234 131"
_GROUPS = "setsid 112 157, setpgid 109 154"

# Prctl(2)
_SECCOMP = 22
_FILTER = 2
# The process; EPERM; ENOSYS
_KILL = 0x80000000
_REFUSE = 0x00050001
_NOT_THERE = 0x00050026
_ALLOW = 0x7FFF0000
# Offsets in seccomp_data, which describes a call
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENTS = 16
# Instructions of classic BPF
_LOAD = 0x20
_AND = 0x54
_EQUAL = 0x15
_AT_LEAST = 0x35
_MORE_THAN = 0x25
_GIVE = 0x06
_X32_NUMBERS = 0x40000000  # calls of the x32 ABI are numbered from here


def filter_calls(separate: bool, only_signalled: int | None) -> bool:
    """Filters the calls of this process and its descendants, permanently. False if kernel or CPU do
    not support it.

    `only_signalled` is the only process that can be signalled; None if other layers restrict
    signals. `separate`: the program has a process namespace; without one it must stay in its
    process group, so that the group can be killed at once.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    checked = {
        **_CHECKED,
        _KILLS: () if only_signalled is None else ((0, _ALL, (only_signalled,)),),
    }
    code = b"".join(_program(machine, checked | ({_GROUPS: ()} if separate else {})))
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    )
    settings = (ctypes.c_ulong(value) for value in (_FILTER, ctypes.addressof(head), 0, 0))
    return bool(ctypes.CDLL(None).prctl(_SECCOMP, *settings) == 0)


def _program(machine: str, checked: dict[str, Checks]) -> list[bytes]:
    """BPF instructions. Calls of another architecture or the x32 ABI kill the process: their
    numbers mean other calls.
    """
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _ARCHITECTURES[machine], true=1),
        _step(_GIVE, _KILL),
    ]
    steps += [_step(_LOAD, _NUMBER), _step(_AT_LEAST, _X32_NUMBERS, false=1), _step(_GIVE, _KILL)]
    for calls, verdict in (*((calls, _ALLOW) for calls in _ALLOWED), (_MISSING, _NOT_THERE)):
        for number in _numbers(calls, machine):
            steps += [_step(_EQUAL, number, false=1), _step(_GIVE, verdict)]
    for calls, checks in checked.items():
        block = []
        # The kernel reads only the lower half of these arguments
        for argument, mask, values in checks:
            block += [_step(_LOAD, _ARGUMENTS + 8 * argument), _step(_AND, mask)]
            block += [
                _step(_EQUAL, value, true=len(values) - index) for index, value in enumerate(values)
            ]
            block.append(_step(_GIVE, _REFUSE))
        block.append(_step(_GIVE, _ALLOW))
        for number in _numbers(calls, machine):
            steps += [_step(_EQUAL, number, false=len(block)), *block]
    return [
        *steps,
        _step(_MORE_THAN, _NEWEST, false=1),
        _step(_GIVE, _NOT_THERE),
        _step(_GIVE, _REFUSE),
    ]


def _step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    """One instruction. `true` and `false` are the numbers of instructions to skip."""
    return struct.pack("HBBI", code, true, false, value)


def _numbers(calls: str, machine: str) -> Iterator[int]:
    column = list(_ARCHITECTURES).index(machine) + 1
    for call in calls.split(","):
        number = call.split()[column]
        if number != "-":
            yield int(number)
