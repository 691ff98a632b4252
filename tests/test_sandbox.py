"""Programs that try to hang, to break out or to look as if their tests had passed: with namespaces and without."""

import os
import socket
from pathlib import Path

import pytest

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation import sandbox
from layerskip_core.evaluation.sandbox import Limits, run_tests, standing_walls

FAILING = "assert f(1) == 3"
SHORT = Limits(seconds=1.0, cpu_seconds=5, processes=4)


@pytest.fixture(params=[True, False], ids=["namespaces", "no namespaces"])
def namespaces(request):
    return request.param


def needs(wall):
    return pytest.mark.skipif(wall not in standing_walls(), reason=f"this kernel gives no wall around {wall}")


def survivors(marker):
    """Processes whose command line names the marker."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file.parent.name] if str(marker).encode() in file.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A path that stands in the command line of every process of the sandbox."""
    link = tmp_path / "root"
    link.symlink_to(sandbox._ROOT)
    monkeypatch.setattr(sandbox, "_ROOT", str(link))
    return link


def test_a_right_program_passes_and_a_wrong_one_fails(namespaces):
    program = "import collections, math, re\nfrom typing import List\n\ndef f(x):\n    return x + 1\n"
    assert run_tests(program, "assert f(1) == 2\nassert f(2) == 3", namespaces=namespaces) == sandbox.Verdict(True, "")
    wrong = run_tests(program, "assert f(1) == 2\nassert f(2) == 4, 'not four'", namespaces=namespaces)
    assert wrong == sandbox.Verdict(False, "AssertionError: not four")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x:\n", "SyntaxError"),
        ("raise ValueError('\\ud800')", "ValueError: ?"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("input()", "EOFError"),
        ("import sys\nassert not sys.stdin.read() and not __name__ == '__main__'\nf()", "NameError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended, or was ended"),
        ("import ctypes; ctypes.string_at(0)", "ended, or was ended"),
        ("def f(x): return f(x)\nf(1)", "RecursionError"),
        ("bytearray(1 << 32)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 21))", "OSError: [Errno 27] File too large"),
        ("import os\nassert os.environ.get('SECRET_OF_THE_TEST') or dict(os.environ) == {}\nf(os.environ)", "NameError"),
    ],
)
def test_what_ends_a_program_is_told(monkeypatch, program, reason):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "s")
    verdict = run_tests(program, "")
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "while True: print('x' * 1000000)", "import time; time.sleep(1000)"],
    ids=["loop", "output", "sleep"],
)
def test_time_ends(program):
    assert not run_tests(program, "", SHORT).passed
    assert not run_tests("def f(): pass", program, SHORT).passed


def test_cpu_time_ends():
    verdict = run_tests("while True: pass", "", Limits(seconds=60.0, cpu_seconds=1))
    assert verdict.reason.startswith("ended, or was ended by a limit")


