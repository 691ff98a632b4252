"""More programs that try to break out of the sandbox, written before its layers were built. See also tests/hostile_programs.py.

Each program reaches its end only if its attempt worked. `{home}` is a folder of the user with a file `secret`, `{pid}` a
process of the user, SHM a key.
"""

from hostile_programs import PROGRAMS as OF_THE_TESTS
from hostile_programs import HostileProgram

_CALL = """
import ctypes, os, struct
def call(number, *arguments):
    c = ctypes.CDLL(None, use_errno=True)
    c.syscall.restype = ctypes.c_long
    found = c.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if found < 0:
        raise OSError(ctypes.get_errno(), 'refused')
    return found
"""


def _calls(text: str) -> str:
    return _CALL + text


_REACHING = {
    "read a file": "assert open('{home}/secret').read()",
    "read a file through /proc": "assert open('/proc/self/root{home}/secret').read()",
    "size of a file": "import os; assert os.stat('{home}/secret').st_size == 6",
    "existence of a file": "import os; assert os.path.exists('{home}/secret') and not os.path.exists('{home}/none')",
    "access to a file": "import os; assert os.access('{home}/secret', os.F_OK)",
    "list a folder": "import os; assert os.listdir('{home}')",
    "write a file": "open('{home}/new', 'w').write('x')",
    "append to a file": "open('{home}/secret', 'a').write('x')",
    "truncate a file": "import os; os.truncate('{home}/secret', 0)",
    "chmod": "import os; os.chmod('{home}/secret', 0o777)",
    "utime": "import os; os.utime('{home}/secret', (1, 1))",
    "chown": "import os; os.chown('{home}/secret', os.getuid(), os.getgid())",
    "setxattr": "import os; os.setxattr('{home}/secret', 'user.x', b'x')",
    "remove": "import os; os.remove('{home}/secret')",
    "rename": "import os; os.rename('{home}/secret', '{home}/moved')",
    "hard link": "import os; os.link('{home}/secret', 'linked'); open('linked').read()",
    "symbolic link": "import os; os.symlink('{home}/secret', 'linked'); open('linked').read()",
    "link from outside": "import os; os.symlink('x', '{home}/linked')",
    "make a folder": "import os; os.mkdir('{home}/folder')",
    "make a node": "import os; os.mknod('null', 0o20666, os.makedev(1, 3)); open('null', 'w').write('x')",
    "chdir": "import os; os.chdir('{home}'); open('secret').read()",
    "chroot": "import os; os.chroot('.')",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0",
    "environment of the parent": "import os; assert open(f'/proc/{os.getppid()}/environ').read()",
    "environment of the harness": "assert open('/proc/{pid}/cmdline').read()",
    "memory of a process": "open('/proc/{pid}/mem', 'rb')",
    "execute a shell": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "a full folder": (
        "import os\ntotal = 0\ntry:\n  for n in range(60):\n    open(str(n), 'wb').write(bytes(1 << 20)); total += 1\n"
        "except OSError: pass\nassert total > 20"
    ),
    "many files": "for n in range(20000): open(str(n), 'w')",
    "big memory": "x = bytearray(900 << 20); x[::4096] = b'x' * len(x[::4096])",
    "big memory in shares": (
        "import mmap\nheld = []\nfor n in range(9):\n  one = mmap.mmap(-1, 100 << 20)\n"
        "  one[::4096] = b'x' * (100 << 20 >> 12); held.append(one)"
    ),
    "many processes": "import os, time\nfor n in range(40):\n  if os.fork() == 0: time.sleep(30)",
    "many threads": (
        "import threading, time\nfor n in range(60): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"
    ),
    "System V shared memory": _calls("assert call(29, SHM, 700 << 20, 0o1600) >= 0"),
    "System V messages": _calls("assert call(68, 0, 0o1600) >= 0"),
    "System V semaphores": _calls("assert call(64, 0, 4, 0o1600) >= 0"),
    "the session keyring": _calls("b = ctypes.create_string_buffer(64)\nassert call(250, 6, -3, b, 64) >= 0"),
    "a key added": _calls("assert call(248, b'user', b'layerskip', b'x', 1, -3) >= 0"),
    "userfaultfd": _calls("assert call(323, 1) >= 0"),
    "a user namespace": _calls("call(272, 0x10000000)"),
    "a cloned user namespace": _calls(
        "p = call(56, 0x10000000 | 17, 0, 0, 0, 0)\nif p == 0: os._exit(0)\nassert os.waitpid(p, 0)"
    ),
    "pidfd_open": _calls("assert call(434, {pid}, 0) >= 0"),
    "ptrace": _calls("call(101, 16, {pid}, 0, 0)"),
    "process_vm_readv": _calls(
        "b = ctypes.create_string_buffer(64)\nv = struct.pack('QQ', ctypes.addressof(b), 8)\ncall(310, {pid}, v, 1, v, 1, 0)"
    ),
    "kill": "import os; os.kill({pid}, 9)",
    "signal nothing": "import os; os.kill({pid}, 0)",
    "signal the parent": "import os; os.kill(os.getppid(), 0); os.kill(os.getppid(), 15); import time; time.sleep(1)",
    "setpriority": "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "setpriority of the user": "import os; os.setpriority(os.PRIO_USER, os.getuid(), 15)\nraise SystemExit",
    "affinity": "import os; os.sched_setaffinity({pid}, os.sched_getaffinity({pid}))",
    "prlimit": "import resource; resource.prlimit({pid}, resource.RLIMIT_CORE)",
    "scheduling": "import os; os.sched_getscheduler({pid}); os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "ioprio": _calls("call(251, 1, {pid}, 3 << 13)"),
    "a socket": "import socket; socket.socket()",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a netlink socket": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "io_uring": _calls("b = ctypes.create_string_buffer(200)\nassert call(425, 4, b) >= 0"),
    "bpf": _calls("b = ctypes.create_string_buffer(200)\ncall(321, 5, b, 100)"),
    "perf": _calls(
        "b = ctypes.create_string_buffer(struct.pack('II', 1, 112) + bytes(104))\nassert call(298, b, 0, -1, -1, 0) >= 0"
    ),
    "open by handle": _calls("b = ctypes.create_string_buffer(struct.pack('Ii', 8, 1) + bytes(100))\ncall(304, -100, b, 0)"),
    "another namespace": _calls("fd = os.open('/proc/{pid}/ns/pid', os.O_RDONLY)\ncall(308, fd, 0)"),
    "32-bit calls": _calls("call(0x40000000 + 39)"),
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time() - 0.001)",
    "the host's name": "import socket; socket.sethostname('x')",
    "raise a limit of memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "raise a limit of processes": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))",
    "a name in the parent's folder": "open('../layerskip-left', 'w').write('x')",
    "/dev/shm": "open('/dev/shm/layerskip-left', 'w').write('x')",
    "/tmp": "open('/tmp/layerskip-left', 'w').write('x')",
    "an inherited descriptor": (
        "import os\nfor fd in range(4, 64):\n  try: os.fstat(fd)\n  except OSError: continue\n  break\nelse: 1/0"
    ),
    "a terminal": "open('/dev/tty')",
}

_STAYING = """
import os, signal, time
for one in (1, 2, 15): signal.signal(one, signal.SIG_IGN)
"""
OUTLIVING = {
    "a program that goes on": _STAYING + "time.sleep(60)",
    "a daemon": _STAYING
    + "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\ntime.sleep(60)",
    "a daemon without a death signal": _CALL
    + _STAYING
    + "call(157, 1, 0, 0, 0, 0)\nif os.fork() == 0:\n  call(157, 1, 0, 0, 0, 0); os.setsid(); time.sleep(60)\ntime.sleep(60)",
}

_LAYERS = dict.fromkeys(
    ("size of a file", "existence of a file", "access to a file"), "file names"
)  # without this layer they are known to succeed

PROGRAMS = [
    *OF_THE_TESTS,
    *(HostileProgram(f"{name}, again", text, f"{name} works", layer=_LAYERS.get(name)) for name, text in _REACHING.items()),
]
