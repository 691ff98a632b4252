"""The compiled kernels and their C structures. The package's installation builds them if there is a
C compiler.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import LayerSkipError, require_choice

# The layouts of weights, in the numbering of the C code
KINDS = ("fp32", "bf16", "int8", "int4", "widened", "stored")
ACTIVATIONS = {  # in the numbering of the C code
    "silu": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
    "relu2": 4,
    "xielu": 5,
    "swiglu_clamped": 6,
}
MOST_ROPES = 2  # rotary tables: one for each kind of layer
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = {
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512_bf16",
    "avx512vbmi",
}
# The flags (and vendor) of /proc/cpuinfo that each variant needs, as Linux spells them; by
# processor, the best variant first.
_CPU_FLAGS = {
    "x86_64": {
        "amx": _AVX512 | {"amx_tile", "amx_bf16"},
        "avx512_fma": _AVX512 | {"GenuineIntel"},
        "avx512": _AVX512,
        "avx512_vnni": _AVX2 | {"avx512vl", "avx512_vnni"},
        "avx_vnni": _AVX2 | {"avx_vnni"},
        "avx2": _AVX2,
    },
    "aarch64": {
        "neon_bf16": {"asimddp", "bf16", "i8mm"},
        "neon_dot": {"asimddp"},
        "neon": set[str](),
    },
}
_OWN_BF16 = {"avx512", "amx", "neon_bf16"}  # variants that multiply bf16 without widening it
_CHEAP_ROWS = {"avx512_fma", *_OWN_BF16}  # variants that stay memory-bound at ten rows on two cores
# Variants that decode bf16 from 12 bits faster than memory is read; NEON was not measured
_FAST_CODES = set(_CPU_FLAGS["x86_64"])
_PROCESSORS = {
    ("linux", "x86_64"): "x86_64",
    ("linux", "aarch64"): "aarch64",
    ("darwin", "arm64"): "aarch64",
}
_NEEDS = _CPU_FLAGS.get(_PROCESSORS.get((sys.platform, platform.machine()), ""), {})
VARIANTS = tuple(_NEEDS)  # for this machine's processor
INTERFACE = 33  # version of the functions and structures in kernels.c
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
SWITCH = "LAYERSKIP_KERNELS"  # environment variable: a variant, or `torch` for none
_FALLBACK = (
    "decoding uses torch's, which are slower. `pip install -e .` in a checkout, or `pip install .`, builds them if there is a "
    f"C compiler; {SWITCH}=torch hides this message"
)


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class CMatrix(Structure):
    _fields_ = [
        *_fields(c_int32, "kind inputs outputs panels"),
        *_fields(c_void_p, "weight scale bias high exceptions starts room"),
    ]


class CStoredPanel(Structure):
    _fields_ = [*_fields(c_void_p, "weight scale steps"), *_fields(c_int32, "bits offset")]


class CNorm(Structure):
    _fields_ = _fields(c_void_p, "weight bias")


class CLayer(Structure):
    _fields_ = [
        *_fields(CMatrix, "qkv output up down"),
        *_fields(c_void_p, "router"),
        *_fields(
            CNorm, "before_attention after_attention before_mlp after_mlp embedding query key"
        ),
        *_fields(c_int32, "rope window"),
        *_fields(c_float * 2, "bends"),
        *_fields(CNorm, "value"),
        *_fields(c_int64, "keys"),
        *_fields(c_int32, "shares slice"),
        *_fields(c_float, "scale"),
        *_fields(CMatrix, "token_gate token_output"),
        *_fields(CNorm, "after_token"),
        *_fields(c_void_p, "shape recurrence steps router_bias sinks"),
    ]


class CShape(Structure):
    _fields_ = [
        *_fields(
            c_int32,
            "hidden heads kv_heads head_dim rotary inner bf16_cache activation gated norms_projections",
        ),
        *_fields(c_int32, "experts chosen normalised shared gates_shared"),
        *_fields(c_int32, "norms_rotated parallel norms_residual gates_attention"),
        *_fields(c_float, "eps attention_scale score_cap embedding_scale residual_scale"),
    ]


class CCall(Structure):
    _fields_ = [
        *_fields(c_void_p, "positions"),
        *_fields(c_int32, "rows"),
        *_fields(c_void_p * MOST_ROPES, "cos sin"),
        *_fields(c_void_p, "pages page_rows starts"),
        *_fields(c_int64, "row_pages"),
        *_fields(c_void_p, "states rings slots settled"),
        *_fields(c_int64, "slot_bytes"),
        *_fields(c_int32, "sequences"),
        *_fields(c_void_p, "steps"),
        *_fields(c_void_p, "hidden qkv mixed inside entries block"),
        *_fields(
            c_void_p,
            "logits weights chosen choice_slots slot_rows experts first_slots used products inputs tokens slices scratch",
        ),
        *_fields(c_int64, "scratch_bytes"),
    ]


class CDraft(Structure):
    _fields_ = [
        *_fields(c_void_p, "embedding learned vocabulary ends order stops probs"),
        *_fields(c_int32, "layer_count stop_count end_count most runs_last power"),
        *_fields(c_float, "logits_scale logits_cap survival doubt"),
        *_fields(c_void_p, "entry tokens states beyond logits"),
        *_fields(c_int32, "drafted guesses searched passes"),
        ("starts", c_int32 * 2),
        *_fields(c_int32, "norms_output"),
        *_fields(c_void_p, "join"),
        ("input_norms", CNorm * 2),
        *_fields(c_void_p, "keys"),
        *_fields(c_float, "temperature"),
    ]


class CChoice(Structure):
    _fields_ = [
        *_fields(c_void_p, "embedding tokens stops states logits chosen keys most"),
        *_fields(c_float, "temperature"),
        *_fields(c_int32, "stop_count"),
    ]


class CRecurrence(Structure):
    _fields_ = [
        *_fields(c_int32, "kind taps channels width convolved query key value factor gate"),
        *_fields(c_int32, "key_heads heads key_dim value_dim steps norm_size gates_first"),
        *_fields(c_float, "eps least_step most_step"),
        *_fields(c_int64, "state entry"),
        *_fields(c_void_p, "filter filter_bias rate rate_bias skip norm"),
    ]


class CTokenInputs(Structure):
    _fields_ = [
        *_fields(CMatrix, "model"),
        *_fields(CNorm, "norm"),
        *_fields(c_void_p, "embedding table"),
        *_fields(c_int32, "width bf16_table"),
        *_fields(c_float, "eps table_scale"),
    ]


class CPerturbation(Structure):
    _fields_ = [
        *_fields(c_void_p, "scores most keys ids"),
        *_fields(c_int32, "of_row rows columns"),
        *_fields(c_float, "temperature"),
    ]


# in the numbering of layerskip_size_of in kernels.c
STRUCTURES = (
    CMatrix,
    CLayer,
    CShape,
    CCall,
    CDraft,
    CChoice,
    CRecurrence,
    CStoredPanel,
    CTokenInputs,
    CPerturbation,
)


class Kernels:
    """The functions of one variant. Structures are passed by their address."""

    def __init__(self, variant: str, library: ctypes.CDLL) -> None:
        def function(name: str, *parameters: Any) -> Callable[..., None]:
            found = library[f"layerskip_{name}"]
            found.argtypes = [
                POINTER(kind) if issubclass(kind, Structure) else kind for kind in parameters
            ]
            found.restype = None
            return found

        self.variant = variant
        self.widens_bf16 = variant not in _OWN_BF16
        self.has_cheap_rows = variant in _CHEAP_ROWS
        self.codes_bf16 = variant in _FAST_CODES
        self.span = function("span", CShape, c_void_p, c_int, CCall, c_int)
        self.write = function("write", CShape, c_void_p, c_int, CCall, c_int)
        self.score = function("score", CShape, CNorm, CMatrix, CCall, c_void_p, c_int)
        self.draft = function("draft", CShape, c_void_p, CNorm, CMatrix, CCall, CDraft, c_int)
        self.choose = function(
            "choose", CShape, c_void_p, c_int, CNorm, CMatrix, CCall, CChoice, c_int
        )
        self.perturb = function("perturb", CPerturbation, c_int)
        self.pack = function("pack", CMatrix, c_void_p, *[c_int] * 4, c_void_p, c_int)
        self.decode = function("decode", CMatrix, c_int, c_void_p)
        openmp = _openmp()
        self.has_threads = bool(openmp)  # else calls run on one thread
        if openmp:
            library.layerskip_use_openmp(*openmp)


def requested_variant() -> str | None:
    """The value of SWITCH: a variant, `torch`, or None if unset. Raises ConfigError for other
    values.
    """
    requested = os.environ.get(SWITCH) or None
    if requested is not None:
        require_choice(requested, SWITCH, (*VARIANTS, "torch"))
    return requested


def kernel_note() -> str | None:
    """A note for the user if better kernels could run on this machine; else None."""
    requested = requested_variant()
    if requested == "torch" or not _NEEDS:
        return None
    compiled, unloadable = _load(requested)
    slower = _FALLBACK
    if compiled is not None:
        slower = f"decoding uses the {compiled.variant} kernels, which are slower"
    runnable = [name for name in VARIANTS if _NEEDS[name] <= _cpu_flags()]
    for name in runnable:
        if name in unloadable:
            return f"the compiled {name} kernels cannot be loaded ({unloadable[name]}): {slower}"
    if compiled is not None:
        if compiled.has_threads:
            return None
        return "this build of torch has no OpenMP runtime: the compiled kernels run on one thread"
    if requested is not None and requested not in runnable:
        return f"this CPU lacks instructions of the {requested} kernels: {_FALLBACK}"
    if not runnable:
        return None
    return f"the compiled kernels are missing: {_FALLBACK}"


def why_no_kernels() -> str:
    """Why `kernels` returns None here, as part of a sentence."""
    if requested_variant() == "torch":
        return f"{SWITCH} is torch"
    return "none is built here that this CPU can run"


def _cpu_flags() -> set[str]:
    """The CPU's flags and vendor; on a Mac the flags that all of Apple's ARM processors have."""
    try:
        return flags_in(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return {"asimddp"} if sys.platform == "darwin" else set()


def flags_in(cpuinfo: str) -> set[str]:
    """The flags and the vendor in the text of /proc/cpuinfo."""
    found = set[str]()
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features", "vendor_id")):
            found.update(line.partition(":")[2].split())
    return found


def kernels(variant: str | None = None) -> Kernels | None:
    """The given variant, else the requested, else the best one; None if it was not built or this
    CPU cannot run it.

    Raises LayerSkipError if the built kernels are of another version, as after `git pull`.
    """
    return _load(variant or requested_variant())[0]


@cache
def _load(requested: str | None) -> tuple[Kernels | None, dict[str, str]]:
    """The kernels to use, and why better variants that are built were not chosen."""
    unloadable: dict[str, str] = {}
    for name in VARIANTS if requested is None else (requested,):
        path = Path(__file__).with_name(f"_{name}.so")
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                unloadable[name] = str(error)
                continue
            # Asked before anything else: the other functions may have instructions that this CPU lacks
            if not library.layerskip_supported():
                # Only a surprise if the CPU has their flags, see `kernel_note`: AMX needs the kernel's
                # permission.
                unloadable[name] = "this system does not let them run"
                continue
            if not _matches(library):
                raise LayerSkipError(
                    f"the compiled kernels in {path} are those of another version: install layerskip again "
                    f"(`pip install .`, or `pip install -e .`), or set {SWITCH}=torch to do without them"
                )
            return Kernels(name, library), unloadable
    return None, unloadable


def _openmp() -> list[c_void_p]:
    """Functions of torch's OpenMP runtime: GNU's or, on a Mac, LLVM's, which has GNU's functions
    too. Empty if absent.

    Looked up as torch's own calls are: in the whole process, then in torch's library.
    """
    import torch

    ending = "dylib" if sys.platform == "darwin" else "so"
    own = Path(torch.__file__).with_name("lib") / f"libtorch_cpu.{ending}"
    for path in (None, str(own)):
        try:
            runtime = ctypes.CDLL(path)
            return [ctypes.cast(runtime[name], c_void_p) for name in _OPENMP]
        except (AttributeError, OSError):
            continue
    return []


def _matches(library: ctypes.CDLL) -> bool:
    """Whether the library has the functions and structures of this file."""
    try:
        sizes = [library.layerskip_size_of(index) for index in range(len(STRUCTURES))]
        return bool(library.layerskip_interface() == INTERFACE) and sizes == list(
            map(ctypes.sizeof, STRUCTURES)
        )
    except AttributeError:  # an old version lacks these functions
        return False
