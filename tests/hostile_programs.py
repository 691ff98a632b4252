"""Programs that try to break out of the sandbox, as data: what each one tries, and what must not happen.

A program ends without an error only if its attempt worked, so a verdict of "passed" is a breach. Otherwise the verdict's reason
must match `refused`: a program that failed for another reason proves nothing. `{home}` is a folder of the user with the files
`secret` (text) and `link` (a symbolic link), `{pid}` a process of the user.
"""

import platform
from dataclasses import dataclass

DENIED = r"PermissionError|FileNotFoundError|OSError: \[Errno (18|30)\]"  # 18: another file system, 30: a read-only one


@dataclass(frozen=True)
class HostileProgram:
    """`layer`: without this layer the program may succeed, as the sandbox's README says."""

    name: str
    program: str
    must_not_happen: str
    refused: str = DENIED
    layer: str | None = None

    def against(self, home: str, pid: int) -> str:
        return self.program.replace("{home}", home).replace("{pid}", str(pid))

    @property
    def has_victim(self) -> bool:
        return "{home}" in self.program or "{pid}" in self.program


_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(x86_64, aarch64, *arguments):
    number = x86_64 if os.uname().machine == "x86_64" else aarch64
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def _native(name: str, line: str, must_not_happen: str, refused: str = DENIED, layer: str | None = None) -> HostileProgram:
    return HostileProgram(name, f"{_CALL}\n{line}\n", must_not_happen, refused, layer=layer)


_CHANGED = "a file of the user is changed"
_READ = "a file of the user is read"
_ASKED = "the existence of a user's file is revealed"
FILES = [
    HostileProgram("chmod", "import os; os.chmod('{home}/secret', 0o666)", _CHANGED),
    HostileProgram("chmod of the home", "import os; os.chmod('{home}', 0o777)", _CHANGED),
    HostileProgram("fchmod of its own folder", "import os; os.fchmod(os.open('.', os.O_RDONLY), 0o777)", _CHANGED),
    _native("fchmodat2", "call(452, 452, -100, b'{home}/secret', 0o666, 0)", _CHANGED, r"OSError: \[Errno 38\]"),
    HostileProgram("chown", "import os; os.chown('{home}/secret', os.getuid(), -1)", _CHANGED),
    HostileProgram("lchown of a link", "import os; os.lchown('{home}/link', -1, os.getgid())", _CHANGED),
    HostileProgram("utime", "import os; os.utime('{home}/secret', (0, 0))", _CHANGED),
    HostileProgram("utime to now", "import os; os.utime('{home}')", _CHANGED),
    HostileProgram("utime by nanoseconds", "import os; os.utime('{home}/secret', ns=(1, 1), follow_symlinks=False)", _CHANGED),
    HostileProgram("setxattr", "import os; os.setxattr('{home}/secret', 'user.mark', b'x')", _CHANGED),
    HostileProgram("removexattr", "import os; os.removexattr('{home}/secret', 'user.kept')", _CHANGED),
    HostileProgram("getxattr", "import os; os.getxattr('{home}/secret', 'user.kept')", _READ),
    HostileProgram("listxattr", "import os; os.listxattr('{home}/secret')", _READ),
    HostileProgram("truncate", "import os; os.truncate('{home}/secret', 0)", _CHANGED),
    HostileProgram("truncation while reading", "import os; os.open('{home}/secret', os.O_RDONLY | os.O_TRUNC)", _CHANGED),
    HostileProgram("append", "open('{home}/secret', 'a')", _CHANGED),
    HostileProgram("rename", "import os; os.rename('{home}/secret', '{home}/other')", _CHANGED),
    HostileProgram("rename into its folder", "import os; os.rename('{home}/secret', 'mine')", _CHANGED),
    HostileProgram("unlink", "import os; os.unlink('{home}/secret')", _CHANGED),
    HostileProgram("mkdir", "import os; os.mkdir('{home}/new')", _CHANGED),
    HostileProgram("new file", "open('{home}/new', 'x')", _CHANGED),
    HostileProgram("hard link", "import os; os.link('{home}/secret', 'mine'); open('mine').read()", _READ),
    HostileProgram("read", "open('{home}/secret').read()", _READ),
    HostileProgram("read by a link", "import os; os.symlink('{home}/secret', 'mine'); open('mine').read()", _READ),
    HostileProgram("list", "import os; os.listdir('{home}')", _READ),
    HostileProgram("read of accounts", "open('/etc/passwd').read()", _READ),
    HostileProgram("read of memory", "open('/proc/self/mem', 'rb')", _READ),
    HostileProgram("read of a command line", "open('/proc/{pid}/cmdline', 'rb').read()", _READ),
    HostileProgram("shared memory file", "open('/dev/shm/layerskip-hostile', 'x')", "it outlives the program"),
    HostileProgram("stat", "import os; os.stat('{home}/secret')", _ASKED, layer="file names"),
    HostileProgram(
        "access", "import os; assert os.access('{home}/secret', os.F_OK)", _ASKED, "AssertionError", layer="file names"
    ),
    HostileProgram("readlink", "import os; os.readlink('{home}/link')", _ASKED, layer="file names"),
    HostileProgram("chdir", "import os; os.chdir('{home}')", _ASKED, layer="file names"),
    HostileProgram("open of a bare path", "import os; os.fstat(os.open('{home}/secret', os.O_PATH))", _ASKED),
    HostileProgram("statvfs", "import os; os.statvfs('{home}')", _ASKED),
    HostileProgram("FIFO", "import os; os.mkfifo('pipe')", "a device or FIFO is made"),
    _native("name_to_handle_at", "call(303, 264, -100, b'{home}/secret', bytes(256), bytes(8), 0)", _ASKED),
    _native("open_by_handle_at", "call(304, 265, -100, bytes(64), 0)", _READ),
    _native("inotify", "watch = call(294, 26, 0); call(254, 27, watch, b'{home}', 0xFFF)", "the user's activity is watched"),
    _native("fanotify", "call(300, 262, 0, 0)", "the user's activity is watched"),
]

