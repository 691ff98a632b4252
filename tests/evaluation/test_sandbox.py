"""Programs that try to hang or to break out of the sandbox, with and without namespaces."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hostile_programs import ASKED, ATTEMPTS, PROGRAMS, making

from layerskip_core.errors import ConfigError, LayerSkipError
from layerskip_core.evaluation import sandbox
from layerskip_core.evaluation.sandbox import Limits, run_tests, standing_layers

SHORT = Limits(seconds=1.0, cpu_seconds=5, processes=4)
WAYS = [True, False] if "processes" in standing_layers() else [False]


@pytest.fixture(params=WAYS, ids=lambda namespaces: "namespaces" if namespaces else "no namespaces")
def namespaces(request):
    return request.param


def needs(layer):
    return pytest.mark.skipif(
        layer not in standing_layers(), reason=f"this kernel has no layer for {layer}"
    )


def none_is_left(marker):
    """The kernel ends what is in a process namespace soon after its first process."""
    deadline = time.monotonic() + 10
    while survivors(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    return survivors(marker) == []


def survivors(marker):
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [file.parent.name] if str(marker).encode() in file.read_bytes() else []
    return found


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A path that is in the command line of every process of the sandbox."""
    link = tmp_path / "root"
    link.symlink_to(sandbox._ROOT)
    monkeypatch.setattr(sandbox, "_ROOT", str(link))
    return link


def test_a_right_program_passes_and_a_wrong_one_fails(namespaces):
    program = (
        "import collections, math, re\nfrom typing import List\n\ndef f(x):\n    return x + 1\n"
    )
    assert run_tests(program, "assert f(1) == 2\nassert f(2) == 3", namespaces=namespaces) == ""
    wrong = run_tests(
        program, "assert f(1) == 2\nassert f(2) == 4, 'not four'", namespaces=namespaces
    )
    assert wrong == "AssertionError: not four"


@pytest.mark.parametrize(
    "program, reason",
    [
        ("def f(x:\n", "SyntaxError"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "program.E"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        (
            "import sys\nassert not sys.stdin.read() and not __name__ == '__main__'\nf()",
            "NameError",
        ),
        ("import ctypes; ctypes.string_at(0)", "ended, or was ended"),
        ("bytearray(1 << 32)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 21))", "OSError: [Errno 27] File too large"),
        (
            "import os\nassert 'SECRET_OF_THE_TEST' not in os.environ and 'PATH' not in os.environ\nf()",
            "NameError",
        ),
        ("import os\nif os.fork() == 0: raise KeyError\nos.wait()\nf()", "NameError"),
    ],
)
def test_the_reason_names_what_ended_the_program(monkeypatch, program, reason):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "s")
    assert run_tests(program, "").startswith(reason)


@pytest.mark.parametrize(
    "program",
    ["while True: print('x' * 1000000)", "import os\nwhile True: os.write(3, bytes(4096))"],
    ids=["output", "verdict"],
)
def test_the_time_limit_ends_a_program(program):
    assert run_tests(program, "", SHORT)
    assert run_tests("def f(): pass", program, SHORT)


def test_the_cpu_limit_ends_a_program():
    reason = run_tests("while True: pass", "", Limits(seconds=60.0, cpu_seconds=1))
    assert reason.startswith("ended, or was ended by a limit")


def test_processes_are_few_and_none_is_left(namespaces, marker):
    counting = "import os, time\ncount = 0\ntry:\n  while count < 50:\n    if os.fork() == 0: time.sleep(600)\n    count += 1\n"
    counting += "except OSError: pass\nraise Exception(count)"
    assert (
        int(run_tests(counting, "", Limits(processes=4), namespaces).removeprefix("Exception: "))
        <= 4
    )
    assert none_is_left(marker)
    assert run_tests(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "", SHORT, namespaces
    )
    assert none_is_left(marker)


CHAIN = "import os\nif os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)\n"
DAEMON = """
import os, signal, time
for _ in range(2):
    if os.fork() == 0:
        try: os.setsid()
        except OSError: pass
        if os.fork():
            os._exit(0)
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            try: signal.signal(number, signal.SIG_IGN)
            except OSError: pass
        time.sleep(600)
    os.wait()
"""


@pytest.mark.parametrize("program", [CHAIN, DAEMON], ids=["forks and ends", "daemons"])
def test_what_a_program_leaves_behind_is_killed(namespaces, marker, program):
    assert not run_tests(program, "", namespaces=namespaces)
    assert none_is_left(marker)
    assert run_tests(program + "while True: pass", "", SHORT, namespaces)
    assert none_is_left(marker)


