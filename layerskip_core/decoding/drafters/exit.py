"""Drafts for a round of speculation, from the first layers of the model itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config.checks import require
from ...config.decoding import DecodingConfig
from ...config.packing import EXACT_TOKENS
from ...model.backend import Backend, DraftSide
from ...model.cache import KVCache
from ..sampling import Greedy, Sampler
from .base import Draft


class ExitDrafter:
    """Drafts with layers 0..E-1 and the shared head, on the target's own cache (Elhoushi et al., ACL 2024, section 4.3)."""

    def __init__(
        self,
        draft_side: DraftSide,
        sampler: Sampler,
        exit_layer: int,
        confidence: float = 0.0,
        eos_ids: frozenset[int] = frozenset(),
        reuse_exit_states: bool = True,
    ) -> None:
        """Without `reuse_exit_states` the target recomputes the first layers, as it must for drafts that are not its own."""
        self._draft_side = draft_side
        self._sampler = sampler
        self._exit_layer = exit_layer
        self._confidence = confidence
        self._vocabulary = draft_side.vocabulary
        # Elsewhere than on the CPU, waiting for every id costs more than the few drafts behind an EOS, once an output.
        self._eos_ids = eos_ids if draft_side.device.type == "cpu" else frozenset()
        self._reuse = reuse_exit_states
        self._in_one_call = isinstance(sampler, Greedy) and not confidence

    def draft(self, token: Tensor, positions: Tensor, cache: KVCache, most: Sequence[int] = ()) -> Draft:
        """Each row ends after an EOS, or before a token where the most probable one has less than the confidence."""
        if self._in_one_call and len(token) == 1:
            drafted, exit_states = self._draft_side.draft_greedily(token, self._exit_layer, positions, cache, self._eos_ids)
            count = drafted.shape[1] - 1
            return Draft(drafted, count, None, exit_states if self._reuse else None, self._exit_layer, (count,))
        limits = list(most) or [positions.shape[1]] * len(token)
        counts = [0] * len(limits)
        tokens, probs, states = [token], [], []
        for step in range(positions.shape[1]):
            going = [row for row, limit in enumerate(limits) if counts[row] == step < limit]
            if not going:
                break
            hidden = self._draft_side.embed(token)
            hidden = self._draft_side.run_layers(hidden, 0, self._exit_layer, positions[:, step : step + 1], cache)
            states.append(hidden)
            logits = self._draft_side.unembed(hidden)
            draft_probs = self._sampler.probs(logits)
            if self._confidence and not (going := self._sure(going, logits, draft_probs)):
                break
            token = self._sampler.choose(logits, draft_probs, going)
            if self._vocabulary is not None:
                token = self._vocabulary.tokens(token)
                draft_probs = None if draft_probs is None else self._vocabulary.spread(draft_probs, 0.0)
            tokens.append(token)
            if draft_probs is not None:
                probs.append(draft_probs)
            for row in going:
                counts[row] += 1
            if self._eos_ids:
                ended = [row for row, drafted in enumerate(token[:, 0].tolist()) if drafted in self._eos_ids]
                limits = (
                    [min(limit, step + 1) if row in ended else limit for row, limit in enumerate(limits)] if ended else limits
                )
        return Draft(
            torch.cat(tokens, dim=1),
            num_drafts=len(tokens) - 1,
            probs=torch.cat(probs, dim=1) if probs else None,
            exit_states=torch.cat(states, dim=1) if self._reuse else None,
            exit_layer=self._exit_layer,
            by_row=tuple(counts),
        )

    def _sure(self, rows: list[int], logits: Tensor, draft_probs: Tensor | None) -> list[int]:
        """Those of the rows whose most probable token has the confidence."""
        # Decided before a token is drawn: to drop a drawn token for its probability would bias what is sampled.
        distribution = logits.float().softmax(-1) if draft_probs is None else draft_probs
        largest: list[float] = distribution.amax(-1)[:, 0].tolist()
        return [row for row in rows if largest[row] >= self._confidence]


def drafter_for(
    model: Backend, sampler: Sampler, config: DecodingConfig, eos_ids: frozenset[int], reuse_exit_states: bool = True
) -> ExitDrafter:
    """Drafts by the layers and the head that the model keeps for that, where it has such, else by its own.

    Raises ConfigError for an exit behind the layers that it keeps, and for drafts too long to be verified exactly.
    """
    assert config.exit_layer is not None
    side = model.draft_side
    require(
        config.exit_layer <= side.num_layers,
        "exit_layer",
        f"at most the {side.num_layers} layers kept for drafting",
        config.exit_layer,
    )
    require(
        not model.exact or config.num_draft_tokens < EXACT_TOKENS,
        "num_draft_tokens",
        f"below {EXACT_TOKENS} with `exact`",
        config.num_draft_tokens,
    )
    reuse = reuse_exit_states and side.shares_states
    return ExitDrafter(side, sampler, config.exit_layer, config.draft_confidence, eos_ids, reuse)
