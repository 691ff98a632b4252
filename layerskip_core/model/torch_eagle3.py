"""A drafter in the EAGLE-3 layout on PyTorch's kernels, for the backends that run on these."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, DraftBlock, Layers
from .cache import Places
from .eagle3 import Eagle3Layer, Eagle3Weights, Product
from .row_cache import write_entries
from .vocabulary import DraftVocabulary


class PlacedEagle3(DraftBlock):
    """Its KV entries are layer `place` of the target's cache."""

    needs_feature = True

    def __init__(
        self,
        stored: Eagle3Weights,
        place: int,
        vocab: int,
        like: Tensor,
        product_of: Callable[[Tensor], Product],
    ) -> None:
        """`vocab`: the target's. Norms take the precision and device of `like`; `product_of` the
        product with a matrix.
        """
        norms = {
            name: weight.to(like) for name, weight in stored.weights.items() if weight.dim() == 1
        }
        self._layer = Eagle3Layer(
            stored.form,
            norms.__getitem__,
            lambda names: product_of(torch.cat([stored.weights[name] for name in names])),
        )
        self._place = place
        self.taps = (0, *stored.form.layers)
        self.vocabulary = DraftVocabulary(vocab, stored.form.vocab, stored.tokens.tolist())
        self.head = self._layer.logits

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        entries, (residual, queries, keys, values) = self._begun(states, before, places)
        keys, values = write_entries(self._place, keys[:, :, 0], values[:, :, 0], entries)
        if entries.rows.tolist() != list(range(len(keys))):
            rows = entries.rows.to(keys.device, non_blocking=True)
            keys = keys[rows]
            values = values[rows]
        mask = torch.arange(keys.shape[2]) <= entries.positions[:, None]
        mask = mask[:, None, None].to(queries.device, non_blocking=True)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )
        return self._layer.finish(residual, attended)[:, 0]

    def write(
        self, model: Backend, states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        entries, (_, _, keys, values) = self._begun(states[0], before, places)
        write_entries(self._place, keys[:, :, 0], values[:, :, 0], entries)

    def _begun(
        self, states: Tensor, before: Tensor | None, places: Places
    ) -> tuple[Places, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The places of the entries, one position before their tokens, and `Eagle3Layer.begin` of N
        texts of one token.
        """
        assert before is not None
        entries = places.moved(-1)
        positions = entries.positions[:, None]
        return entries, self._layer.begin(states[:, None], before[:, None], positions)

    def features(self, model: Backend, states: Mapping[int, Tensor], finals: Tensor) -> Tensor:
        return self._layer.feature([states[tap] for tap in self.taps[1:]])

    def own_feature(self, hidden: Tensor) -> Tensor:
        return self._layer.own_feature(hidden)
