"""Builds the compiled kernels, whose variants depend on the target machine: pyproject.toml cannot
express that.

They are optional: without a C compiler, and on other processors and systems, decoding runs on
PyTorch's kernels alone. They use no Python API (native/compiled.py loads them with ctypes), so one
wheel serves every Python version.
"""

import os
import platform
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("layerskip_core", "model", "native")
FLAGS = ["-O3", "-std=c11", "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=off"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vnni",
    "-mavx512bf16",
    "-mavx512vbmi",
]
VARIANTS = {  # by processor: the flags of each variant
    "x86_64": {
        "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16"],
        "avx512_fma": [*_AVX512, "-DWIDEN_BF16"],
        "avx512": _AVX512,
        "avx512_vnni": [*_AVX2, "-DEVEX_VNNI"],
        "avx_vnni": [*_AVX2, "-mavxvnni"],
        "avx2": _AVX2,
    },
    "aarch64": {
        "neon_bf16": ["-march=armv8.2-a+dotprod+bf16+i8mm"],
        "neon_dot": ["-march=armv8.2-a+dotprod"],
        "neon": ["-march=armv8-a"],
    },
}
PROCESSORS = {
    ("linux", "x86_64"): "x86_64",
    ("linux", "aarch64"): "aarch64",
    ("macosx", "arm64"): "aarch64",
}


def target() -> str | None:
    """The processor to build for, as a key of VARIANTS; None where the kernels do not run."""
    system, *_, machine = get_platform().split("-")
    return PROCESSORS.get((system, machine))


def extensions() -> list[Extension]:
    depends = sorted(path.as_posix() for path in FOLDER.glob("*.[ch]"))
    return [
        Extension(
            f"layerskip_core.model.native._{name}",
            [(FOLDER / f"{name}.c").as_posix()],
            extra_compile_args=[*FLAGS, *flags],
            depends=depends,
            optional=True,
        )
        for name, flags in VARIANTS.get(target() or "", {}).items()
    ]


class BuildKernels(build_ext):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = True  # compiles variants in parallel

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class KernelWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    # A Python for both of Apple's processors: build for this one
    if get_platform().endswith("universal2"):
        os.environ["_PYTHON_HOST_PLATFORM"] = f"macosx-11.0-{platform.machine()}"
        os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    if target() is None:
        print(
            f"layerskip: there are no compiled kernels for {get_platform()}: decoding will run on PyTorch's",
            file=sys.stderr,
        )
    setup(
        ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel}
    )
