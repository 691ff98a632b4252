"""Embeddings: a text's mean state, in short passes between the steps of answers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import DecodeStats
from ..decoding.engine import lock_of
from ..model import Backend, KVCache
from .requests import Update


@dataclass(eq=False)
class Embedding:
    """A text to embed: the mean (D,) of its tokens' states after all layers and the final norm,
    scaled to length 1.

    `deliver`: as in Request, called once. `stats`: tokens so far.
    """

    ids: list[int]
    deliver: Callable[[Update], None]
    stats: DecodeStats = field(default_factory=DecodeStats)
    reused: int = 0
    _cache: KVCache | None = None  # from its first pass on
    _sum: Tensor | float = 0.0  # (D,) of the states so far

    def run(self, backend: Backend, num_tokens: int) -> Update:
        """Runs a pass over the next `num_tokens` tokens. The update of the last pass has the
        vector.
        """
        start = self.stats.prompt_tokens
        end = min(start + num_tokens, len(self.ids))
        cache = self._cache = self._cache or backend.new_cache(1, len(self.ids))
        with lock_of(backend), torch.inference_mode():
            hidden = backend.embed(torch.tensor(self.ids[start:end], device=backend.device))
            places = cache.span(start, end, no_rollback=True)
            hidden = backend.run_layers(hidden, 0, backend.num_layers, places)
            self._sum = self._sum + backend.normed(hidden).float().sum(0)
            self.stats = DecodeStats(prompt_tokens=end)
            if end < len(self.ids):
                return Update("")
            self._cache = None
            return Update("", vector=F.normalize(self._sum, dim=0).tolist())

    def give_back(self) -> bool:
        """Frees its KV entries, if it has any, and returns whether it had: the text starts again at
        its first token.
        """
        held = self._cache is not None
        self._cache = None
        self._sum = 0.0
        self.stats = DecodeStats()
        return held
