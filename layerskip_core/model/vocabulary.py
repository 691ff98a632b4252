"""Vocabularies of drafts, and the choice of the most probable token."""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ORDER_FILE = "token_order.json"
_EXIT_VOCABULARY = 4096
_LARGE_VOCABULARY = 1 << 13
_COLUMNS = 256  # argmax searches a large vocabulary as rows of this many tokens


def exit_vocabulary(vocab: int) -> int:
    """How many tokens exits draft from and are trained on by default, of a vocabulary of so many.
    0: all; a part pays if it is less than a quarter.
    """
    if vocab <= 4 * _EXIT_VOCABULARY:
        return 0
    return _EXIT_VOCABULARY


def order_content(order: Sequence[int]) -> bytes:
    """The bytes of ORDER_FILE: token ids, the most frequent first."""
    return json.dumps(order, separators=(",", ":")).encode()


class DraftVocabulary:
    """The N tokens (of V) that drafts are chosen from: the first in some order, such as the most
    frequent.

    Logits of drafts are in that order. The target scores all tokens, so outputs stay the same.
    """

    def __init__(self, total: int, count: int, order: list[int] | None = None) -> None:
        """`order`: distinct ids below V; missing ids follow in ascending order. None: all
        ascending.
        """
        self.count = min(total, count)
        self._left_out = total - self.count
        self.ids: Tensor | None = None  # of the N tokens; None for 0..N-1
        if order is not None:
            known = set(order)
            self.ids = torch.tensor(
                [*order, *(token for token in range(total) if token not in known)][:count]
            )

    def rows_of(self, weight: Tensor) -> Tensor:
        """(V, ...) to (N, ...)."""
        if self.ids is None:
            return weight[: len(weight) - self._left_out]
        return weight[self.ids.to(weight.device)]

    def ids_on(self, device: torch.device) -> Tensor | None:
        """The ids of the N tokens; None for 0..N-1."""
        if self.ids is not None:
            self.ids = self.ids.to(device, non_blocking=True)
        return self.ids

    def tokens(self, indices: Tensor) -> Tensor:
        """Token ids (...) of indices (...) into the N tokens of drafts."""
        ids = self.ids_on(indices.device)
        return indices if ids is None else ids[indices]

    def spread(self, logits: Tensor) -> Tensor:
        """Logits (..., N) as (..., V), with -inf elsewhere."""
        padded = F.pad(logits, (0, self._left_out), value=-torch.inf)
        ids = self.ids_on(logits.device)
        if ids is None:
            return padded
        return torch.full_like(padded, -torch.inf).index_copy(-1, ids, logits)


def most_probable(logits: Tensor) -> Tensor:
    """The token ids (...) with the largest of the logits (..., V); the first of several equal
    ones.
    """
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or vocabulary < _LARGE_VOCABULARY or vocabulary % _COLUMNS:
        return logits.argmax(-1)
    # On the CPU argmax takes five times as long as amax: it searches only the row with the maximum.
    rows = logits.view(*logits.shape[:-1], -1, _COLUMNS)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    return row[..., 0] * _COLUMNS + rows.take_along_dim(row[..., None], -2).argmax(-1)[..., 0]
