"""Which device and precision a model is loaded to."""

import psutil
import torch

from ..config.checks import require_choice
from ..config.machine import DTYPES
from ..errors import ConfigError

_LARGE_MODEL = 50_000_000  # parameters; from this size on bf16 is faster on a CPU that has it


def memory_size() -> int:
    """Bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where it is available, else the CPU. Raises ConfigError for a device that this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {device}") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(chosen.type, False):
        raise ConfigError(f"`device` {device} was asked for, but this machine or this build of torch has none")
    return chosen


def pick_dtype(dtype: str, device: torch.device, parameters: int) -> torch.dtype:
    """`auto`: bf16 on CUDA, and on a CPU with AVX-512 for models of 50M parameters and more; else fp32.

    Raises ConfigError for a precision that is none of DTYPES.
    """
    require_choice(dtype, "dtype", DTYPES)
    if dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    fast = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if fast and (device.type == "cuda" or parameters >= _LARGE_MODEL) else torch.float32
