"""Drafts by the model's own first layers: self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...config.checks import require
from ...config.packing import EXACT_TOKENS, Quantization
from ...model.backend import DraftEnds, DraftSide, Submodel
from ...model.drafting import beyond_exit
from ...model.spans import joined, states_at
from ..sampling import Greedy, Sampler, Verdict
from . import Context, Draft, DrafterSetup

_NO_ENDS = DraftEnds()


class ExitDrafter:
    """Drafts with a part of the model, on the target's own cache."""

    def __init__(
        self,
        draft_side: DraftSide,
        sampler: Sampler,
        submodel: Submodel,
        confidence: float = 0.0,
        eos_ids: frozenset[int] = frozenset(),
        reuse_exit_states: bool = True,
        source: str = "drafts",
    ) -> None:
        """`confidence`: a row drafts no further if its most probable token has a lower probability.

        Without `reuse_exit_states` the target recomputes the first layers, as it must for a draft side with other weights.
        """
        self.source = source
        self._draft_side = draft_side
        self._sampler = sampler
        self._submodel = submodel
        self._confidence = confidence
        # On other devices a look at a draft waits for it, which costs more than a few drafts too many.
        self._looks = draft_side.device.type == "cpu"
        self._eos_ids = eos_ids if self._looks else frozenset()
        self._reuses = reuse_exit_states and draft_side.shares_states
        self._is_greedy = isinstance(sampler, Greedy)

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        """Each row ends after an EOS, or before a token of which it is not confident.

        A greedy draft of one row ends by the `survival` of `ends` too.
        """
        if self._is_greedy and len(limits) == 1:
            return self._greedy_draft(context, ends._replace(ids=self._eos_ids, confidence=self._confidence))
        vocabulary = self._draft_side.vocabulary
        rooms, counts, token = list(limits), [0] * len(limits), context.newest
        side, submodel = self._draft_side, self._submodel
        tokens, probs, kept, features = [token], [], [], context.features
        unread: list[Tensor] = []  # (B, 1) each, the largest probability of each draft
        for step in range(max(limits)):
            going = [row for row, room in enumerate(rooms) if counts[row] == step < room]
            if not going:
                break
            positions = context.positions[:, step : step + 1]
            kept.append(states_at(side, side.embed(token), submodel.stops, positions, context.cache))
            logits, features = beyond_exit(side, submodel, kept[-1][submodel.exit_layer], positions, context.cache, features)
            draft_probs = self._sampler.probs(logits)
            # Decided before a token is drawn: dropping a drawn token because of its probability would bias the samples.
            if self._confidence:
                unread.append((logits.float().softmax(-1) if draft_probs is None else draft_probs).amax(-1))
                if self._looks and not (going := self._confident(going, unread.pop())):
                    break
            token = self._sampler.choose(logits, draft_probs, going)
            if vocabulary is not None:
                token = vocabulary.tokens(token)
                draft_probs = None if draft_probs is None else vocabulary.spread(draft_probs, 0.0)
            tokens.append(token)
            if draft_probs is not None:
                probs.append(draft_probs)
            for row in going:
                counts[row] += 1
            if self._eos_ids:
                ended = [row for row, drafted in enumerate(token[:, 0].tolist()) if drafted in self._eos_ids]
                for row in ended:
                    rooms[row] = min(rooms[row], step + 1)
        if unread:  # each row ends before its first draft that is not probable enough
            for row, largest in enumerate(torch.cat(unread, dim=1).tolist()):
                doubtful = (place for place, prob in enumerate(largest) if prob < self._confidence)
                counts[row] = min(counts[row], next(doubtful, counts[row]))
            longest = max(counts)
            tokens, probs, kept = tokens[: longest + 1], probs[:longest], kept[: longest + 1]
        return Draft(
            torch.cat(tokens, dim=1),
            tuple(counts),
            torch.cat(probs, dim=1) if probs else None,
            joined(kept) if self._reuses else {},
            self.source,
        )

    def observe(self, verdict: Verdict) -> None:
        """Every round drafts in the same way."""

    def _greedy_draft(self, context: Context, ends: DraftEnds) -> Draft:
        tokens, states, probs = self._draft_side.draft_greedily(
            context.newest, self._submodel, context.positions[:, :-1], context.cache, ends, context.features
        )
        return Draft(tokens, (tokens.shape[1] - 1,), None, states if self._reuses else {}, self.source, probs)

    def _confident(self, rows: list[int], largest: Tensor) -> list[int]:
        """Those of the rows whose most probable token, of the probabilities (B, 1), is probable enough."""
        probs: list[float] = largest[:, 0].tolist()
        return [row for row in rows if probs[row] >= self._confidence]


def drafter(setup: DrafterSetup) -> ExitDrafter:
    """Raises ConfigError as `exit_drafter` does."""
    config = setup.config
    assert config.exit_layer is not None
    name = drafter_name(config.draft_weights, config.exit_layer, setup.model.num_layers)
    return exit_drafter(setup, config.draft_weights, Submodel(config.exit_layer), name)


def exit_drafter(setup: DrafterSetup, weights: Quantization | None, submodel: Submodel, source: str) -> ExitDrafter:
    """A drafter by these layers in this precision, with the exit's block if it has one; `source` names it in reports.

    Raises ConfigError if no such copy was made or not of enough layers, and for drafts too long to be verified exactly.
    """
    require_exact_length(setup)
    config, sides = setup.config, setup.draft_sides
    require(weights in sides, "draft_weights", f"a copy that was made: {', '.join(filter(None, sides)) or 'none'}", weights)
    side, last = sides[weights], submodel.beyond[-1][1] if submodel.beyond else submodel.exit_layer
    field, needed = ("skip", "a list with all layers after") if config.skip else ("exit_layer", "at most")
    require(last <= side.num_layers, field, f"{needed} the {side.num_layers} layers kept for drafting", last)
    if not config.skip:
        submodel = replace(submodel, block=side.exit_blocks.get(submodel.exit_layer))
    confidence, eos_ids = config.draft_confidence, setup.eos_ids
    return ExitDrafter(side, setup.sampler, submodel, confidence, eos_ids, setup.reuse_exit_states, source)


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """What reports call a drafter: `exit 8`, `int8 exit 8`, or `int8` for a copy of all layers."""
    layers = "" if exit_layer == num_layers else f"exit {exit_layer}"
    return " ".join(filter(None, (weights, layers)))


def require_exact_length(setup: DrafterSetup) -> None:
    """Raises ConfigError for drafts too long to be verified exactly."""
    short = not setup.model.exact or setup.config.num_draft_tokens < EXACT_TOKENS
    require(short, "num_draft_tokens", f"below {EXACT_TOKENS} with `exact`", setup.config.num_draft_tokens)
