"""Exit blocks draft on true states: after each pass of the target their keys and values are written from what it computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.exit_blocks import PlacedBlock


class TrueStates:
    """For the blocks of some exits. A pass of the target is `taps` stops on its way, and one `take` at its end."""

    def __init__(self, model: Backend, blocks: Sequence[PlacedBlock]) -> None:
        self._model = model
        self._blocks = {block.block.exit_layer: block for block in blocks}
        self.taps = tuple(sorted(self._blocks))  # the exits
        self.needs_finals = any(block.join is not None for block in blocks)  # which one pass leaves to the next
        self.rerun = int(self.needs_finals)  # tokens that a first pass in the middle of a text needs from before it
        self._features: Tensor | None = None
        self._finals = torch.empty(0)  # (B, T, D), the final norm's output for the tokens of the last pass

    @property
    def features(self) -> Tensor | None:
        """(B, 1, D): the final norm's output for the token before each row's newest; None if no block needs it."""
        return self._features

    def take(self, states: Sequence[Tensor], hidden: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Writes the blocks' keys and values of the tokens at `positions` (B, T).

        `states` are those after each of `taps`, `hidden` those after the last layer, (B, T, D). If the first pass is in the
        middle of a text, its first token only gives the second its feature: the cache has what the blocks wrote for it.
        """
        before = None
        if self.needs_finals:
            self._finals = self._model.normed(hidden)
            if self._features is None and int(positions[0, 0]) > 0:
                states, positions, before = [reached[:, 1:] for reached in states], positions[:, 1:], self._finals[:, :-1]
            else:
                first = torch.zeros_like(self._finals[:, :1]) if self._features is None else self._features
                before = torch.cat((first, self._finals[:, :-1]), dim=1)
        for exit_layer, reached in zip(self.taps, states, strict=True):
            block = self._blocks[exit_layer]
            self._model.write_kv(block.enter(reached, before), block.layer, block.layer + 1, positions, cache)

    def go_on(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Keeps `rows` of the batch; `places`, one for each of them, is where the token before its newest stood in the pass."""
        if self.needs_finals:
            chosen, where = torch.tensor([list(rows), list(places)]).to(self._finals.device, non_blocking=True)
            self._features = self._finals[chosen, where][:, None]

    def join(self, other: "TrueStates") -> None:
        """Adds the rows of another after its own, between two passes."""
        if self._features is not None and other._features is not None:
            self._features = torch.cat((self._features, other._features))