_SIGNALLED = "a process of the user gets a signal"
_BENT = "the priority, processors or limits of a user's process are changed"
_PEEKED = "a process of the user is inspected"
_NO_SUCH = f"{DENIED}|ProcessLookupError"
PROCESSES = [
    HostileProgram("kill", "import os; os.kill({pid}, 15)", _SIGNALLED, _NO_SUCH),
    HostileProgram("question by signal 0", "import os; os.kill({pid}, 0)", _PEEKED, _NO_SUCH),
    HostileProgram("kill of a group", "import os; os.killpg({pid}, 15)", _SIGNALLED, _NO_SUCH),
    HostileProgram(
        "owner of a pipe",
        "import fcntl, os\nfor command, value in ((10, 9), (8, {pid})):\n    reader, writer = os.pipe()\n"
        "    fcntl.fcntl(reader, command, value)\n"
        "    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC); os.write(writer, b'x')",
        _SIGNALLED,
        _NO_SUCH,
    ),
    _native("owner by ioctl", "call(16, 29, 0, 0x8901, ctypes.byref(ctypes.c_int({pid})))", _SIGNALLED),
    _native("rt_sigqueueinfo", "call(129, 138, {pid}, 15, bytes(128))", _SIGNALLED, _NO_SUCH),
    _native("pidfd_send_signal", "call(424, 424, call(434, 434, {pid}, 0), 15, None, 0)", _SIGNALLED),
    _native("pidfd_open", "call(434, 434, os.getpid(), 0)", _PEEKED),
    _native("pidfd_getfd", "call(438, 438, 0, 0, 0)", _PEEKED),
    HostileProgram("setpriority", "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)", _BENT),
    HostileProgram("setpriority of all", "import os; os.setpriority(os.PRIO_USER, 0, 19)", _BENT),
    HostileProgram("nice", "import os; os.nice(1)", _BENT),
    HostileProgram("sched_setaffinity", "import os; os.sched_setaffinity({pid}, [0])", _BENT),
    HostileProgram("sched_setaffinity of itself", "import os; os.sched_setaffinity(0, [0])", _BENT),
    HostileProgram("sched_setscheduler", "import os; os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))", _BENT),
    _native("sched_setattr", "call(314, 274, {pid}, bytes([48]) + bytes(47), 0)", _BENT),
    HostileProgram("prlimit", "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE, (9, 9))", _BENT),
    HostileProgram("question by prlimit", "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE)", _PEEKED),
    _native("ioprio_set", "call(251, 30, 1, {pid}, 3 << 13)", _BENT),
    _native("migrate_pages", "call(256, 238, {pid}, 64, bytes(8), bytes(8))", _BENT),
    _native("ptrace", "call(101, 117, 16, {pid}, 0, 0)", _PEEKED),
    _native("ptrace of itself", "call(101, 117, 0, 0, 0, 0)", _PEEKED),
    _native("process_vm_readv", "call(310, 270, {pid}, bytes(16), 1, bytes(16), 1, 0)", _PEEKED),
    _native("process_vm_writev", "call(311, 271, {pid}, bytes(16), 1, bytes(16), 1, 0)", _PEEKED),
    _native("kcmp", "call(312, 272, {pid}, {pid}, 0, 0, 0)", _PEEKED),
    _native("get_robust_list", "call(274, 100, {pid}, bytes(8), bytes(8))", _PEEKED),
    _native("process_madvise", "call(440, 440, 0, bytes(16), 1, 4, 0)", _BENT),
    _native("survival of its parent", "call(157, 167, 1, 0, 0, 0, 0)", "a process outlives its supervisor"),
]

