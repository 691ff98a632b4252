"""The kernels are optional: which are built and chosen, and what is told of those that are missing.
Here none may be.
"""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import run
from conftest import ids_of, logits_of, tiny_model
from test_native import BUILT, model_of, needs_kernels, threads, variant  # noqa: F401  fixtures

from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import ConfigError, LayerSkipError
from layerskip_core.model import native
from layerskip_core.model.native import compiled

BUILD = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
_COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.mark.skipif(
    not compiled.VARIANTS, reason="there are no kernels for this processor and system"
)
@pytest.mark.skipif(shutil.which(_COMPILER) is None, reason="there is no C compiler")
def test_the_kernels_were_built_where_there_is_a_compiler():
    folder = Path(compiled.__file__).parent
    absent = [name for name in compiled.VARIANTS if not (folder / f"_{name}.so").is_file()]
    assert not absent, (
        f"{_COMPILER} did not build {', '.join(absent)}: `pip install -v -e .` shows why"
    )
    assert compiled.kernel_note() is None


def test_the_variants_of_each_processor_are_those_of_the_build():
    assert {name: list(flags) for name, flags in BUILD["VARIANTS"].items()} == {
        name: list(needs) for name, needs in compiled._CPU_FLAGS.items()
    }
    assert list(BUILD["VARIANTS"].get(BUILD["target"](), {})) == list(compiled.VARIANTS)


@pytest.mark.parametrize(
    "target, processor",
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
    built = BUILD["extensions"]()
    variants = BUILD["VARIANTS"].get(processor, {})
    assert BUILD["target"]() == processor
    assert [extension.name for extension in built] == [
        f"layerskip_core.model.native._{name}" for name in variants
    ]
    assert all(extension.optional for extension in built)


BUILT_FOLDER = Path(compiled.__file__).parent


@needs_kernels
def test_kernels_of_another_version_are_refused(monkeypatch):
    """As after a pull in a checkout."""
    monkeypatch.setattr(compiled, "INTERFACE", compiled.INTERFACE + 1)
    with pytest.raises(LayerSkipError, match="another version: install layerskip again"):
        compiled._load.__wrapped__(BUILT[0])


# The lines of /proc/cpuinfo that matter, by kind of machine
CPUINFO = Path(__file__).with_name("cpuinfo")


@pytest.mark.parametrize(
    "machine, processor, best",
    [
        ("sapphire_rapids", "x86_64", "amx"),
        ("sapphire_rapids_without_amx", "x86_64", "avx512_fma"),
        ("zen5", "x86_64", "avx512"),
        ("zen4", "x86_64", "avx512"),
        ("ice_lake", "x86_64", "avx512_vnni"),
        ("alder_lake", "x86_64", "avx_vnni"),
        ("haswell", "x86_64", "avx2"),
        ("sandy_bridge", "x86_64", None),
        ("graviton3", "aarch64", "neon_bf16"),
        ("graviton2", "aarch64", "neon_dot"),
        ("graviton1", "aarch64", "neon"),
    ],
)
def test_the_flags_of_a_machine_name_its_best_variant(machine, processor, best):
    flags = compiled.flags_in((CPUINFO / f"{machine}.txt").read_text())
    runnable = [name for name, needs in compiled._CPU_FLAGS[processor].items() if needs <= flags]
    assert next(iter(runnable), None) == best


@needs_kernels
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="this system has no /proc/cpuinfo")
def test_the_variants_that_run_are_those_that_the_flags_of_this_machine_name(monkeypatch):
    """C asks the processor itself, Python reads /proc/cpuinfo: the spelling of a flag must not make
    a difference.
    """
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    flags = compiled._cpu_flags()
    named = [name for name in compiled.VARIANTS if compiled._NEEDS[name] <= flags]
    built = [name for name in compiled.VARIANTS if (BUILT_FOLDER / f"_{name}.so").is_file()]
    assert [name for name in built if name in named] == BUILT
    assert compiled.kernels().variant == named[0]


def test_kernels_that_do_not_run_here_are_asked_nothing_else(monkeypatch, tmp_path):
    """Their other functions may have instructions that this CPU lacks, which end the process."""
    (tmp_path / "_avx2.so").touch()
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    refusing = SimpleNamespace(layerskip_supported=lambda: 0)
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda path: refusing)
    assert compiled._load.__wrapped__("avx2") == (
        None,
        {"avx2": "this system does not let them run"},
    )


