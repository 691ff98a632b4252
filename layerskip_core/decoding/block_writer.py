"""KV entries of the blocks that draft, written from the target's own states."""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

from torch import Tensor

from ..model.backend import Backend, DraftBlock
from ..model.cache import KVCache, Places, States, on_device

# Most tokens of a row that wait for the KV entries of blocks. Their states take memory, and where
# all layers have a window, a row keeps at least so many more positions than the window.
_MOST_WAITING = 64


class BlockWriter:
    """Writes the KV entries of blocks that draft, from the target's own states, before a block
    drafts.

    Between drafts the states of committed tokens wait in the cache's `unwritten`, so a block that
    does not draft costs no pass, and rejected drafts are never written. A block that
    `needs_feature` of the previous token finds that of the last written token in the cache's
    `features`.
    """

    def __init__(self, model: Backend, blocks: Mapping[int | str, DraftBlock]) -> None:
        """`blocks`: by the exits at which their drafts start, or the names of drafters."""
        self._model = model
        self._blocks = blocks
        self.taps = tuple(sorted({tap for block in blocks.values() for tap in block.taps}))
        self._of_pass: States | None = None  # of all N tokens of the last pass

    def take(self, states: Mapping[int, Tensor], finals: Tensor, places: Places) -> None:
        """Takes the states of a pass: those after each of `taps`, and `finals` after the last
        layer, (N, D).
        """
        of_taps = {tap: states[tap] for tap in self.taps if tap in states}
        # The pass is a CUDA graph, whose states the next replay overwrites
        if places.recorded is not None:
            self._write_all(States(of_taps, finals), places)
        else:
            self._of_pass = States(of_taps, finals)

    def commit(
        self,
        cache: KVCache,
        bounds: Sequence[int],
        counts: Sequence[int],
        num_computed_tokens: Sequence[int],
    ) -> None:
        """Keeps the states of the first `counts[row]` tokens of each row in the last pass, where
        they begin at `bounds[row]`.

        `num_computed_tokens`: by row, how many have KV entries of the target, these included.
        """
        if self._of_pass is None:
            return
        for unwritten, first, count in zip(cache.unwritten, bounds, counts, strict=False):
            if count:
                unwritten.append(self._of_pass.part(first, first + count))
        self._of_pass = None
        if max(cache.num_unwritten) >= _MOST_WAITING:
            self.write(cache, num_computed_tokens)

    def write(self, cache: KVCache, num_computed_tokens: Sequence[int]) -> None:
        """Writes the KV entries of all waiting tokens in one pass. `num_computed_tokens`: as for
        `commit`."""
        counts = cache.num_unwritten
        if not any(counts):
            return
        waiting = States.concatenated(list(chain.from_iterable(cache.unwritten)))
        starts = [end - count for end, count in zip(num_computed_tokens, counts, strict=True)]
        places = Places(cache, starts, counts)
        self._write_all(waiting, places)
        for unwritten in cache.unwritten:
            unwritten.clear()

    def _write_all(self, waiting: States, places: Places) -> None:
        for name, block in self._blocks.items():
            features = block.features(self._model, waiting.taps, waiting.finals)
            own = {tap: waiting.taps[tap] for tap in block.taps}
            if features is None:
                block.write(self._model, own, None, places)
            else:
                self._write_fed(name, block, own, features, places)

    def _write_fed(
        self,
        name: int | str,
        block: DraftBlock,
        own: dict[int, Tensor],
        features: Tensor,
        places: Places,
    ) -> None:
        """Writes the entries of a block that reads the previous token's feature, and keeps that of
        each row's last token.

        Without a feature of the token before, a row's first token gets no entry: it is the first of
        its text, or, after a cached prefix, was rerun only for its feature, and has its entry
        already.
        """
        of_rows = places.cache.features
        before = features.roll(1, 0)
        skipped = [0] * len(places.counts)
        for row, (first, count) in enumerate(zip(places.bounds, places.counts, strict=False)):
            if not count:
                continue
            known = of_rows[row].get(name)
            if known is None:
                skipped[row] = 1
            else:
                before[first] = known
            of_rows[row][name] = features[first + count - 1]
        if any(skipped):
            ends = zip(pairwise(places.bounds), skipped, strict=True)
            kept = [index for (first, end), less in ends for index in range(first + less, end)]
            if not kept:
                return
            index = on_device(kept, before)
            own = {tap: state[index] for tap, state in own.items()}
            before = before[index]
            places = places.moved(0, skipped)
        block.write(self._model, own, before, places)
