"""Where an output ends: an EOS id, a stop string, a number of tokens, the context. The first of them decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..config.checks import require
from .growing_text import Detokenize, GrowingText

StopReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Stopping:
    """What ends an output. Its tokens include the EOS token, or those that complete a stop string; its text does not."""

    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    max_new_tokens: int

    def visible(self, text: str, finished: bool) -> str:
        """The part of the `text` decoded so far that may be shown: nothing from a stop string on.

        Unless the output is finished, an end of the text that may be the start of a stop string is held back too. So each
        result extends the one before, and the text can be streamed.
        """
        before = before_stop(text, self.stop)
        if len(before) < len(text):
            return before
        held = 0 if finished else max((_overlap(text, stop) for stop in self.stop), default=0)
        return text[: len(text) - held]


class StopScanner:
    """Reads an output token by token and finds its end, whether tokens arrive one by one or several per round."""

    def __init__(self, stopping: Stopping, context_room: int, detokenize: Detokenize | None = None) -> None:
        """`context_room`: how many new tokens fit into the context. Stop strings need `detokenize`."""
        require(not stopping.stop or detokenize is not None, "stop", "used with a detokenizer", "none")
        self._stopping = stopping
        self._context_room = context_room
        self.reason: StopReason | None = None  # why the output ended, once it has
        self._read = 0
        self._growing = GrowingText(detokenize) if stopping.stop and detokenize is not None else None

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return min(self._stopping.max_new_tokens, self._context_room) - self._read

    def cut(self, ids: list[int]) -> tuple[int, StopReason | None]:
        """Reads new tokens up to the first that ends the output. Returns how many it read, and the reason if one did."""
        for count, token in enumerate(ids, start=1):
            self._read += 1
            self.reason = self._reason(token)
            if self.reason is not None:
                return count, self.reason
        return len(ids), None

    def _reason(self, token: int) -> StopReason | None:
        if token in self._stopping.eos_ids:
            return "eos"
        if self._growing is not None and self._completes_stop(self._growing, token):
            return "stop"
        if self._read >= self._stopping.max_new_tokens:
            return "length"
        return "context" if self._read >= self._context_room else None

    def _completes_stop(self, growing: GrowingText, token: int) -> bool:
        before = len(growing.text)
        text = growing.add([token])
        return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self._stopping.stop)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first occurrence of a stop string."""
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
