"""What drafters get and give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from ...config.decoding import DecodingConfig
from ...model.backend import Backend
from ...model.cache import KVCache, Places
from ..block_writer import BlockWriter
from ..graphs import GraphRecorder
from ..prefixes import NO_PREFIXES, Prefixes
from ..row import Row
from .lookup import EarlierAnswers


@dataclass(frozen=True)
class DraftInput:
    """The B rows of a batch that may get drafts, before a round.

    The newest token of each has no KV entries yet: the target's pass that verifies the drafts
    writes them.
    """

    rows: Sequence[Row]  # read-only
    newest: Tensor  # (B,), their newest tokens, on the model's device
    cache: KVCache  # the target's own
    indices: Sequence[int]  # by row, its index in the cache, which may hold other rows
    num_computed_tokens: Sequence[int]  # by row of the cache: how many have KV entries
    seconds: float = 0.0  # that earlier steps took, without the caller's time between them
    max_prefill_tokens: float = inf  # in a step
    recorder: GraphRecorder | None = None  # of this decoding's passes, if they are recorded
    block_writer: BlockWriter | None = None  # writes the KV entries of blocks that draft
    # While a draft is recorded: the positions (B, d+1) of its tokens, on the device
    recorded: Tensor | None = None

    @property
    def ids(self) -> list[list[int]]:
        """By row: prompt and output so far, the newest token last; read-only."""
        return [row.ids for row in self.rows]

    def write_blocks(self) -> None:
        """Writes the KV entries of blocks that the rows lack, before a block drafts."""
        if self.block_writer is not None:
            self.block_writer.write(self.cache, self.num_computed_tokens)

    def feature(self, block: int | str) -> Tensor | None:
        """(B, D): the features of the previous tokens that an exit's block, or a drafter, reads;
        None if it reads none.
        """
        found = [self.cache.features[index].get(block) for index in self.indices]
        known = [feature for feature in found if feature is not None]
        return torch.stack(known) if known else None

    def places(self, counts: Sequence[int], after: Sequence[int]) -> Places:
        """The places of `counts` tokens per row, the first of them `after` tokens past the row's
        newest (0: the newest).
        """
        if self.recorded is not None:
            of_pass = self.recorded[:, after[0] : after[0] + counts[0]]
            return Places(self.cache, (), (), recorded=of_pass)
        starts = list(self.num_computed_tokens)
        of_cache = [0] * len(starts)
        for index, count, ahead in zip(self.indices, counts, after, strict=True):
            of_cache[index] = count
            starts[index] += ahead
        places = Places(self.cache, starts, of_cache, origins=self.num_computed_tokens)
        return places

    def forced(self, index: int, most: int) -> list[int]:
        """At most `most` tokens that the row's grammar forces next."""
        processor = self.rows[index].processor
        return [] if processor is None else processor.forced()[:most]


@dataclass(frozen=True)
class Draft:
    """Drafts for the target to verify in one pass, each row's after its newest token: N tokens, N -
    B drafts.

    `exit_states` are the target's own hidden states of all tokens, pre-norm, by the number of
    layers run. The target continues from the highest; lower ones are for the blocks of other exits.
    Without such states (looked-up or low-bit drafts) it starts at layer 0. `source` names the
    drafter in reports.
    """

    tokens: Tensor  # (N,), each row's newest token first
    counts: tuple[int, ...]  # by row: how many drafts
    exit_states: Mapping[int, Tensor] = field(default_factory=dict)  # (N, D)
    source: str | None = "drafts"  # in reports; None: no drafter was asked
    # The probabilities of a draft of one row, see DraftEnds, if they were needed
    confidence: Sequence[float] = ()
    # By row, how many of its tokens the drafter's layers ran (have KV entries)
    ran: Sequence[int] = ()

    def by_row(self) -> tuple[Tensor, ...]:
        """Each row's tokens, (1 + K,)."""
        return torch.split(self.tokens, [1 + count for count in self.counts])


@dataclass(frozen=True)
class DrafterSetup:
    """What a drafter is built from."""

    model: Backend
    config: DecodingConfig
    # Whether the target may continue from the drafter's hidden states
    reuse_exit_states: bool = True
    earlier: EarlierAnswers | None = None  # that lookups search too
    prefixes: Prefixes = NO_PREFIXES  # from which prompts may start


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch, and may learn from their acceptance."""

    def draft(self, given: DraftInput, limits: Sequence[int]) -> Draft:
        """Up to `limits[row]` drafts for each row; at least one of the limits is positive."""

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Learns which drafts of a row were accepted; called for every row after each `draft`, and
        not otherwise.

        `verified`: the accepted drafts, then one token of the target's own.
        """
