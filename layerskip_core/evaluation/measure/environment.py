"""The machine and the software that a measurement runs on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.loaded import Decoder


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine, and how the model runs. The load average is the one before the run."""
    device, blocks = loaded.backend.device, loaded.backend.exit_blocks
    return {
        "versions": {
            "layerskip": version("layerskip"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.backend.dtype).removeprefix("torch."),
        "implementation": loaded.backend.implementation,
        "notes": list(loaded.notes),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **({"exit_blocks": {str(exit_layer): placed.block.feature for exit_layer, placed in blocks.items()}} if blocks else {}),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