def test_processes_are_few_and_none_is_left(namespaces, marker):
    counting = "import os, time\ncount = 0\ntry:\n  while count < 50:\n    if os.fork() == 0: time.sleep(600)\n    count += 1\n"
    counting += "except OSError: pass\nraise Exception(count)"
    verdict = run_tests(counting, "", Limits(processes=4), namespaces)
    assert int(verdict.reason.removeprefix("Exception: ")) <= 4
    assert survivors(marker) == []
    assert not run_tests("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "", SHORT, namespaces).passed
    assert survivors(marker) == []


def test_a_daemon_is_killed_too(namespaces, marker):
    daemon = "import os, signal, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    daemon += "    [signal.signal(one, signal.SIG_IGN) for one in (1, 2, 15)]\n    time.sleep(600)\n  os._exit(0)\nos.wait()\n"
    assert run_tests(daemon, "", namespaces=namespaces).passed
    assert survivors(marker) == []


@needs("files")
def test_files_of_the_machine_can_neither_be_read_nor_written(tmp_path, namespaces):
    (tmp_path / "secret").write_text("secret")
    os.chmod(tmp_path, 0o777)
    home = os.path.expanduser("~")
    assert not run_tests(f"assert open({str(tmp_path / 'secret')!r}).read()", "", namespaces=namespaces).passed
    assert not run_tests(f"import os; os.listdir({home!r})", "", namespaces=namespaces).passed
    assert not run_tests("import os; os.listdir('/proc/1')", "", namespaces=namespaces).passed
    assert not run_tests(f"open({str(tmp_path / 'new')!r}, 'w')", "", namespaces=namespaces).passed
    assert not run_tests("import os; os.execv('/bin/sh', ['sh', '-c', 'true'])", "", namespaces=namespaces).passed
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    own = (
        "import os\nassert os.listdir('.') == []\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nassert open('a/b').read() == 'c'"
    )
    assert run_tests(own, "", namespaces=namespaces).passed


def test_no_open_file_is_inherited(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        reading = (
            f"import os\nfor fd in [{file.fileno()}, *range(4, 64)]:\n  try: os.fstat(fd)\n  except OSError: pass\n  else: 1/0"
        )
        assert run_tests(reading, "").passed


@needs("network")
def test_no_network(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        connect = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 1)"
        assert not run_tests(connect, "", namespaces=namespaces).passed
        with pytest.raises(TimeoutError):
            listener.accept()


def test_killing_the_parent_gains_nothing(namespaces, marker):
    assert not run_tests("import os; os.kill(os.getppid(), 9)\nwhile True: pass", "", SHORT, namespaces).passed
    assert survivors(marker) == []


@needs("processes")
def test_killing_everything_kills_nothing_outside(marker):
    assert not run_tests("import os; os.kill(-1, 9); os.killpg(0, 9)", "1/0").passed
    assert survivors(marker) == []


IMITATION = """
import os, sys
for text in ('{"passed": true, "reason": "", "walls": []}\\n', '[]\\n\\n', 'passed\\n'):
    print(text, flush=True)
    for fd in range(64):
        try: os.write(fd, text.encode())
        except OSError: pass
os._exit(0)
"""
PATCHES = """
import builtins, os, sys
builtins.exec = builtins.compile = builtins.eval = lambda *a, **k: None
builtins.AssertionError = builtins.SystemExit = type('Quiet', (Exception,), {})
os._exit = sys.exit = lambda *a: None
os.write = lambda *a: 0
sys.excepthook = lambda *a: None
sys.modules['__main__'].__dict__.clear()
def f(x): return 2
"""
ECHO = "import os\nos.write(3, os.read(3, 32) + b'\\n')\nos._exit(0)\n"
SKIPPING = """
import sys
def skip(frame, event, argument):
    if event == 'line' and frame.f_code.co_filename == '<tests>': frame.f_lineno = 9; sys.settrace(None); frame.f_trace = None
    return skip
sys.settrace(skip)
def f(x): return 2
"""


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (IMITATION, FAILING),
        (PATCHES, FAILING),
        (ECHO, FAILING),
        (f"def f(x):\n    exec({ECHO!r})", FAILING),
        (SKIPPING, FAILING + "\n\n\n\n\n\n\n\npass"),
        ("def f(x): raise SystemExit(0)", FAILING),
        ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 2", FAILING),
        ("import threading, os\nthreading.Timer(0.0, os._exit, [0]).start()\ndef f(x): return 2", FAILING),
    ],
    ids=["imitation", "patches", "echo", "echo in a test", "trace", "exit in a test", "atexit", "thread"],
)
def test_the_verdict_cannot_be_forged(program, tests):
    assert not run_tests(program, tests).passed


def test_an_echo_of_the_channel_is_found_out_by_the_failing_assertion():
    assert run_tests(ECHO, "").reason == "a failing assertion behind its tests was not reached"


def test_a_sandbox_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_ROOT", str(tmp_path))
    monkeypatch.setattr(sandbox, "_START", "import sys; sys.exit('no interpreter here')")
    with pytest.raises(LayerSkipError, match="generated code cannot be run here: no interpreter here"):
        run_tests("", "")
