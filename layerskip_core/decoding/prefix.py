"""Keys and values of one text, kept for the next: a prompt that begins with the same tokens starts at the first difference."""

from dataclasses import replace

from ..config.decoding import DecodingConfig
from ..model.backend import Backend
from ..model.cache import KVCache


class PrefixCache:
    """What one decoding leaves to the next, for one text after another.

    With a batch-invariant backend outputs have the bits that they have after a whole prefill. PyTorch's kernels give a token
    that was decoded alone other last bits than in a prompt, so outputs can differ there where two tokens are almost equally
    likely. A backend with exact weights promises that they never do: for it nothing is kept.
    """

    def __init__(self) -> None:
        self._made_for: tuple[Backend, DecodingConfig] | None = None
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # of the last text
        self._count = 0  # of its first tokens have keys and values

    def suit(self, model: Backend, config: DecodingConfig) -> None:
        """Forgets what another model computed, or other settings: they decide which layers have keys and values."""
        made_for = model, replace(config, max_new_tokens=1, stop=(), temperature=0.0, top_k=0, top_p=1.0, seed=0)
        if self._made_for != made_for or model.exact:
            self._made_for, self._cache = made_for, model.new_cache()
            self._ids, self._count = [], 0

    def begin(self, prompt: list[int], rerun: int = 0) -> tuple[KVCache, int]:
        """The cache of one row, and how many of the prompt's first tokens need no pass; at least one does.

        `rerun`: how many of the known tokens the pass needs again. `suit` comes first.
        """
        assert self._cache is not None
        most = min(self._count, len(prompt) - 1)
        same = next((place for place in range(most) if self._ids[place] != prompt[place]), most)
        self.keep(list(prompt), max(same - rerun, 0))
        self._cache.clear(self._count)
        return self._cache, self._count

    def keep(self, ids: list[int], count: int) -> None:
        """The cache now has the keys and values of the first `count` tokens of this text."""
        self._ids, self._count = ids, count
