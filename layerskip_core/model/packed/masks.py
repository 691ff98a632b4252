"""What is added to the attention scores of a call, so that no query sees a later key or one before its window."""

import math

import torch
from torch import Tensor

from ..cache import SpanWriter
from ..spec import ModelSpec


class Masks:
    def __init__(self, spec: ModelSpec, like: Tensor) -> None:
        """Masks have the precision and the device of `like`."""
        self._windows = {kind: spec.window_of_kind(kind) for kind in spec.kinds}
        self._like = like.new_empty(0)
        self._ahead = self._like  # as many zeros, then as many infinities

    def by_kind(self, writer: SpanWriter, positions: Tensor, keys: int, always: bool) -> dict[str, Tensor | None]:
        """By kind of layer, (B or 1, 1, T, 1, S) over `keys` places of the cache, or (S,) for one token.

        None where every place may be seen, unless a mask is needed `always`. `positions` (B, T) are on the device.
        """
        return {kind: self._mask(window, writer, positions, keys, always) for kind, window in self._windows.items()}

    def spans(self, positions: list[int]) -> dict[str, list[tuple[int, int]]]:
        """By kind of layer, the keys start..stop-1 that each token of one row sees."""
        return {
            kind: [(0 if window is None else max(0, place + 1 - window), place + 1) for place in positions]
            for kind, window in self._windows.items()
        }

    def _mask(self, window: int | None, writer: SpanWriter, positions: Tensor, keys: int, always: bool) -> Tensor | None:
        if writer.contiguous and positions.shape[1] == 1 and (window is None or writer.stop <= window):
            return self._after(writer.stop, keys) if always else None
        queries = (positions[:1] if writer.contiguous else positions)[:, None, :, None, None]
        order = torch.arange(keys, device=positions.device)
        unseen = order > queries
        if window is not None:
            unseen |= order <= queries - window
        mask = torch.zeros(unseen.shape, dtype=self._like.dtype, device=positions.device)
        return mask.masked_fill_(unseen, -math.inf)

    def _after(self, stop: int, keys: int) -> Tensor:
        """(S,) that hides the places from `stop` on: a view, so that a single token costs no new tensor."""
        half = len(self._ahead) // 2
        if half < keys:
            half = 2 * keys
            self._ahead = self._like.new_zeros(2 * half)
            self._ahead[half:] = -math.inf
        return self._ahead[half - stop : half - stop + keys]
