"""Signals such as Ctrl-C end a run after the current step, so that it can be saved."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context that notes the first of these signals. A second one has its usual effect.

    Under torchrun further signals are ignored, because it forwards the ones that the terminal has
    already sent.
    """

    def __init__(self, *signals: int) -> None:
        """Without `signals` SIGINT and SIGTERM."""
        self.signal: int | None = None
        self._signals = signals or _SIGNALS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python allows handlers in the main thread alone
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if "WORLD_SIZE" not in os.environ:
            self.__exit__()
