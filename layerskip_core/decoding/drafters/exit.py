"""Drafts by a part of the model or a block beside it.

Self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3) drafts with the first layers, Draft & Verify (Zhang et al.,
ACL 2024) with all layers but some, and a drafter in the EAGLE-3 layout with none of them. The paper of Draft & Verify skips
attention and MLP blocks one by one; here whole layers are skipped, and the target goes on from the layers before the first one.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ...config.model import Quantization
from ...errors import ConfigError, require
from ...model.backend import DraftEnds, Spans, Submodel, beyond_exit, joined, states_at
from ...model.eagle3 import NO_DRAFTER
from ...model.pages import PagedCache, TokenRows
from . import Context, Draft, DrafterSetup

_NO_ENDS = DraftEnds()


class ExitDrafter:
    """Drafts with a part of the model, on the target's own cache."""

    def __init__(self, setup: DrafterSetup, weights: Quantization | None, submodel: Submodel, source: str = "drafts") -> None:
        """By these layers in this precision, with the exit's block if it has one; `source` names the drafter in reports.

        Raises ConfigError if no such copy was made, or not of enough layers.
        """
        config, sides = setup.config, setup.model.draft_sides
        require(weights in sides, "draft_weights", f"a copy that was made: {', '.join(filter(None, sides)) or 'none'}", weights)
        side, last = sides[weights], submodel.beyond[-1][1] if submodel.beyond else submodel.exit_layer
        field, needed = ("skip", "a list with all layers after") if config.skip else ("exit_layer", "at most")
        require(last <= side.num_layers, field, f"{needed} the {side.num_layers} layers kept for drafting", last)
        if not config.skip and submodel.block is None:
            submodel = replace(submodel, block=side.exit_blocks.get(submodel.exit_layer))
        self.source, self.weights = source, weights
        self._side, self._sampler, self.submodel, self._recorder = side, setup.sampler, submodel, setup.recorder
        self._exit = submodel.exit_layer
        self._confidence = config.draft_confidence  # a row drafts no further if its most probable token has less
        # On other devices a look at a draft waits for it, which costs more than a few drafts too many.
        self._looks = side.layers.device.type == "cpu"
        self._eos_ids = setup.eos_ids if self._looks else frozenset()
        # A draft side with other weights has other states than the target.
        block = submodel.block
        runs_layers = block is None or self._exit > 0
        self._reuses = setup.reuse_exit_states and side.shares_states and runs_layers
        self._is_ragged = setup.model.ragged and not self._reuses and (block is None or not block.is_fed)
        self._kernel = side.kernel if block is None or self._exit > 0 else block.kernel
        self._head = side.head(submodel)
        self.vocabulary = self._head.vocabulary

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        """Each row ends after an EOS, or before a token of which it is not confident.

        A greedy draft of one row ends by the `survival` of `ends` too.
        """
        ends = ends._replace(ids=self._eos_ids, confidence=self._confidence)
        processes = bool(self._sampler.processors)
        if not self._sampler.is_greedy or len(limits) > 1 or processes:
            narrow = self._is_ragged and self._sampler.is_greedy and not (ends.needs_probs or processes)
            return self._narrowing(context, limits) if narrow else self._step_by_step(context, limits, ends)
        submodel, positions, reuses = self.submodel, context.positions[:, : limits[0]], self._reuses
        features = context.features.get(self._exit)
        if self._kernel is not None:
            tokens, states, probs = self._kernel(self._head, context.newest, submodel, positions, context.cache, ends, features)
            return Draft(tokens, (tokens.shape[1] - 1,), None, states if reuses else {}, self.source, confidence=probs)
        recorder = self._recorder
        if recorder is None or ends.needs_probs or features is not None:
            return self._step_by_step(context, limits, ends)

        def work(token: Tensor, places: Tensor) -> tuple[Tensor, ...]:
            draft = self._step_by_step(replace(context, newest=token, positions=places), limits, ends)
            return (draft.tokens, *draft.exit_states.values())

        name = "draft", self.weights, submodel.exit_layer, submodel.beyond, submodel.block is not None, submodel.taps, reuses
        tokens, *kept = recorder.run(name, work, context.newest, positions)
        states = dict(zip(submodel.stops if reuses else (), kept, strict=True))
        return Draft(tokens, (tokens.shape[1] - 1,), None, states, self.source)

    def _narrowing(self, context: Context, limits: Sequence[int]) -> Draft:
        """Greedy drafts of several rows, by a copy: each step runs only the rows that go on."""
        side, rooms, tokens = self._side, list(limits), [context.newest]
        for step in range(max(rooms)):
            going = [row for row, room in enumerate(rooms) if room > step]
            if not going:
                break
            assert isinstance(context.cache, PagedCache)
            cache = TokenRows(context.cache, [int(room > step) for room in rooms])
            positions, hidden = context.positions[going, step : step + 1], side.layers.embed(tokens[-1][going])
            states = side.layers.run_layers(hidden, 0, self.submodel.exit_layer, positions, cache)
            logits, _ = beyond_exit(side, self.submodel, states, positions, cache, None)
            token = tokens[-1].clone()
            token[going] = self._head.choose(logits)
            tokens.append(token)
            for row in going:
                if int(token[row]) in self._eos_ids:
                    rooms[row] = step + 1
        return Draft(torch.cat(tokens, dim=1), tuple(rooms), source=self.source)

    def _step_by_step(self, context: Context, limits: Sequence[int], ends: DraftEnds) -> Draft:
        side, submodel, cache = self._side, self.submodel, context.cache
        token, features, rooms = context.newest, context.features.get(self._exit), list(limits)
        tokens, probs, states = [token], list[Tensor](), list[dict[int, Tensor]]()
        largest: list[list[float]] = [[] for _ in rooms]  # probability of each draft, by row
        unread: list[Tensor] = []  # (B, 1) each, the same on a device that is not waited for
        drafted: list[list[int]] = [[] for _ in rooms]  # by row, where logits are processed
        vocabulary = self.vocabulary
        # What a grammar forces is no choice: such tokens of one row run through the layers together.
        forces = bool(self._sampler.processors) and len(rooms) == 1 and submodel.block is None and self._looks
        forces = forces and self._sampler.is_greedy
        while (step := len(tokens) - 1) < max(rooms):
            if forces:
                forced = context.processors[0].forced(drafted[0])[: rooms[0] - step - 1]
                drafted[0] += forced
                largest[0] += [1.0] * len(forced)
                tokens += [torch.tensor([[new]], device=token.device) for new in forced]
                token, step = torch.cat(tokens[step:], dim=1), len(tokens) - 1
                if not ends.ids.isdisjoint(forced):
                    rooms = [step]
                    break
            positions = context.positions[:, len(states) : step + 1]
            reached = states_at(side.layers, side.layers.embed(token), submodel.stops, positions, cache)
            logits, features = beyond_exit(side, submodel, reached[submodel.exit_layer], positions, cache, features)
            logits = logits[:, -1:]
            states += [{stop: each[:, place : place + 1] for stop, each in reached.items()} for place in range(token.shape[1])]
            if self._sampler.processors:
                logits = logits if self.vocabulary is None else self.vocabulary.spread(logits, -torch.inf)
                logits = self._sampler.processed(logits, drafted, [row for row, room in enumerate(rooms) if room > step])
                vocabulary = None
                if self.vocabulary is not None:  # which may lack all that a grammar permits
                    dead = (logits[:, 0].amax(-1) == -torch.inf).tolist()
                    rooms = [min(room, step) if none else room for none, room in zip(dead, rooms, strict=True)]
            draft_probs = self._sampler.probs(logits)
            if ends.needs_probs:  # judged before a token is drawn: dropping a drawn one by its probability would bias samples
                unread.append((logits.float().softmax(-1) if draft_probs is None else draft_probs).amax(-1))
                if self._looks:
                    for row, prob in enumerate(unread.pop()[:, 0].tolist()):
                        if rooms[row] > step:
                            largest[row].append(prob)
                            rooms[row] = ends.length(largest[row], rooms[row])
            going = [row for row, room in enumerate(rooms) if room > step]
            if not going:
                break
            token = self._sampler.choose(logits, draft_probs, going)
            if vocabulary is not None:
                token = vocabulary.tokens(token)
                draft_probs = None if draft_probs is None else vocabulary.spread(draft_probs)
            tokens.append(token)
            if self._sampler.processors:
                for ids, [new] in zip(drafted, token.tolist(), strict=True):
                    ids.append(new)
            if draft_probs is not None:
                probs.append(draft_probs)
            if ends.ids:
                ended = (ids[0] in ends.ids for ids in token.tolist())
                rooms = [min(room, step + 1) if end else room for end, room in zip(ended, rooms, strict=True)]
        if unread:
            largest = torch.cat(unread, dim=1).tolist()
            rooms = [ends.length(row_probs, room) for row_probs, room in zip(largest, rooms, strict=True)]
        longest = max(rooms)
        return Draft(
            torch.cat(tokens[: longest + 1], dim=1),
            tuple(rooms),
            torch.cat(probs[:longest], dim=1) if probs[:longest] else None,
            joined(states[: longest + 1]) if self._reuses and states else {},  # none where all drafts were forced
            self.source,
            confidence=largest[0][:longest] if len(rooms) == 1 else (),
        )

    def observe(self, row: int, drafted: int, verified: Sequence[int]) -> None:
        """Every round drafts in the same way."""


