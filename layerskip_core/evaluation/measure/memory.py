"""Peak memory."""

from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """The peak memory since the object was created, in MB of 2**20 bytes. Only the newest object is valid.

    On CUDA this is the memory that torch allocated. Elsewhere it is the resident set of the whole process, weights and
    interpreter included, so that strategies hardly differ.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._known = _reset_resident_peak()

    def peak_mb(self) -> float | None:
        """None if the system cannot reset its peak: not Linux, or a container that forbids it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return _resident_peak_mb() if self._known else None


def _reset_resident_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_peak_mb() -> float:
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
