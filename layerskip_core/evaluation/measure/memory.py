"""The peak memory of a piece of work."""

from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """The highest memory since it was made, in MB of 2**20 bytes; one at a time.

    On CUDA the highest memory that torch had allocated. Elsewhere the highest resident set of the whole process, weights and
    interpreter included, so that strategies hardly differ in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._known = _reset_resident_peak()

    def peak_mb(self) -> float | None:
        """None where the system cannot restart the measurement: not Linux, or a container that forbids it."""
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
