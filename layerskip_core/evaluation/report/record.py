"""What a measurement leaves behind: its settings, the machine it ran on, and its results, as one document."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import torch

from ...checkpoint.loaded import Decoder

Result = TypeVar("Result")


@dataclass(frozen=True)
class Recommendation:
    """What to decode with, and why in a sentence; no exit and no draft length where speculation does not pay.

    `baseline_drift`: by how much the time of the autoregressive baseline changed between the start and the end of a prompt's
    measurements, as a share (median over the prompts).
    """

    exit_layer: int | None
    num_draft_tokens: int | None
    speedup: float | None
    baseline_drift: float
    reason: str


@dataclass(frozen=True)
class PredictionError:
    """How far the cost model was from what was measured: predicted over measured speedup, less 1, over so many `settings`."""

    settings: int
    median: float  # of the absolute values
    largest: float
    mean: float  # with its sign: above 0 the model promised too much


class Environment(TypedDict, total=False):
    """What `environment` says of a machine; older versions said less."""

    versions: dict[str, str]
    platform: str
    device: str
    device_name: str
    cpu: str
    cores: int | None
    threads: int
    dtype: str
    implementation: str
    load_average: list[float] | None


@dataclass(frozen=True)
class RunRecord(Generic[Result]):
    """One run. `config` is complete: what was left to a default holds the value that it took."""

    config: dict[str, Any]
    environment: dict[str, Any]
    results: tuple[Result, ...]
    recommendation: Recommendation | None = None  # of a sweep
    prediction_error: PredictionError | None = None  # of a sweep

    def document(self) -> dict[str, Any]:
        """The record as plain values; every float in it is finite."""
        fields = asdict(self)
        optional = ("recommendation", "prediction_error")
        return {key: value for key, value in fields.items() if value is not None or key not in optional}


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other equals or exceeds in both coordinates while differing from them."""
    return [
        place
        for place, mine in enumerate(points)
        if not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points)
    ]


def environment(loaded: Decoder) -> dict[str, Any]:
    """Versions, machine, and how the model runs; the load average is the one before the run."""
    device = loaded.backend.device
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
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