_KEYS = "the user's keys are read, or new ones are left"
_SHARED = "memory beyond the limit is allocated and outlives the program"
KERNEL = [
    _native("session keyring", "call(250, 219, 11, -3, bytes(4096), 4096)", _KEYS),
    _native("new session keyring", "call(250, 219, 1, None)", _KEYS),
    _native("add_key", "call(248, 217, b'user', b'layerskip-hostile', b'x', 1, -4)", _KEYS),
    _native("request_key", "call(249, 218, b'user', b'layerskip-victim', None, 0)", _KEYS),
    _native("shmget", "call(29, 194, 0x4C534B50, 4096, 0o1600)", _SHARED),
    _native("private shmget", "call(29, 194, 0, 1 << 30, 0o1600)", _SHARED),
    _native("shmctl", "call(31, 195, 0, 3, bytes(256))", _SHARED),
    _native("shmat", "call(30, 196, 0, 0, 0)", _SHARED),
    _native("msgget", "call(68, 186, 0x4C534B50, 0o1600)", _SHARED),
    _native("semget", "call(64, 190, 0x4C534B50, 1, 0o1600)", _SHARED),
    _native("mq_open", "call(240, 180, b'layerskip-hostile', 0o102, 0o600, None)", _SHARED),
    _native("memfd_create", "call(319, 279, b'x', 0)", "a file without a path is made"),
    _native("userfaultfd", "call(323, 282, 1)", "the program handles page faults for the kernel"),
    _native("io_uring", "call(425, 425, 1, bytes(256))", "system calls bypass the filter"),
    _native("bpf", "call(321, 280, 0, bytes(64), 64)", "a program is loaded into the kernel"),
    _native("perf_event_open", "call(298, 241, bytes(128), 0, -1, -1, 0)", "the machine's performance counters are read"),
    _native("unshare of users", "call(272, 97, 0x10000000)", "a user namespace is made"),
    _native("clone with users", "if call(56, 220, 0x10000011, 0, 0, 0, 0) == 0: os._exit(0)", "a user namespace is made"),
    _native("clone with a mount namespace", "if call(56, 220, 0x20011, 0, 0, 0, 0) == 0: os._exit(0)", "a namespace is made"),
    _native(
        "clone3 with users",
        "import struct\nif call(435, 435, struct.pack('11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) == 0: os._exit(0)",
        "a user namespace is made",
        r"OSError: \[Errno 38\]",
    ),
    _native("setns", "call(308, 268, 0, 0)", "another namespace is entered"),
    _native("mount", "call(165, 40, b'none', b'.', b'tmpfs', 0, None)", "a file system is mounted"),
    _native("fsopen", "call(430, 430, b'tmpfs', 0)", "a file system is mounted"),
    _native("open_tree", "call(428, 428, -100, b'.', 1)", "a file system is mounted"),
    _native("umount", "call(166, 39, b'/', 2)", "a file system is unmounted"),
    _native("pivot_root", "call(155, 41, b'.', b'.')", "another root is entered"),
    HostileProgram("chroot", "import os; os.chroot('.')", "another root is entered"),
    HostileProgram("setuid", "import os; os.setuid(0)", "it becomes another user"),
    HostileProgram("setgroups", "import os; os.setgroups([])", "it becomes another user"),
    _native("personality", "call(135, 92, 0x0040000)", "address space randomisation is turned off"),
    _native("a filter of its own", "call(317, 277, 0, 0, None)", "a filter answers system calls in place of the kernel"),
    _native("landlock of its own", "call(444, 444, None, 0, 1)", "the kernel's Landlock version is read"),
    _native(
        "fcntl lease",
        "import fcntl; fcntl.fcntl(os.open('a', os.O_CREAT), 1024, 0)",
        "other processes wait for its files",
    ),
    _native("terminal input", "call(16, 29, 0, 0x5412, b'x')", "something is typed into the user's terminal"),
    _native("sync", "call(306, 267, 0)", "the whole machine waits for its disks"),
    _native("clock", "call(227, 112, 0, bytes(16))", "the clock is set"),
]
FOREIGN = []
if platform.machine() == "x86_64":
    _CODE = "import mmap\nbuffer = mmap.mmap(-1, 4096, prot=7)\nbuffer.write(bytes.fromhex('b814000000cd80c3'))\n"
    _CODE += "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))()"
    FOREIGN = [
        _native("32-bit call", _CODE, "the filter misreads the numbers of calls", "ended, or was ended"),
        _native("x32 call", "call(0x40000000 + 39, 0)", "the filter misreads the numbers of calls", "ended, or was"),
    ]

