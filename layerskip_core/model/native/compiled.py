"""The compiled kernels: found, tried and called. They are built when the package is, where there is a C compiler."""

import ctypes
import os
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

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


_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@cache
def kernels(variant: str | None = None) -> Kernels | None:
    """The best variant that was built and that this CPU runs, or the one asked for; None where there is none.

    Raises LayerSkipError where what was built belongs to another version of this file, as after a pull in a checkout.
    """
    import torch  # noqa: F401  its OpenMP runtime is looked for

    asked = variant or os.environ.get(SWITCH)
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
