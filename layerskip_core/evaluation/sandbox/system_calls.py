"""The system calls that a program may make, by family. All others are refused.

Each entry is a call and its numbers on x86_64 and aarch64 (`-`: none). Calls that programs do not need are left out: changing
modes, owners, times and attributes of files (Landlock does not cover them), locks of files, devices and FIFOs, keys, System V
and POSIX message queues and shared memory, sockets by name, priorities and processors, other processes' limits and memory,
tracing, executing files, namespaces and mounts, new kinds of descriptors (userfaultfd, io_uring, bpf, perf, pidfd, memfd,
inotify, fanotify), clocks, modules, further filters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's AUDIT_ARCH_ constants
NEWEST = 450  # the last call of the kernel that this table describes; later ones fail with ENOSYS

_MEMORY = """
brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227, membarrier 324 283
"""
_FILES = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, sendfile 40 71, copy_file_range 326 285, fadvise64 221 223, fsync 74 82,
fdatasync 75 83, ftruncate 77 46, fallocate 285 47, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, fstatfs 138 44, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
umask 95 166, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, creat 85 -
"""
_WAITING = """
pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20,
epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19,
timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87, signalfd 282 -, signalfd4 289 74, futex 202 98,
futex_waitv 449 449
"""
_CONNECTED_PAIRS = """
sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockopt 55 209, getsockname 51 204,
getpeername 52 205
"""
_TIME_AND_CHANCE = """
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -,
times 100 153, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -, getrandom 318 278
"""
_SIGNALS = """
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132
"""
_PROCESSES = """
fork 57 -, vfork 58 -, wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94, set_tid_address 218 96,
set_robust_list 273 99, rseq 334 293, restart_syscall 219 128, sched_yield 24 124
"""
_QUESTIONS = """
getpid 39 172, getppid 110 173, gettid 186 178, getpgid 121 155, getpgrp 111 -, getsid 124 156, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
getrusage 98 165, getrlimit 97 163, setrlimit 160 164, uname 63 160, sysinfo 99 179, getcpu 309 168,
sched_getaffinity 204 123, sched_get_priority_max 146 125, sched_get_priority_min 147 126
"""
_FAMILIES = (_MEMORY, _FILES, _WAITING, _CONNECTED_PAIRS, _TIME_AND_CHANCE, _SIGNALS, _PROCESSES, _QUESTIONS)

# Calls that fail with ENOSYS, as on an older kernel: the C library then uses another call, which is allowed.
_MISSING = "clone3 435 435, openat2 437 437"

# Calls that depend on their arguments.
_OPEN = "open 2 -"
_OPEN_AT = "openat 257 56"
_FCNTL = "fcntl 72 25"
_IOCTL = "ioctl 16 29"
_PRCTL = "prctl 157 167"
_LIMITS = "prlimit64 302 261"
_CLONE = "clone 56 220"
_SOCKETPAIR = "socketpair 53 199"
_KILLS = "kill 62 129, tgkill 234 131"
_GROUPS = "setsid 112 157, setpgid 109 154"

_ALL = 0xFFFFFFFF
_PATH_ONLY, _TRUNCATE, _ACCESS_MODE = 0o10000000, 0o1000, 0o3  # open(2)
# Not O_PATH, which Landlock does not check, and not O_TRUNC with O_RDONLY, which Landlock does not check before version 3.
_OPENINGS = (0, 1, 2, _TRUNCATE | 1, _TRUNCATE | 2)
# Copying descriptors and changing their flags; not setting the owner, to whom the kernel sends signals, nor leases or notices.
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032)
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x802C542A)
_DESCRIPTOR_REQUESTS = (0x5421, 0x5450, 0x5451, 0x541B)  # blocking mode, close-on-exec, bytes available
_THREAD_NAMES = (15, 16, 0x53564D41)  # prctl(2); the last one names memory areas
_NEW_NAMESPACES = 0x7E020080
_SIBLING = 0x8000  # a child of the parent
_LOCAL, _STREAM, _SOCKET_FLAGS = 1, 1, 0o2004000  # datagram pairs could send to any address


@dataclass(frozen=True)
class Check:
    """An argument, by its index, must have one of these values after masking."""

    argument: int
    mask: int
    values: tuple[int, ...]


def allowed(machine: str) -> list[int]:
    """The numbers of calls that may be made with any arguments, ascending."""
    return sorted(number for family in _FAMILIES for number in _numbers(family, machine))


def missing(machine: str) -> list[int]:
    """The numbers of calls that fail with ENOSYS."""
    return list(_numbers(_MISSING, machine))


def checked(machine: str, separate: bool, only_signalled: int | None) -> dict[int, tuple[Check, ...]]:
    """The numbers of calls that depend on their arguments or on the other walls.

    `only_signalled` is the only process that can be signalled; None if other walls restrict signals. `separate`: the program
    has a process namespace; without one it must stay in its process group, so that the group can be killed at once.
    """
    mask = _PATH_ONLY | _TRUNCATE | _ACCESS_MODE
    namespaces = _NEW_NAMESPACES | _SIBLING
    rules: dict[str, tuple[Check, ...]] = {
        _OPEN: (Check(1, mask, _OPENINGS),),
        _OPEN_AT: (Check(2, mask, _OPENINGS),),
        _FCNTL: (Check(1, _ALL, _DESCRIPTOR_COMMANDS),),
        _IOCTL: (Check(1, _ALL, (*_TERMINAL_QUESTIONS, *_DESCRIPTOR_REQUESTS)),),
        _PRCTL: (Check(0, _ALL, _THREAD_NAMES),),
        _LIMITS: (Check(0, _ALL, (0,)),),
        _CLONE: (Check(0, namespaces, (0,)),),
        _SOCKETPAIR: (Check(0, _ALL, (_LOCAL,)), Check(1, _ALL & ~_SOCKET_FLAGS, (_STREAM,))),
        _KILLS: () if only_signalled is None else (Check(0, _ALL, (only_signalled,)),),
    } | ({_GROUPS: ()} if separate else {})
    return {number: checks for names, checks in rules.items() for number in _numbers(names, machine)}


def _numbers(family: str, machine: str) -> Iterator[int]:
    column = list(ARCHITECTURES).index(machine) + 1
    for line in family.split(","):
        number = line.split()[column]
        if number != "-":
            yield int(number)
