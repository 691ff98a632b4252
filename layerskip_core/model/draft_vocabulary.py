"""Drafts can be chosen from a part of the vocabulary. The target still scores all of it, so outputs stay the same."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json

ORDER_FILE = "token_order.json"


class DraftVocabulary:
    """The first N of V tokens in some order, the most frequent first. Logits of drafts are in that order."""

    def __init__(self, total: int, count: int, order: list[int] | None = None) -> None:
        """`order`: distinct ids below V. Ids that it lacks follow in the order of their numbers, as they do without it."""
        self._left_out = max(0, total - count)
        self.ids: Tensor | None = None  # of the N tokens; None for 0..N-1
        if order is not None:
            known = set(order)
            self.ids = torch.tensor([*order, *(token for token in range(total) if token not in known)][:count])

    def rows_of(self, weight: Tensor) -> Tensor:
        """(V, ...) to (N, ...)."""
        return weight[: len(weight) - self._left_out] if self.ids is None else weight[self.ids.to(weight.device)]

    def tokens(self, indices: Tensor) -> Tensor:
        """Token ids (...) of indices (...) into the N tokens."""
        if self.ids is None:
            return indices
        self.ids = self.ids.to(indices.device, non_blocking=True)
        return self.ids[indices]

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """Logits or probabilities (..., N) as (..., V), with `rest` for all other tokens."""
        padded = F.pad(values, (0, self._left_out), value=rest)
        if self.ids is None:
            return padded
        self.ids = self.ids.to(values.device, non_blocking=True)
        return torch.full_like(padded, rest).index_copy(-1, self.ids, values)


def token_order(folder: str | Path, vocab_size: int) -> list[int] | None:
    """The content of a checkpoint's ORDER_FILE: distinct token ids, the most frequent of its training data first.

    None if there is no such file. Raises CheckpointError if it holds anything else.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    order = read_json(path, CheckpointError)
    entries = order if isinstance(order, list) else [None]
    ids = [token for token in entries if type(token) is int and 0 <= token < vocab_size]
    if len(set(ids)) < len(entries):
        raise CheckpointError(f"{path} must be a list of distinct token ids below {vocab_size}")
    return ids
