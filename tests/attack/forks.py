"""Commands in forks of a process that has imported their libraries: each starts in milliseconds,
and may be killed.

The forking process runs nothing of these libraries itself, because a fork lacks the threads of its
parent.
"""

import gc
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
from itertools import chain
from pathlib import Path

from command_line import Result, words

import cli
import layerskip_core

_EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)
_SECONDS = 120  # a command that takes longer is ended by SIGALRM
_LIBRARIES = (
    "command_line",  # in every fork pytest imports it again, which takes half a second
    "pytest",
    "datasets",
    "evaluate",
    "matplotlib.backends.backend_agg",
    "peft",
    "rouge_score.rouge_scorer",
    "transformers.trainer",
)


def import_once():
    """Makes Python's fork server, which starts with its first process, import what commands and
    trainings need.
    """
    packages = (
        pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for package in (cli, layerskip_core)
    )
    modules = [name for _, name, _ in chain(*packages) if not name.endswith("__main__")]
    multiprocessing.set_forkserver_preload([*_LIBRARIES, *modules])


class Forks:
    """Starts commands, and says how they ended."""

    def start(self, folder, *arguments, stdin="", strike=(0, 0)):
        """Starts `layerskip` in a folder, and returns its process. Its streams go to files beside
        the folder.

        `strike`: the number of the change to a file below `folder/out` before which it gets a
        signal, and the signal.
        """
        folder.with_name("stdin").write_text(stdin)
        import_once()
        process = multiprocessing.get_context("forkserver").Process(
            target=_command, args=(str(folder), arguments, *strike)
        )
        process.start()
        return process

    def wait(self, folder, process) -> Result:
        process.join()
        return Result(
            process.exitcode,
            *(_log(folder, name, process.pid).read_text() for name in ("stdout", "stderr")),
        )

    def run(self, folder, *arguments, **keywords) -> Result:
        return self.wait(folder, self.start(folder, *arguments, **keywords))

    def changes(self, folder, process) -> int:
        """How many changes to files below `folder/out` a process made."""
        return _log(folder, "changes", process.pid).stat().st_size


def _log(folder, name, pid):
    return Path(folder).with_name(f"{name}-{pid}")


def hasten():
    """In a fork: it copies no pages to look for garbage, and waits for no disk."""
    gc.freeze()
    os.fsync = lambda _: None  # killed processes lose nothing that they wrote


def _command(folder, arguments, moment, number):
    hasten()
    os.setsid()
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path = Path(folder).with_name(name) if name == "stdin" else _log(folder, name, os.getpid())
        os.dup2(
            os.open(path, os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT), descriptor
        )
    sys.stdin = os.fdopen(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(_SECONDS)
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    sys.argv = ["layerskip", *words(arguments)]
    _watch(
        Path(folder) / "out",
        moment,
        number,
        os.open(_log(folder, "changes", os.getpid()), os.O_WRONLY | os.O_CREAT),
    )
    from cli.main import main

    main()


def _watch(out, moment, number, counter):
    """Writes a byte to `counter` for each change to files at or below `out`; at the given one,
    sends the signal first.
    """
    names = (str(out), out.name)
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event not in _EVENTS or (event == "open" and not _writes(arguments[2])):
            return
        paths = [
            os.fsdecode(one) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)
        ]
        # Relative to a descriptor of its folder
        inner = event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)
        if not inner and not any(
            path == name or path.startswith(f"{name}/") for path in paths for name in names
        ):
            return
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), number)
        os.write(counter, b".")

    sys.addaudithook(hook)


def _writes(flags):
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
