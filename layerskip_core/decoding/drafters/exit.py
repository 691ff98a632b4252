"""Drafts by the model's own first layers: self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...config.model import Quantization
from ...errors import require
from ...model.backend import DraftEnds, Submodel, joined, states_at
from ...model.drafting import beyond_exit
from . import Context, Draft, DrafterSetup

_NO_ENDS = DraftEnds()


class ExitDrafter:
    """Drafts with a part of the model, on the target's own cache."""

    def __init__(self, setup: DrafterSetup, weights: Quantization | None, submodel: Submodel, source: str = "drafts") -> None:
        """By these layers in this precision, with the exit's block if it has one; `source` names the drafter in reports.

        Raises ConfigError if no such copy was made, or not of enough layers.
        """
        config, sides = setup.config, setup.draft_sides or setup.model.draft_sides
        require(weights in sides, "draft_weights", f"a copy that was made: {', '.join(filter(None, sides)) or 'none'}", weights)
        side, last = sides[weights], submodel.beyond[-1][1] if submodel.beyond else submodel.exit_layer
        field, needed = ("skip", "a list with all layers after") if config.skip else ("exit_layer", "at most")
        require(last <= side.num_layers, field, f"{needed} the {side.num_layers} layers kept for drafting", last)
        if not config.skip:
            submodel = replace(submodel, block=side.exit_blocks.get(submodel.exit_layer))
        self.source = source
        self._draft_side, self._sampler, self._submodel = side, setup.sampler, submodel
        self._confidence = config.draft_confidence  # a row drafts no further if its most probable token has less
        # On other devices a look at a draft waits for it, which costs more than a few drafts too many.
        self._looks = side.layers.device.type == "cpu"
        self._eos_ids = setup.eos_ids if self._looks else frozenset()
        # A draft side with other weights has other states than the target.
        self._reuses = setup.reuse_exit_states and side.shares_states

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        """Each row ends after an EOS, or before a token of which it is not confident.

        A greedy draft of one row ends by the `survival` of `ends` too.
        """
        if self._sampler.is_greedy and len(limits) == 1:
            ends = ends._replace(ids=self._eos_ids, confidence=self._confidence)
            tokens, states, probs = self._draft_side.draft_greedily(
                context.newest, self._submodel, context.positions[:, :-1], context.cache, ends, context.features
            )
            return Draft(tokens, (tokens.shape[1] - 1,), None, states if self._reuses else {}, self.source, probs)
        return self._step_by_step(context, limits)

    def _step_by_step(self, context: Context, limits: Sequence[int]) -> Draft:
        side, submodel, vocabulary = self._draft_side, self._submodel, self._draft_side.vocabulary
        layers = side.layers
        rooms, counts, token, features = list(limits), [0] * len(limits), context.newest, context.features
        tokens, probs, kept = [token], [], []
        unread: list[Tensor] = []  # (B, 1) each, the largest probability of each draft
        for step in range(max(limits)):
            going = [row for row, room in enumerate(rooms) if counts[row] == step < room]
            if not going:
                break
            positions = context.positions[:, step : step + 1]
            kept.append(states_at(layers, layers.embed(token), submodel.stops, positions, context.cache))
            logits, features = beyond_exit(side, submodel, kept[-1][submodel.exit_layer], positions, context.cache, features)
            draft_probs = self._sampler.probs(logits)
            if self._confidence:  # judged before a token is drawn: dropping a drawn one by its probability would bias samples
                unread.append((logits.float().softmax(-1) if draft_probs is None else draft_probs).amax(-1))
                if self._looks:
                    largest = unread.pop()[:, 0].tolist()
                    going = [row for row in going if largest[row] >= self._confidence]
                    if not going:
                        break
            token = self._sampler.choose(logits, draft_probs, going)
            if vocabulary is not None:
                token = vocabulary.tokens(token)
                draft_probs = None if draft_probs is None else vocabulary.spread(draft_probs)
            tokens.append(token)
            if draft_probs is not None:
                probs.append(draft_probs)
            for row in going:
                counts[row] += 1
            if self._eos_ids:
                rooms = [0 if ids[0] in self._eos_ids else room for ids, room in zip(token.tolist(), rooms, strict=True)]
        if unread:
            for row, row_probs in enumerate(torch.cat(unread, dim=1).tolist()):
                doubtful = (index for index, prob in enumerate(row_probs) if prob < self._confidence)
                counts[row] = min(counts[row], next(doubtful, counts[row]))
            longest = max(counts)
            tokens, probs, kept = tokens[: longest + 1], probs[:longest], kept[: longest + 1]
        all_probs = torch.cat(probs, dim=1) if probs else None
        return Draft(torch.cat(tokens, dim=1), tuple(counts), all_probs, joined(kept) if self._reuses else {}, self.source)

    def observe(self, row: int, drafted: int, verified: Sequence[int]) -> None:
        """Every round drafts in the same way."""


def drafter(setup: DrafterSetup) -> ExitDrafter:
    """Raises ConfigError as `ExitDrafter` does."""
    config = setup.config
    assert config.exit_layer is not None
    name = drafter_name(config.draft_weights, config.exit_layer, setup.model.num_layers)
    return ExitDrafter(setup, config.draft_weights, Submodel(config.exit_layer), name)


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """The name of a drafter in reports: `exit 8`, `int8 exit 8`, or `int8` for a copy of all layers."""
    layers = "" if exit_layer == num_layers else f"exit {exit_layer}"
    return " ".join(filter(None, (weights, layers)))
