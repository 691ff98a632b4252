"""The kernels are optional at installation, so a failed build is silent there. Here it is not."""

import os
import runpy
import shutil
import sysconfig
from pathlib import Path

import pytest

from layerskip_core.model.native import compiled

BUILD = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
_COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.mark.skipif(not compiled.VARIANTS, reason="there are no kernels for this processor and system")
@pytest.mark.skipif(shutil.which(_COMPILER) is None, reason="there is no C compiler")
def test_the_kernels_were_built_where_there_is_a_compiler():
    folder = Path(compiled.__file__).parent
    absent = [name for name in compiled.VARIANTS if not (folder / f"_{name}.so").is_file()]
    assert not absent, f"{_COMPILER} did not build {', '.join(absent)}: `pip install -v -e .` shows why"
    assert compiled.kernel_note() is None


def test_the_variants_of_each_processor_are_those_of_the_build():
    assert {name: list(flags) for name, flags in BUILD["VARIANTS"].items()} == {
        name: list(needs) for name, needs in compiled._CPU_FLAGS.items()
    }
    assert list(BUILD["VARIANTS"].get(BUILD["target"](), {})) == list(compiled.VARIANTS)


@pytest.mark.parametrize(
    ("target", "processor"),
    [
        ("linux-x86_64", "x86_64"),
        ("linux-aarch64", "aarch64"),
        ("macosx-14.0-arm64", "aarch64"),
        ("macosx-14.0-x86_64", None),
        ("win-amd64", None),
        ("win-arm64", None),
        ("linux-riscv64", None),
    ],
)
def test_what_is_built_depends_on_the_target(monkeypatch, target, processor):
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", target)
    built, variants = BUILD["extensions"](), BUILD["VARIANTS"].get(processor, {})
    assert BUILD["target"]() == processor
    assert [extension.name for extension in built] == [f"layerskip_core.model.native._{name}" for name in variants]
    assert all(extension.optional for extension in built)
