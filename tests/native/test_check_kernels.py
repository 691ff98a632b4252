"""The kernels of every processor against plain C, by check_kernels.c: on this machine, and in an
emulator for others.
"""

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(ROOT / "setup.py"))
LACKS_INSTRUCTIONS = 77
CASES = [  # processor, variant, and a CPU of the emulator that has just its instructions
    ("x86_64", "avx2", "Haswell"),
    ("x86_64", "avx512_vnni", "max"),
    ("aarch64", "neon", "cortex-a53"),
    ("aarch64", "neon_dot", "cortex-a76"),
    ("aarch64", "neon_bf16", "max"),
]


def built(processor, variant, folder):
    """The program, and what runs it if that is not this machine itself."""
    is_own = processor == platform.machine()
    compiler, emulator = (
        ("cc", None) if is_own else (f"{processor}-linux-gnu-gcc", f"qemu-{processor}")
    )
    for tool in (compiler, emulator):
        if tool is not None and shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = folder / variant
    flags = [flag for flag in BUILD["FLAGS"] if not flag.startswith("-O")] + BUILD["VARIANTS"][
        processor
    ][variant]
    options = ["-O2", *flags, *([] if is_own else ["-static"]), "-I", str(ROOT / BUILD["FOLDER"])]
    source = str(ROOT / "tests/native/check_kernels.c")
    subprocess.run([compiler, *options, source, "-o", str(program), "-lm", "-lpthread"], check=True)
    return program, emulator


def run(program, emulator, cpu):
    command = [str(program)] if emulator is None else [emulator, "-cpu", cpu, str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processor, variant, cpu", CASES)
def test_the_kernels_compute_what_plain_c_does(processor, variant, cpu, tmp_path):
    program, emulator = built(processor, variant, tmp_path)
    done = run(program, emulator, cpu)
    if done.returncode == LACKS_INSTRUCTIONS and emulator is None:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    if emulator is not None and variant != "neon":
        assert run(program, emulator, "cortex-a53").returncode == LACKS_INSTRUCTIONS
