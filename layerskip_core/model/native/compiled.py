"""The compiled kernels: found, tried and called. They are built when the package is, where there is a C compiler."""

import ctypes
import os
import platform
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ...config.checks import require_choice
from ...errors import LayerSkipError

KINDS = ("fp32", "bf16", "int8", "int4")  # of weights, as the C code numbers them
VARIANTS = ("avx512", "avx2")  # the best first
INTERFACE = 2  # of kernels.c: its functions and structures as this file calls and fills them
SWITCH = "LAYERSKIP_KERNELS"  # environment variable: a variant, or `torch` for none


class CMatrix(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kind", "inputs", "outputs", "panels")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    ]


class CLayer(Structure):
    _fields_ = [
        *((name, CMatrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_int32) for name in ("rotates", "window")),
    ]


class CShape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "bf16_cache")),
        *((name, c_float) for name in ("eps", "scale")),
    ]


class CCall(Structure):
    _fields_ = [
        ("positions", c_void_p),
        *((name, c_int32) for name in ("rows", "rows_per_sequence")),
        *((name, c_void_p) for name in ("cos", "sin", "cache")),
        *((name, c_int64) for name in ("places", "sequences")),
        *((name, c_void_p) for name in ("hidden", "qkv", "mixed", "inside", "scratch")),
        ("scratch_bytes", c_int64),
    ]


class CDraft(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("embedding", "vocabulary", "ends")),
        *((name, c_int32) for name in ("end_count", "most")),
        *((name, c_void_p) for name in ("tokens", "states", "logits")),
        ("drafted", c_int32),
    ]


class Kernels:
    """The functions of one variant."""

    def __init__(self, variant: str, library: ctypes.CDLL) -> None:
        self.variant = variant
        self.span, self.score, self.draft = library.layerskip_span, library.layerskip_score, library.layerskip_draft
        self.span.argtypes = [POINTER(CShape), c_void_p, c_int, POINTER(CCall), c_int]
        self.score.argtypes = [POINTER(CShape), c_void_p, POINTER(CMatrix), POINTER(CCall), c_void_p, c_int]
        self.draft.argtypes = [
            *(POINTER(CShape), c_void_p, c_int, c_void_p, POINTER(CMatrix)),
            *(POINTER(CCall), POINTER(CDraft), c_int),
        ]
        self.span.restype = self.score.restype = self.draft.restype = None
        runtime = ctypes.CDLL(None)  # torch has loaded its OpenMP runtime for all to see
        self.has_threads = all(hasattr(runtime, name) for name in _OPENMP)
        if self.has_threads:
            library.layerskip_use_openmp(*(ctypes.cast(getattr(runtime, name), c_void_p) for name in _OPENMP))


def kernels_asked_for() -> str | None:
    """What the environment variable says: a variant, `torch`, or None for the best there is. Raises ConfigError otherwise."""
    asked = os.environ.get(SWITCH) or None
    if asked is not None:
        require_choice(asked, SWITCH, (*VARIANTS, "torch"))
    return asked


def missing_kernels() -> str | None:
    """A sentence for people where this machine could run kernels that are not there; None where nothing is missing."""
    asked = kernels_asked_for()
    if asked == "torch" or not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return None
    found = kernels()
    if found is None and any(_CPU_FLAGS[name] <= _cpu_flags() for name in VARIANTS if asked in (None, name)):
        what = "the compiled kernels are not there"
    elif found is None and asked is not None:
        what = f"this CPU does not have what the kernels {asked} need"
    elif found is not None and not found.has_threads:
        what = "this build of torch has no OpenMP runtime for the compiled kernels"
    else:
        return None
    return f"{what}: decoding runs on torch's, which are slower. {_REMEDY}"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


_CPU_FLAGS = {  # as /proc/cpuinfo names what each variant needs
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx2": {"avx2", "fma"},
}
_REMEDY = (
    "`pip install -e .` in a checkout, or `pip install .`, builds them where there is a C compiler; "
    f"{SWITCH}=torch does without them"
)
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@cache
def kernels(variant: str | None = None) -> Kernels | None:
    """The best variant that was built and that this CPU runs, or the one asked for; None where there is none.

    Raises LayerSkipError where what was built belongs to another version of this file, as after a pull in a checkout.
    """
    import torch  # noqa: F401  its OpenMP runtime is looked for

    asked = variant or kernels_asked_for()
    for name in VARIANTS if asked is None else (asked,):
        for suffix in EXTENSION_SUFFIXES:
            path = Path(__file__).with_name(f"_{name}{suffix}")
            if path.is_file():
                try:
                    library = ctypes.CDLL(str(path))
                except OSError:
                    continue
                if getattr(library, "layerskip_interface", lambda: 1)() != INTERFACE:
                    raise LayerSkipError(
                        f"the compiled kernels in {path} are those of another version: install layerskip again "
                        f"(`pip install .`, or `pip install -e .`), or set {SWITCH}=torch to do without them"
                    )
                if library.layerskip_supported():
                    return Kernels(name, library)
    return None