@pytest.mark.parametrize("attack", ["os.kill(os.getppid(), 9)", "os.kill(-1, 9)"])
def test_killing_others_gains_nothing(namespaces, marker, attack):
    program = f"import os\ntry: {attack}\nexcept OSError: pass\nwhile True: pass"
    assert run_tests(program, "", SHORT, namespaces)
    assert none_is_left(marker)


HARNESS = """
import sys
sys.path[:0] = [sys.argv[1]]
from layerskip_core.evaluation import sandbox
sandbox._ROOT = sys.argv[2]
sandbox.run_tests(sys.argv[3], "", sandbox.Limits(seconds=600.0), namespaces=sys.argv[4] == "True")
"""


@needs("system calls")
def test_no_process_survives_the_end_of_the_harness(marker, namespaces, temporary_folder):
    left = DAEMON + "time.sleep(600)"
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS, sandbox._ROOT, str(marker), left, str(namespaces)],
        env={"TMPDIR": temporary_folder},
        stderr=subprocess.DEVNULL,
    )
    while len(survivors(marker)) < 5:  # harness, supervisor, program and two daemons
        assert harness.poll() is None
        time.sleep(0.05)
    harness.kill()
    harness.wait()
    assert none_is_left(marker)
    for path in Path(temporary_folder).iterdir():
        shutil.rmtree(path)


def test_a_program_has_a_folder_of_its_own_and_inherits_no_open_file(namespaces, tmp_path):
    own = "import os, tempfile\nassert os.listdir('.') == []\nwith tempfile.TemporaryFile() as file: file.write(b'x')\n"
    own += "os.makedirs('a/b'); open('a/b/c', 'w').write('d')"
    assert not run_tests(own, "assert open('a/b/c').read() == 'd'", namespaces=namespaces)
    (tmp_path / "secret").write_text("secret")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        program = "import os\nfor fd in range(4, 64):\n  try: os.fstat(fd)\n  except OSError: pass\n  else: 1/0"
        assert not run_tests(program, "")


def test_threads_processes_signals_and_event_loops_work(namespaces):
    program = """
import asyncio, multiprocessing.pool, os, signal, threading, time
results = []
threads = [threading.Thread(target=results.append, args=(one,)) for one in range(3)]
[one.start() for one in threads]; [one.join() for one in threads]
asyncio.run(asyncio.sleep(0))
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, b'child'); os._exit(0)
os.wait(); results.append(os.read(reader, 5))
rung = []
signal.signal(signal.SIGALRM, lambda *all: rung.append(1))
def ring():
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.1)
    return rung
"""
    tests = (
        "assert sorted(results[:3]) == [0, 1, 2] and results[3] == b'child'\nassert ring() == [1]\n"
    )
    assert run_tests(program, tests, namespaces=namespaces) == ""


def of_user(home, pid):
    """The state of a folder and a process that no program may change."""
    files = {}
    for path in (home, home / "secret", home / "link"):
        status = os.lstat(path)
        files[path.name] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_size,
            status.st_nlink,
        )
    limits = [resource.prlimit(pid, kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)]
    bent = (
        os.getpriority(os.PRIO_PROCESS, pid),
        os.sched_getaffinity(pid),
        os.sched_getscheduler(pid),
        limits,
    )
    return (
        sorted(os.listdir(home)),
        (home / "secret").read_text(),
        os.getxattr(home / "secret", "user.kept"),
        files,
        bent,
    )


def make_home(home):
    (home / "secret").write_text("secret")
    (home / "link").symlink_to("secret")
    os.setxattr(home / "secret", "user.kept", b"kept")


@pytest.fixture
def temporary_folder(monkeypatch):
    """The folder for the sandbox's own folders, in memory if possible; empty before and after."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as folder:
        os.chmod(folder, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder
        monkeypatch.undo()


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_home(home)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield home, process.pid
    assert process.poll() is None
    process.kill()
    process.wait()


def attempted(home, pid, namespaces):
    """The reason why a program that makes all attempts has ended; empty if each of them failed as
    it must.
    """
    return run_tests(
        making(ATTEMPTS | (ASKED if namespaces else {}), str(home), pid), "", None, namespaces
    )


@needs("files")
@needs("system calls")
def test_every_attempt_to_break_out_fails(namespaces, victim, temporary_folder):
    before = of_user(*victim)
    assert attempted(*victim, namespaces) == ""
    assert of_user(*victim) == before
    assert os.listdir(tempfile.gettempdir()) == []


@needs("files")
@needs("system calls")
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs(name, namespaces, temporary_folder):
    program, refused = PROGRAMS[name]
    reason = run_tests(program, "", SHORT if "took" in refused else None, namespaces)
    assert re.match(refused, reason), reason
    assert os.listdir(tempfile.gettempdir()) == []


AS_A_USER = """
import json, os, subprocess, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:4]
import test_sandbox as tests
home = Path(os.environ["HOME"])
tests.make_home(home)
victim = subprocess.Popen(["sleep", "600"])
before = tests.of_user(home, victim.pid)
failed = [tests.attempted(home, victim.pid, way) for way in tests.WAYS]
unchanged = tests.of_user(home, victim.pid) == before and victim.poll() is None
right = not any(tests.run_tests("def f(x): return x", "assert f(1) == 1", None, way) for way in tests.WAYS)
victim.kill()
layers = tests.standing_layers()
print(json.dumps({"user": os.getuid(), "layers": layers, "failed": failed, "unchanged": unchanged, "right": right}))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as a plain user already")
@needs("files")
@needs("system calls")
def test_hostile_programs_of_a_plain_user():
    user = 61_234
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as temporary:
        os.chown(home, user, user)
        os.chown(temporary, user, user)
        folders = map(str, Path(__file__).parents[2::-1])  # the root, tests and this one
        command = [interpreter_of_all(), "-c", AS_A_USER, *folders]
        environment = {
            "HOME": home,
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(pytest.__file__).parents[1]),
            "TMPDIR": temporary,
        }
        ran = subprocess.run(
            command,
            user=user,
            group=user,
            extra_groups=[],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["user"], found["layers"]) == (user, list(standing_layers()))
    assert (found["failed"], found["unchanged"], found["right"]) == ([""] * len(WAYS), True, True)