_NETWORK = "something is sent"
NETWORK = [
    HostileProgram("socket", "import socket; socket.socket()", _NETWORK),
    HostileProgram("packet socket", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", _NETWORK, DENIED),
    HostileProgram("local socket", "import socket; socket.socket(socket.AF_UNIX).connect('/run/bus')", _NETWORK),
    HostileProgram(
        "pair of datagrams",
        "from socket import *; socketpair(AF_UNIX, SOCK_DGRAM)[0].sendto(b'x', '\\0x')",
        _NETWORK,
    ),
    HostileProgram(
        "filter of a socket", "import socket; socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, 26, bytes(16))", _NETWORK
    ),
    HostileProgram("execution", "import os; os.execv('/bin/true', ['true'])", "another program runs"),
    HostileProgram("subprocess", "import subprocess; subprocess.run(['/bin/true'], check=True)", "another program runs"),
    HostileProgram(
        "posix_spawn", "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)", "another program runs"
    ),
]

_UNBOUNDED = "the folder grows without limit"
_FULL = r"OSError: \[Errno 28\]|its folder grew|took more than"
FOLDER = [
    HostileProgram("many files", "for name in range(100000): open(str(name), 'x').close()", _UNBOUNDED, _FULL),
    HostileProgram("many folders", "import os\nfor name in range(100000): os.mkdir(str(name))", _UNBOUNDED, _FULL),
    HostileProgram("deep folders", "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')", _UNBOUNDED, _FULL),
    HostileProgram("many bytes", "for name in range(2000): open(str(name), 'wb').write(bytes(1 << 20))", _UNBOUNDED, _FULL),
    HostileProgram("closed folders", "import os\nfor name in range(100000): os.mkdir(str(name), 0)", _UNBOUNDED, _FULL),
]

PROGRAMS = [*FILES, *PROCESSES, *KERNEL, *FOREIGN, *NETWORK, *FOLDER]