@needs_kernels
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif("avx2" not in BUILT, reason="asks for x86-64's registers")
@pytest.mark.parametrize("name", compiled.VARIANTS)
def test_whether_kernels_run_here_is_asked_without_vector_registers(name):
    """Every CPU runs this function, of all variants that were built."""
    file = BUILT_FOLDER / f"_{name}.so"
    command = ["objdump", "--disassemble=layerskip_supported", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "<layerskip_supported>:" in listing
    assert not re.search("%[xyz]mm|%tmm", listing)


MISSING = "the compiled kernels are missing: decoding uses torch's"


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """A checkout whose built files were cleaned, on a machine that could run them."""
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    on_processor(monkeypatch, "x86_64", {*compiled._AVX2, "sse2"})
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    monkeypatch.setattr(compiled, "_load", compiled._load.__wrapped__)
    return monkeypatch


def on_processor(monkeypatch, processor, flags):
    needs = compiled._CPU_FLAGS.get(processor, {})
    monkeypatch.setattr(compiled, "_NEEDS", needs)
    monkeypatch.setattr(compiled, "VARIANTS", tuple(needs))
    monkeypatch.setattr(compiled, "_cpu_flags", lambda: flags)


def test_a_note_says_that_kernels_are_missing_if_the_machine_could_run_them(absent):
    for processor, flags, requested, note in (
        ("x86_64", {*compiled._AVX2, "sse2"}, "", MISSING),
        ("x86_64", {*compiled._AVX2, "sse2"}, "torch", None),
        (
            "x86_64",
            {*compiled._AVX2, "sse2"},
            "avx512",
            "this CPU lacks instructions of the avx512 kernels",
        ),
        ("x86_64", {"sse2"}, "", None),
        ("aarch64", {"asimddp", "bf16"}, "", MISSING),
        ("riscv64", set(), "", None),
    ):
        on_processor(absent, processor, flags)
        absent.setenv(compiled.SWITCH, requested)
        found = compiled.kernel_note()
        assert found == note if note is None else found.startswith(note)


@pytest.mark.skipif("avx2" not in BUILT, reason="needs the avx2 kernels")
def test_a_note_says_that_this_system_does_not_let_better_kernels_run(absent, tmp_path):
    """As where a container or an old Linux refuses AMX: the flags are there, C says no."""
    for name in ("avx2", "amx"):
        shutil.copy(BUILT_FOLDER / f"_{name}.so", tmp_path)
    on_processor(absent, "x86_64", compiled.flags_in((CPUINFO / "sapphire_rapids.txt").read_text()))
    load = ctypes.CDLL

    def refusing(path):
        library = load(path)
        if path is not None and path.endswith("_amx.so"):
            library.layerskip_supported = lambda: 0
        return library

    absent.setattr(compiled.ctypes, "CDLL", refusing)
    assert "the compiled amx kernels cannot be loaded (this system does not let them run)" in (
        note := compiled.kernel_note()
    )
    assert "decoding uses the avx2 kernels, which are slower" in note


@pytest.mark.skipif("avx2" not in BUILT, reason="needs the avx2 kernels")
def test_a_note_says_that_a_better_library_cannot_be_loaded(absent, tmp_path):
    """Here a file that is no library; the next variant runs. Where the CPU could not run it anyway
    there is nothing to say.
    """
    shutil.copy(BUILT_FOLDER / "_avx2.so", tmp_path)
    (tmp_path / "_avx512.so").write_text("damaged")
    assert compiled.kernel_note() is None
    on_processor(absent, "x86_64", {"avx2", "fma", *compiled._AVX512})
    assert "the compiled avx512 kernels cannot be loaded" in (note := compiled.kernel_note())
    assert "decoding uses the avx2 kernels, which are slower" in note


def test_without_an_openmp_runtime_the_kernels_run_on_one_thread(
    variant,  # noqa: F811
    monkeypatch,
    tmp_path,
    threads,  # noqa: F811
):
    """From a copy of the library, which has variables of its own."""
    threads(2)
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    ids = ids_of(1, 12)
    threaded = model_of("fp32")
    monkeypatch.setattr(
        compiled, "_OPENMP", ("no_such_function", "omp_get_thread_num", "omp_get_num_threads")
    )
    single = compiled.Kernels(
        variant, ctypes.CDLL(shutil.copy(BUILT_FOLDER / f"_{variant}.so", tmp_path))
    )
    assert not single.has_threads and compiled.kernels(variant).has_threads
    monkeypatch.setattr(native, "kernels", lambda: single)
    monkeypatch.setattr(compiled, "_load", lambda requested: (single, {}))
    assert "no OpenMP runtime" in compiled.kernel_note()
    model = model_of("fp32")
    assert model.implementation == f"native ({variant})"
    assert torch.equal(logits_of(model, ids), logits_of(threaded, ids))


@pytest.mark.parametrize(
    "command",
    [("generate", "go"), ("bench --samples 1 --repeats 1",)],
    ids=lambda command: command[0],
)
def test_commands_say_once_that_kernels_are_missing(absent, checkpoint, command):
    command = (*command, f"--max-new-tokens 2 --exit 2 --model {checkpoint}")
    result = run(*command)
    assert (result.code, result.err.count(MISSING)) == (0, 1), result.err
    absent.setenv(compiled.SWITCH, "torch")
    assert "kernels" not in run(*command).err


def test_no_note_for_a_model_that_the_kernels_do_not_know(absent, checkpoint):
    assert for_decoding(checkpoint, "cpu", "fp32").notes[0].startswith(MISSING)
    # 48 is no 32s
    assert for_decoding(checkpoint, "cpu", "fp32", PackingConfig(quantize="int8")).notes == ()


def test_an_unknown_variant_is_an_error_for_every_model(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setenv(compiled.SWITCH, "avx1024")
    tiny_model("gemma2", torch.float64).save_pretrained(tmp_path)
    for folder, load in product((checkpoint, tmp_path), (for_decoding, for_training)):
        with pytest.raises(
            ConfigError, match=r"LAYERSKIP_KERNELS must be one of .*, torch, got avx1024"
        ):
            load(str(folder), "cpu")
