"""What a drafter is, and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...model.cache import KVCache


@dataclass(frozen=True)
class Draft:
    """Tokens for the target to run: those committed without KV yet (one; the prompt at first), then K drafts, in B rows.

    `exit_states` are the target's own hidden states after layer `exit_layer`, pre-norm, of all tokens or of all but the last;
    None when the draft has no such states: then the target starts at layer 0.
    """

    tokens: Tensor  # (B, T)
    num_drafts: int = 0  # K, the last of the tokens
    probs: Tensor | None = None  # (B, K, V), what each draft was drawn from; None when greedy or without drafts
    exit_states: Tensor | None = None  # (B, T or T-1, D)
    exit_layer: int = 0
    by_row: tuple[int, ...] = ()  # how many of the K each row of a batch has drafted: the rest is padding


class Drafter(Protocol):
    def draft(self, token: Tensor, positions: Tensor, cache: KVCache, most: Sequence[int] = ()) -> Draft:
        """At most one draft for each of `positions` (B, d), d >= 1; `token` (B, 1), committed, stands at the first of them.

        `most`: how many drafts each row of a batch may have; all d without it.
        """
