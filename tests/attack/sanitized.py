"""Builds the C kernels with address and undefined-behaviour sanitizers in a separate folder, and runs with them."""

import atexit
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
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
    build = runpy.run_path(str(_ROOT / "setup.py"))
    for name, own_flags in build["VARIANTS"][build["target"]()].items():
        flags = [flag for flag in (*build["FLAGS"], *own_flags) if not flag.startswith("-O")]
        source, target = _ROOT / build["FOLDER"] / f"{name}.c", folder / f"_{name}.so"
        subprocess.run(["gcc", *flags, *_FLAGS, str(source), "-o", str(target), "-lm"], check=True)
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
