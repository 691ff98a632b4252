"""Commands in forks of a process that has imported their libraries: each starts in milliseconds, and may be killed.

The forking process runs nothing of these libraries itself, because a fork lacks the threads of its parent.
"""

import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from command_line import Result

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_SECONDS = 120  # a command that takes longer is ended by SIGALRM


class Forks:
    """The forking process, seen by the tests."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)

    def start(self, folder, *arguments, stdin="", strike=(0, 0)):
        """Starts `layerskip` in a folder, and returns its process id. Its streams go to files beside the folder.

        `strike`: the number of the change to a file below `folder/out` before which it gets a signal, and the signal.
        """
        folder.with_name("stdin").write_text(stdin)
        return self._ask(["start", str(folder), arguments, *strike])

    def wait(self, folder, pid) -> Result:
        return Result(self._ask(["wait", pid]), *(_log(folder, name, pid).read_text() for name in ("stdout", "stderr")))

    def run(self, folder, *arguments, **keywords) -> Result:
        return self.wait(folder, self.start(folder, *arguments, **keywords))

    def changes(self, folder, pid) -> int:
        """How many changes to files below `folder/out` a process made."""
        return _log(folder, "changes", pid).stat().st_size

    def close(self):
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _log(folder, name, pid):
    return Path(folder).with_name(f"{name}-{pid}")


def _serve():
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import cli
    import layerskip_core

    os.fsync = lambda _: None  # killed processes lose nothing that they wrote
    for package in (cli, layerskip_core):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with suppress(ImportError):  # what needs an extra; the kernels
                    importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # so that forks copy no pages to look for garbage
    for line in sys.stdin:
        what, *values = json.loads(line)
        if what == "start":
            pid = os.fork()
            if pid == 0:
                os._exit(_command(*values))
            answer = pid
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(*values, 0)[1])
        print(json.dumps(answer), flush=True)


def _command(folder, arguments, moment, number):
    """In a fork: what the console script does. Returns the exit status."""
    os.setsid()
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path = Path(folder).with_name(name) if name == "stdin" else _log(folder, name, os.getpid())
        os.dup2(os.open(path, os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = os.fdopen(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(_SECONDS)
    os.chdir(folder)
    sys.argv = ["layerskip", *arguments]
    _watch(Path(folder) / "out", moment, number, os.open(_log(folder, "changes", os.getpid()), os.O_WRONLY | os.O_CREAT))
    from cli.main import main

    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    return status


def _watch(out, moment, number, counter):
    """Writes a byte to `counter` for each change to files at or below `out`; at the given one, sends the signal first."""
    names, seen = (str(out), out.name), 0

    def hook(event, arguments):
        nonlocal seen
        if event not in _EVENTS or (event == "open" and not _writes(arguments[2])):
            return
        paths = [os.fsdecode(one) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
        inner = event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)  # relative to a descriptor of its folder
        if not inner and not any(path == name or path.startswith(f"{name}/") for path in paths for name in names):
            return
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), number)
        os.write(counter, b".")

    sys.addaudithook(hook)


def _writes(flags):
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


if __name__ == "__main__":
    _serve()
