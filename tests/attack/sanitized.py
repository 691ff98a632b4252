"""Builds the C kernels with address and undefined-behaviour sanitizers in a separate folder, and runs with them."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_FOLDER = "LAYERSKIP_ATTACK_KERNELS"  # environment variable with the folder of the built kernels
_FLAGS = (
    "-O1",
    "-g",
    "-shared",
    "-fPIC",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def restart_sanitized() -> None:
    """Builds the kernels and restarts this program with the sanitizers' runtime. Returns only in the restarted process."""
    if os.environ.get(_FOLDER):
        return
    folder = Path(tempfile.mkdtemp(prefix="layerskip-sanitized-"))
    modules = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    for module in modules:
        flags = [flag for flag in module["extra-compile-args"] if not flag.startswith("-O")]
        target = folder / (module["name"].rpartition(".")[2] + EXTENSION_SUFFIXES[0])
        sources = [str(_ROOT / source) for source in module["sources"]]
        subprocess.run(["gcc", *flags, *_FLAGS, *sources, "-o", str(target), "-lm"], check=True)
    runtime = [_library("libasan.so"), _library("libstdc++.so.6")]  # the first needs the second as soon as it starts
    environment = {
        **os.environ,
        _FOLDER: str(folder),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "tests.attack", *sys.argv[1:]], environment)


def _library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def use_sanitized_kernels() -> None:
    """With the runtime: loads the kernels from the folder where they were built, and removes the folder at the end."""
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        from layerskip_core.model.native import compiled

        compiled.__file__ = str(Path(folder) / "compiled.py")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
