"""Seconds of work on a device."""

import time
from typing import Any

import torch


class Stopwatch:
    """Takes the time between `start` and `stop`: on a GPU by events among its work, so that the host does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._events: list[Any] = []
        self._seconds = 0.0

    def start(self, now: float) -> None:
        """`now`: by the host's clock."""
        if self._is_gpu:
            self._events = [self._event()]
        self._seconds = -now

    def stop(self) -> None:
        if self._is_gpu:
            self._events.append(self._event())
        self._seconds += time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the last pair. On a GPU its work must be done: the host has waited for something after it."""
        if not self._is_gpu:
            return self._seconds
        first, last = self._events
        return float(first.elapsed_time(last)) / 1e3

    def _event(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