def drafter(setup: DrafterSetup) -> ExitDrafter:
    """Raises ConfigError as `ExitDrafter` does, and for a model without a drafter in the EAGLE-3 layout that is to draft."""
    config, model, weights = setup.config, setup.model, setup.config.draft_weights
    if config.strategy == "eagle3":
        if model.eagle3 is None:
            raise ConfigError(f"`strategy` eagle3: {NO_DRAFTER}", "strategy")
        return ExitDrafter(setup, None, Submodel(0, block=model.eagle3), "eagle3")
    if config.strategy == "draft-and-verify":
        name = f"{model.num_layers - len(set(config.skip))} of {model.num_layers} layers"
        return ExitDrafter(
            setup, weights, Submodel(*kept_layers(config.skip, model.num_layers)), f"{weights or ''} {name}".strip()
        )
    assert config.exit_layer is not None
    return ExitDrafter(setup, weights, Submodel(config.exit_layer), drafter_name(weights, config.exit_layer, model.num_layers))


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it, by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = tuple((before, after - 1) for before, after in pairwise([*ascending, num_layers + 1]) if before < after - 1)
    return ascending[0] - 1, spans


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """The name of a drafter in reports: `exit 8`, `int8 exit 8`, or `int8` for a copy of all layers."""
    layers = "" if exit_layer == num_layers else f"exit {exit_layer}"
    return " ".join(filter(None, (weights, layers)))
