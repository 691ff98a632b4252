"""The part of the vocabulary that drafts are chosen from: the verifier has all of it, so that no output changes."""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..storage.json_reading import read_json

ORDER_FILE = "token_order.json"


class DraftVocabulary:
    """The first N of V tokens, in an order that begins with the most frequent ones; a draft's logits are in that order."""

    def __init__(self, total: int, count: int, order: list[int] | None = None) -> None:
        """`order`: distinct ids below V; those it lacks follow in the tokenizer's order, which without one is all there is."""
        self._left_out = max(0, total - count)
        self.ids: Tensor | None = None  # of the tokens, where they are not 0, 1, 2, ...
        if order is not None:
            known = set(order)
            self.ids = torch.tensor([*order, *(token for token in range(total) if token not in known)][:count])

    def rows_of(self, weight: Tensor) -> Tensor:
        """(V, ...) to (N, ...)."""
        return weight[: len(weight) - self._left_out] if self.ids is None else weight[self.ids.to(weight.device)]

    def tokens(self, chosen: Tensor) -> Tensor:
        """Token ids (...) of indices (...)."""
        if self.ids is None:
            return chosen
        self.ids = self.ids.to(chosen.device)
        return self.ids[chosen]

    def spread(self, found: Tensor, rest: float) -> Tensor:
        """Logits or probabilities (..., N) as those of all tokens, (..., V), the others' being `rest`."""
        padded = F.pad(found, (0, self._left_out), value=rest)
        if self.ids is None:
            return padded
        self.ids = self.ids.to(found.device)
        return torch.full_like(padded, rest).index_copy(-1, self.ids, found)


def token_order(folder: str | Path, vocab_size: int) -> list[int] | None:
    """What ORDER_FILE of a checkpoint says: a JSON list of distinct token ids, the most frequent of its training data first.

    None where there is no such file. Raises CheckpointError for one that holds anything else.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    order = read_json(path, CheckpointError)
    whole = isinstance(order, list) and all(type(token) is int and 0 <= token < vocab_size for token in order)
    if not whole or len(set(order)) < len(order):
        raise CheckpointError(f"{path} must be a list of distinct token ids below {vocab_size}")
    return cast(list[int], order)