def interpreter_of_all():
    for path in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            command = [path, "-c", "import sys; print(sys.version_info >= (3, 11))"]
            if subprocess.run(command, user=65534, capture_output=True).stdout == b"True\n":
                return path
    pytest.skip("no Python here that a plain user could start")


def start_with(patch):
    return (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from layerskip_core.evaluation.sandbox import seccomp, supervisor\n"
        f"def fail(*all): raise OSError(22, 'Invalid argument')\n{patch}\nsupervisor.main()"
    )


NO_LANDLOCK = "supervisor._allow_files_only = lambda *all: 0"
NO_NAMESPACES = "supervisor.enter_namespaces = fail"


@pytest.mark.parametrize(
    "patch, missing",
    [
        (NO_NAMESPACES, {"file names", "processes"}),
        ("supervisor._enter_small_tree = fail", {"file names", "processes"}),
        (NO_LANDLOCK, {"files"}),
        ("seccomp.filter_calls = lambda *all: False", {"system calls"}),
    ],
)
def test_a_layer_that_the_kernel_forbids_is_left_out_and_reported_missing(
    monkeypatch, patch, missing, marker
):
    before = set(standing_layers())
    monkeypatch.setattr(sandbox, "_START", start_with(patch))
    monkeypatch.setattr(sandbox, "standing_layers", standing_layers.__wrapped__)
    assert set(sandbox.standing_layers()) == before - missing
    assert not run_tests("import math", "assert math.pi > 3")
    assert none_is_left(marker)


@needs("files")
@needs("file names")
@pytest.mark.parametrize(
    "patch, protects",
    [(NO_LANDLOCK, True), (NO_NAMESPACES, True), (f"{NO_LANDLOCK}; {NO_NAMESPACES}", False)],
)
def test_a_program_that_could_remove_files_is_not_run(monkeypatch, patch, protects):
    # Not above: the plain user's Python may have no packages
    from layerskip_core.config.evaluation import TaskConfig
    from layerskip_core.evaluation.tasks import code

    monkeypatch.setattr(sandbox, "_START", start_with(patch))
    monkeypatch.setattr(sandbox, "standing_layers", standing_layers.__wrapped__)
    monkeypatch.setattr(code, "standing_layers", standing_layers.__wrapped__)
    with tempfile.TemporaryDirectory() as home:  # which every user can reach and write
        os.chmod(home, 0o777)
        Path(home, "kept").touch()
        run_tests(f"import os; os.unlink('{home}/kept')", "")
        assert os.listdir(home) == ["kept"] * protects
    with (
        nullcontext()
        if protects
        else pytest.raises(ConfigError, match="needs a sandbox that protects files")
    ):
        code._notes(TaskConfig(allow_code_execution=True))


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "_START", start_with("supervisor._set_limits = fail"))
    with pytest.raises(
        LayerSkipError, match=r"cannot be set up: OSError: \[Errno 22\] Invalid argument"
    ):
        run_tests("", "", namespaces=False)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-r", "true"], check=False).returncode != 0,
    reason="no user namespaces here",
)
def test_root_of_a_user_namespace_that_knows_no_other_user_runs_programs():
    code = "from layerskip_core.evaluation.sandbox import run_tests\n"
    code += "print([run_tests('x = 1', 'assert x == 1', None, way) for way in (None, False)])"
    ran = subprocess.run(
        ["unshare", "-r", sys.executable, "-c", code],
        cwd=sandbox._ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "['', '']\n"
