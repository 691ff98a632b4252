"""The kernels are optional at installation, so a failed build is silent there. Here it is not."""

import os
import platform
import shutil
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from layerskip_core.model.native import compiled

_COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
_BUILDS = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which(_COMPILER) is not None


@pytest.mark.skipif(not _BUILDS, reason="the kernels are built on x86_64 Linux with a C compiler")
def test_the_kernels_were_built_where_there_is_a_compiler():
    folder = Path(compiled.__file__).parent
    absent = [name for name in compiled.VARIANTS if not any((folder / f"_{name}{end}").is_file() for end in EXTENSION_SUFFIXES)]
    assert not absent, f"{_COMPILER} did not build {', '.join(absent)}: `pip install -v -e .` shows why"
    assert compiled.kernel_note() is None
