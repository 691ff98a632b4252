"""What programs try in order to break out of the sandbox, as data. Each attempt must end with an
error.

`{home}` is a folder of the user with the files `secret` (text) and `link` (a symbolic link),
`{pid}` a process of the user.
"""

import platform

# 18: another file system, 30: a read-only one
DENIED = r"PermissionError|FileNotFoundError|OSError: \[Errno (18|30)\]"
_UNKNOWN = r"OSError: \[Errno 38\]"
_NO_SUCH = f"{DENIED}|ProcessLookupError"

# One program makes all of these attempts. `call`: a system call by its numbers on x86_64 and
# aarch64.
ATTEMPTS = {
    # a file of the user is changed or read
    "chmod": "os.chmod('{home}/secret', 0o666)",
    "fchmod of its own folder": "os.fchmod(os.open('.', os.O_RDONLY), 0o777)",
    "fchmodat2": "call(452, 452, -100, b'{home}/secret', 0o666, 0)",
    "chown": "os.chown('{home}/secret', os.getuid(), -1)",
    "lchown of a link": "os.lchown('{home}/link', -1, os.getgid())",
    "utime": "os.utime('{home}/secret', (0, 0))",
    "utime of a link": "os.utime('{home}/secret', ns=(1, 1), follow_symlinks=False)",
    "setxattr": "os.setxattr('{home}/secret', 'user.mark', b'x')",
    "removexattr": "os.removexattr('{home}/secret', 'user.kept')",
    "getxattr": "os.getxattr('{home}/secret', 'user.kept')",
    "listxattr": "os.listxattr('{home}/secret')",
    "truncate": "os.truncate('{home}/secret', 0)",
    "truncation while reading": "os.open('{home}/secret', os.O_RDONLY | os.O_TRUNC)",
    "append": "open('{home}/secret', 'a')",
    "rename": "os.rename('{home}/secret', '{home}/other')",
    "rename into its folder": "os.rename('{home}/secret', 'mine')",
    "unlink": "os.unlink('{home}/secret')",
    "mkdir": "os.mkdir('{home}/new')",
    "new file": "open('{home}/new', 'x')",
    "hard link": "os.link('{home}/secret', 'mine')",
    "read": "open('{home}/secret').read()",
    "read by a link": "os.symlink('{home}/secret', 'symbolic'); open('symbolic').read()",
    "list": "os.listdir('{home}')",
    "read of accounts": "open('/etc/passwd').read()",
    "read of memory": "open('/proc/self/mem', 'rb')",
    "read of a command line": "open('/proc/{pid}/cmdline', 'rb').read()",
    "shared memory file": "open('/dev/shm/layerskip-hostile', 'x')",
    "open of a bare path": "os.open('{home}/secret', os.O_PATH)",
    "statvfs": "os.statvfs('{home}')",
    "FIFO": "os.mkfifo('pipe')",
    "name_to_handle_at": "call(303, 264, -100, b'{home}/secret', bytes(256), bytes(8), 0)",
    "open_by_handle_at": "call(304, 265, -100, bytes(64), 0)",
    "inotify": "call(294, 26, 0)",
    "fanotify": "call(300, 262, 0, 0)",
    # a process of the user is signalled, inspected or slowed down
    "kill": "os.kill({pid}, 15)",
    "question by signal 0": "os.kill({pid}, 0)",
    "kill of a group": "os.killpg({pid}, 15)",
    "owner of a pipe": "fcntl.fcntl(os.pipe()[0], 8, {pid})",
    "signal of a pipe": "fcntl.fcntl(os.pipe()[0], 10, 9)",
    "owner by ioctl": "call(16, 29, 0, 0x8901, ctypes.byref(ctypes.c_int({pid})))",
    "rt_sigqueueinfo": "call(129, 138, {pid}, 15, bytes(128))",
    "pidfd_open": "call(434, 434, os.getpid(), 0)",
    "pidfd_getfd": "call(438, 438, 0, 0, 0)",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "setpriority of all": "os.setpriority(os.PRIO_USER, 0, 19)",
    "nice": "os.nice(1)",
    "sched_setaffinity": "os.sched_setaffinity({pid}, [0])",
    "sched_setaffinity of itself": "os.sched_setaffinity(0, [0])",
    "sched_setscheduler": "os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "sched_setattr": "call(314, 274, {pid}, bytes([48]) + bytes(47), 0)",
    "prlimit": "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (9, 9))",
    "question by prlimit": "resource.prlimit({pid}, resource.RLIMIT_NOFILE)",
    "ioprio_set": "call(251, 30, 1, {pid}, 3 << 13)",
    "migrate_pages": "call(256, 238, {pid}, 64, bytes(8), bytes(8))",
    "ptrace": "call(101, 117, 16, {pid}, 0, 0)",
    "process_vm_readv": "call(310, 270, {pid}, bytes(16), 1, bytes(16), 1, 0)",
    "process_vm_writev": "call(311, 271, {pid}, bytes(16), 1, bytes(16), 1, 0)",
    "kcmp": "call(312, 272, {pid}, {pid}, 0, 0, 0)",
    "get_robust_list": "call(274, 100, {pid}, bytes(8), bytes(8))",
    "process_madvise": "call(440, 440, 0, bytes(16), 1, 4, 0)",
    "survival of its parent": "call(157, 167, 1, 0, 0, 0, 0)",
    # the user's keys, memory beyond the limit, and what outlives the program
    "session keyring": "call(250, 219, 11, -3, bytes(4096), 4096)",
    "add_key": "call(248, 217, b'user', b'layerskip-hostile', b'x', 1, -4)",
    "request_key": "call(249, 218, b'user', b'layerskip-victim', None, 0)",
    "shmget": "call(29, 194, 0x4C534B50, 4096, 0o1600)",
    "shmctl": "call(31, 195, 0, 3, bytes(256))",
    "shmat": "call(30, 196, 0, 0, 0)",
    "msgget": "call(68, 186, 0x4C534B50, 0o1600)",
    "semget": "call(64, 190, 0x4C534B50, 1, 0o1600)",
    "mq_open": "call(240, 180, b'layerskip-hostile', 0o102, 0o600, None)",
    "memfd_create": "call(319, 279, b'x', 0)",
    # the kernel: page faults, filters, namespaces, mounts, users
    "userfaultfd": "call(323, 282, 1)",
    "io_uring": "call(425, 425, 1, bytes(256))",
    "bpf": "call(321, 280, 0, bytes(64), 64)",
    "perf_event_open": "call(298, 241, bytes(128), 0, -1, -1, 0)",
    "unshare of users": "call(272, 97, 0x10000000)",
    "clone with users": "if call(56, 220, 0x10000011, 0, 0, 0, 0) == 0: os._exit(0)",
    "clone with a mount namespace": "if call(56, 220, 0x20011, 0, 0, 0, 0) == 0: os._exit(0)",
    "clone3": "if call(435, 435, struct.pack('11Q', 1 << 28, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) == 0: os._exit(0)",
    "setns": "call(308, 268, 0, 0)",
    "mount": "call(165, 40, b'none', b'.', b'tmpfs', 0, None)",
    "fsopen": "call(430, 430, b'tmpfs', 0)",
    "open_tree": "call(428, 428, -100, b'.', 1)",
    "umount": "call(166, 39, b'/', 2)",
    "pivot_root": "call(155, 41, b'.', b'.')",
    "chroot": "os.chroot('.')",
    "setuid": "os.setuid(0)",
    "setgroups": "os.setgroups([])",
    "personality": "call(135, 92, 0x0040000)",
    "a filter of its own": "call(317, 277, 0, 0, None)",
    "landlock of its own": "call(444, 444, None, 0, 1)",
    "fcntl lease": "fcntl.fcntl(os.open('a', os.O_CREAT), 1024, 0)",
    "terminal input": "call(16, 29, 0, 0x5412, b'x')",
    "sync": "call(306, 267, 0)",
    "clock": "call(227, 112, 0, bytes(16))",
    # something is sent, or another program runs
    "socket": "socket.socket()",
    "packet socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "local socket": "socket.socket(socket.AF_UNIX)",
    "pair of datagrams": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0x')",
    "filter of a socket": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, 26, bytes(16))",
    "execution": "os.execv('/bin/true', ['true'])",
    "subprocess": "subprocess.run(['/bin/true'], check=True)",
    "posix_spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
}
# Without a tree of its own a program can find out whether a file exists, as the sandbox's README
# says.
ASKED = {
    "stat": "os.stat('{home}/secret')",
    "access": "if not os.access('{home}/secret', os.F_OK): raise PermissionError",
    "readlink": "os.readlink('{home}/link')",
    "chdir": "os.chdir('{home}')",
}
# How an attempt must end, unless as DENIED says: an attempt that failed for another reason proves
# nothing.
_REFUSED = {"fchmodat2": _UNKNOWN, "clone3": _UNKNOWN} | dict.fromkeys(
    ("kill", "question by signal 0", "kill of a group", "owner of a pipe", "rt_sigqueueinfo"),
    _NO_SUCH,
)
CALL = """
import ctypes, fcntl, os, re, resource, socket, struct, subprocess, traceback
libc = ctypes.CDLL(None, use_errno=True)
def call(x86_64, aarch64, *arguments):
    number = x86_64 if os.uname().machine == "x86_64" else aarch64
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
_ALL = """
for name, (attempt, refused) in ATTEMPTS.items():
    try:
        exec(attempt)
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1]
        if re.match(refused, reason):
            continue
        name += ": " + reason
    raise SystemExit(name)
"""


def making(attempts: dict[str, str], home: str, pid: int) -> str:
    """A program that makes all attempts and ends without an error; the first that succeeds is the
    reason why not.
    """
    named = {
        name: (
            attempt.replace("{home}", home).replace("{pid}", str(pid)),
            _REFUSED.get(name, DENIED),
        )
        for name, attempt in attempts.items()
    }
    return f"{CALL}\nATTEMPTS = {named!r}\n{_ALL}"


_FULL = r"OSError: \[Errno 28\]|its folder grew|took more than"
_INT_80 = "import mmap\nbuffer = mmap.mmap(-1, 4096, prot=7)\nbuffer.write(bytes.fromhex('b814000000cd80c3'))\n"
_INT_80 += "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))()"
# Name -> program and reason: what fills its folder, and calls whose numbers mean another call.
PROGRAMS = {
    "many files": ("for name in range(100000): open(str(name), 'x').close()", _FULL),
    "many folders": ("import os\nfor name in range(100000): os.mkdir(str(name))", _FULL),
    "deep folders": ("import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')", _FULL),
    "many bytes": ("for name in range(2000): open(str(name), 'wb').write(bytes(1 << 20))", _FULL),
    "closed folders": ("import os\nfor name in range(100000): os.mkdir(str(name), 0)", _FULL),
}
if platform.machine() == "x86_64":
    PROGRAMS |= {
        "32-bit call": (f"{CALL}\n{_INT_80}", "ended, or was ended"),
        "x32 call": (f"{CALL}\ncall(0x40000000 + 39, 0)", "ended, or was ended"),
    }
