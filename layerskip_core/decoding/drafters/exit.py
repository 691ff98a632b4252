"""Drafts by layers: a part of the model, a block beside it, or a smaller model (Leviathan et al.,
ICML 2023).

Self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3) drafts with the first layers,
Draft & Verify (Zhang et al., ACL 2024) with all layers but some, and a drafter beside the model
(MTP, EAGLE-3) with none of them. The paper of Draft & Verify skips attention and MLP blocks one by
one; we skip whole layers, and the target continues from the first skipped layer.
"""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.decoding import WITH_DRAFTER, DecodingConfig
from ...config.model import Quantization
from ...errors import ConfigError, require
from ...model.backend import DraftCall, DraftEnds, Spans, Submodel, beyond_exit, states_at
from ...model.cache import Places, on_device
from ...model.eagle3 import NO_DRAFTER
from ..output import Row
from ..sampling import Sampler, Scores
from ..target import NO_PREFIXES, FixedTarget
from . import Context, Draft, DrafterSetup
from .cascade import Cascade

DRAFT_MODEL = "draft model"  # in reports
_KEPT = 32  # least length of a prefill whose KV entries are kept for later prompts
_NO_ENDS = DraftEnds()


class _ByRow:
    """Collects values step by step, and returns them row by row."""

    def __init__(self) -> None:
        # The row of each value
        self.parts = list[Tensor]()
        self.rows = list[int]()

    def add(self, values: Tensor, rows: Sequence[int]) -> None:
        self.parts.append(values)
        self.rows += rows

    def by_row(self, counts: Sequence[int]) -> Tensor:
        """The first `counts[row]` values of each row, row by row."""
        if self.rows == [*range(len(counts))] * len(self.parts) and {*counts} == {len(self.parts)}:
            return torch.stack(self.parts, 1).flatten(0, 1)
        values = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        places = [list[int]() for _ in counts]
        for place, row in enumerate(self.rows):
            places[row].append(place)
        order = [place for own, count in zip(places, counts, strict=True) for place in own[:count]]
        return values if order == list(range(len(values))) else values[on_device(order, values)]


class _Unfinished:
    """The state of a draft that is made step by step."""

    def __init__(self, context: Context, rooms: list[int], feature: Tensor | None) -> None:
        # By row, most drafts
        self.context = context
        self.rooms = rooms
        self.step = 0
        # The G rows that the next step runs, all with `step` drafts; their tokens that did not run
        # yet; the features (G, D) of the previous tokens.
        self.going = list(range(len(rooms)))
        self.token = context.newest
        self.feature = feature
        self.tokens = _ByRow()
        self.states = defaultdict[int, _ByRow](_ByRow)
        self.run = [0] * len(rooms)  # by row, how many tokens ran
        # Drafts and probabilities read
        self.ids = [list[int]() for _ in rooms]
        self.likely = [list[float]() for _ in rooms]
        # Rows, and probabilities not yet read from the device
        self.unread = list[tuple[list[int], Tensor]]()
        self.tokens.add(context.newest, self.going)
        [self.token] = self.narrow(self.token)

    def add(self, tokens: Tensor, rows: Sequence[int]) -> None:
        """Adds drafts that did not run yet: one per row, or several of a single row."""
        self.tokens.add(tokens, rows)
        self.token = torch.cat((self.token, tokens))
        self.step += len(tokens) // len(self.going)

    def narrow(self, *parts: Tensor | None) -> list[Any]:
        """Drops rows without room, also from `feature` and `parts`, which stay as they are if no
        row has room.
        """
        kept = [place for place, row in enumerate(self.going) if self.rooms[row] > self.step]
        every = len(kept) in (0, len(self.going))
        self.going = [self.going[place] for place in kept]
        if every:
            return [*parts]
        parts = (self.feature, *parts)
        self.feature, *rest = (
            part if part is None else part[on_device(kept, part)] for part in parts
        )
        return rest


class ExitDrafter:
    """Drafts with a part of the model, on the target's own cache."""

    def __init__(
        self,
        setup: DrafterSetup,
        weights: Quantization | None,
        submodel: Submodel,
        source: str = "drafts",
    ) -> None:
        """Drafts with `submodel` in precision `weights`, and the exit's block if any; `source`
        names the drafter in reports.

        Raises ConfigError if no such copy was made, or with too few layers.
        """
        config = setup.config
        sides = setup.model.draft_sides
        require(
            weights in sides,
            "draft_weights",
            f"a copy that was made: {', '.join(filter(None, sides)) or 'none'}",
            weights,
        )
        side = sides[weights]
        last = submodel.beyond[-1][1] if submodel.beyond else submodel.exit_layer
        field, needed = (
            ("skip", "a list with all layers after") if config.skip else ("exit_layer", "at most")
        )
        require(
            last <= side.num_layers,
            field,
            f"{needed} the {side.num_layers} layers kept for drafting",
            last,
        )
        if not config.skip and submodel.block is None:
            submodel = replace(submodel, block=side.exit_blocks.get(submodel.exit_layer))
        self.source = source
        self.weights = weights
        self._side = side
        self._sampler = Sampler(config)
        self.submodel = submodel
        self._exit = submodel.exit_layer
        self._fed_by = self._exit or source  # the key of its features
        # A row stops drafting below this probability of its best token
        self._confidence = config.draft_confidence
        # Reading a draft from another device waits for it, which costs more than a few surplus
        # drafts.
        self._looks = side.layers.device.type == "cpu"
        self._eos_ids = setup.eos_ids if self._looks else frozenset()
        # Layers with other weights give other states than the target's.
        block = submodel.block
        runs_layers = block is None or self._exit > 0
        self._reuses = setup.reuse_exit_states and side.shares_states and runs_layers
        self._kernel = side.kernel if block is None or self._exit > 0 else block.kernel
        self._head = side.head(submodel)
        # A whole copy or draft model verifies guesses while it drafts (Cascade; in C, which
        # searches the row's text).
        guesses = self._looks and not self._reuses and submodel == Submodel(side.num_layers)
        self._cascade = Cascade(side, self._head, self._sampler, source) if guesses else None
        # A draft of one row is one call
        self._is_call = self._kernel is not None and not self._sampler.truncates
        self._text: tuple[Row | None, array[int]] = None, array("q")
        self.vocabulary = self._head.vocabulary

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        """Each row's draft stops after an EOS, or before a token below `draft_confidence`.

        A draft of one row also stops by `ends.survival`.
        """
        ends = ends._replace(ids=self._eos_ids, confidence=self._confidence)
        if self.submodel.block is not None:
            context.write_blocks()
        submodel = self.submodel
        features = context.feature(self._fed_by)
        recorder = context.recorder
        reuses = self._reuses
        if self._sampler.processes:
            return self._step_by_step(context, limits, ends)
        if self._kernel is not None and self._is_call and len(limits) == 1:
            places = context.places([limits[0] + 1], [0])
            text = self._searched(context.rows[0]) if self._cascade is not None else context.newest
            noise = self._sampler.noise(context.rows, [0], limits)
            call = DraftCall(self._head, text, submodel, places, ends, noise, features, reuses)
            tokens, states, probs = self._kernel(call)
            count = len(tokens) - 1
            states = states if reuses else {}
            return Draft(
                tokens, (count,), states, self.source, confidence=probs, ran=(count + reuses,)
            )
        if self._cascade is not None:
            return self._cascade.draft(context, limits, ends)
        ragged = len({*limits}) > 1 or len(limits) < len(context.filled)
        # A recording has no noise
        is_recorded = self._sampler.is_greedy and not (ends.needs_probs or ragged)
        if recorder is None or not is_recorded or features is not None:
            return self._step_by_step(context, limits, ends)
        count = len(limits)
        slots = recorder.slots
        places = context.places([limit + 1 for limit in limits], [0] * count)

        def work(newest: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            of_slots = replace(
                context, rows=[context.rows[0]] * slots, newest=newest, recorded=positions
            )
            draft = self._step_by_step(of_slots, [limits[0]] * slots, ends)
            return (draft.tokens, *draft.exit_states.values())

        name = (
            "draft",
            self.weights,
            submodel.exit_layer,
            submodel.beyond,
            submodel.block is not None,
            submodel.taps,
            reuses,
        )
        newest, (positions, *_) = (
            F.pad(context.newest, (0, slots - count)),
            places.padded(places.counts, slots),
        )
        tokens, *kept = (
            part[: sum(places.counts)] for part in recorder.run(name, work, newest, positions)
        )
        states = dict(zip(submodel.state_layers if reuses else (), kept, strict=True))
        return Draft(tokens, tuple(limits), states, self.source)

    def _searched(self, row: Row) -> Tensor:
        """The row's ids (n,); a call copies only new ones."""
        if self._text[0] is not row:
            self._text = row, array("q")
        text = self._text[1]
        text.extend(row.ids[len(text) :])
        return torch.frombuffer(text, dtype=torch.long)

    def _step_by_step(self, context: Context, limits: Sequence[int], ends: DraftEnds) -> Draft:
        """Each step runs one token of each unfinished row and chooses the next."""
        made = _Unfinished(context, list(limits), context.feature(self._fed_by))
        while made.going and self._runs_on(made, ends):
            scores = self._judged(made, self._run(made), ends)
            if made.going:
                self._choose(made, scores, ends)
        rooms = made.rooms
        counts = [made.tokens.rows.count(row) - 1 for row in range(len(limits))]
        if made.unread:
            rows = chain.from_iterable(rows for rows, _ in made.unread)
            for row, prob in zip(
                rows, torch.cat([largest for _, largest in made.unread]).tolist(), strict=True
            ):
                made.likely[row].append(prob)
            rooms = [
                ends.length(likely, room) for likely, room in zip(made.likely, rooms, strict=True)
            ]
        counts = [min(count, room) for count, room in zip(counts, rooms, strict=True)]
        tokens = made.tokens.by_row([count + 1 for count in counts])
        states = {}
        if self._reuses and made.states:
            states = self._completed(made, counts, tokens)
        confidence = made.likely[0][: counts[0]] if len(counts) == 1 else ()
        return Draft(
            tokens, tuple(counts), states, self.source, confidence=confidence, ran=made.run
        )

    def _runs_on(self, made: "_Unfinished", ends: DraftEnds) -> bool:
        """Adds the tokens that a grammar forces, if one row drafts: they run in one pass.

        Returns False if they end the draft.
        """
        alone = len(made.rooms) == 1 and self._looks and self.submodel.block is None
        processor = made.context.rows[0].processor if alone else None
        if processor is not None and (
            forced := processor.forced(made.ids[0])[: made.rooms[0] - made.step]
        ):
            made.ids[0] += forced
            made.likely[0] += [1.0] * len(forced)
            made.add(torch.tensor(forced, device=made.token.device), [0] * len(forced))
            if not ends.ids.isdisjoint(forced):
                made.rooms = [made.step]
        return made.step < max(made.rooms)

    def _run(self, made: "_Unfinished") -> Tensor:
        """The logits (G, N) after the last token of each unfinished row."""
        counts = [
            made.step + 1 - run if row in made.going else 0 for row, run in enumerate(made.run)
        ]
        reached, places = self._through(made, made.token, counts)
        logits, made.feature = beyond_exit(self._side, self.submodel, reached, places, made.feature)
        return logits[-len(made.going) :]

    def _through(
        self, made: "_Unfinished", tokens: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Places]:
        """Runs the next `counts[row]` tokens of each row and keeps their states; returns those at
        the exit, and the places.
        """
        layers = self._side.layers
        places = made.context.places(counts, made.run)
        reached = states_at(layers, layers.embed(tokens), self.submodel.state_layers, places)
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        for stop, states in reached.items():
            made.states[stop].add(states, rows)
        made.run = [run + count for run, count in zip(made.run, counts, strict=True)]
        return reached[self._exit], places

    def _judged(self, made: "_Unfinished", logits: Tensor, ends: DraftEnds) -> Scores:
        """The scores to choose by, of the rows that draft on after them."""
        sampler = self._sampler
        few = self.vocabulary
        rows = [made.context.rows[row] for row in made.going]
        ids = None if few is None else few.ids_on(logits.device)
        if sampler.processes:
            logits = logits if few is None else few.spread(logits)
            ids = None
            logits = sampler.processed(
                logits, [made.ids[row] for row in made.going], [1] * len(rows), rows
            )
            if few is not None:  # a draft vocabulary may lack all permitted tokens
                for row, best in zip(made.going, logits.amax(-1).tolist(), strict=True):
                    made.rooms[row] = made.step if best == -torch.inf else made.rooms[row]
        scores = sampler.scores(
            logits, sampler.noise(rows, [made.step] * len(rows), [1] * len(rows)), ids
        )
        if ends.needs_probs:
            largest = scores.values.float().softmax(-1).amax(-1)
            if self._looks:
                for row, prob in zip(made.going, largest.tolist(), strict=True):
                    made.likely[row].append(prob)
                    made.rooms[row] = ends.length(made.likely[row], made.rooms[row])
            else:
                made.unread.append((made.going, largest))
        values, ids = scores
        if ids is not None and ids.dim() == 1:  # the same for all rows
            [values] = made.narrow(values)
        else:
            values, ids = made.narrow(values, ids)
        return Scores(values, ids)

    def _choose(self, made: "_Unfinished", scores: Scores, ends: DraftEnds) -> None:
        token = self._sampler.best(scores)
        made.token = token[:0]
        made.add(token, made.going)
        if ends.ids or self._sampler.processes:
            for row, new in zip(made.going, token.tolist(), strict=True):
                made.ids[row].append(new)
                made.rooms[row] = made.step if new in ends.ids else made.rooms[row]
        [made.token] = made.narrow(token)

    def _completed(
        self, made: "_Unfinished", counts: Sequence[int], tokens: Tensor
    ) -> dict[int, Tensor]:
        """Runs the tokens that did not run yet; returns the states of all."""
        lacking = [max(0, count + 1 - run) for count, run in zip(counts, made.run, strict=True)]
        if any(lacking):
            parts = torch.split(tokens, [count + 1 for count in counts])
            last = torch.cat(
                [part[len(part) - count :] for part, count in zip(parts, lacking, strict=True)]
            )
            self._through(made, last, lacking)
        return {
            stop: states.by_row([count + 1 for count in counts])
            for stop, states in made.states.items()
        }

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Ignores the outcome: every round drafts in the same way."""


class ModelDrafter:
    """Drafts with all layers of the draft model, whose cache has the rows of the last context.

    A row drafts as far as the draft model's context and memory reach.
    """

    def __init__(self, setup: DrafterSetup) -> None:
        assert setup.model.draft_model is not None
        self.model = setup.model.draft_model
        self._prefixes = setup.prefixes or NO_PREFIXES
        # Whose KV entries the prefixes keep
        self._target = FixedTarget(self.model, DecodingConfig("autoregressive"))
        own = replace(setup, model=self.model, reuse_exit_states=False)
        self._drafter = ExitDrafter(own, None, Submodel(self.model.num_layers), DRAFT_MODEL)
        self._cache = self.model.new_cache(0)
        self._cache.steps_back = setup.config.num_draft_tokens
        self._max_tokens = self.model.context_length(setup.config.num_draft_tokens)  # of a text
        # In the order of the cache's rows: how many tokens have KV entries
        self._filled = dict[Row, int]()
        self._ran = dict[Row, int]()  # how many more the last draft wrote

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        limits = self.follow(context, limits)
        if not any(limits):
            return Draft(context.newest, (0,) * len(limits), source=DRAFT_MODEL)
        draft = self._drafter.draft(self._own(context), limits, ends)
        self._ran = dict(zip(context.rows, draft.ran, strict=True))
        return draft

    def follow(self, context: Context, limits: Sequence[int]) -> list[int]:
        """Prefills each row that may draft, without its newest token. Returns the limits; 0 for a
        row that cannot draft yet.
        """
        self._take_rows(context)
        counts = list[int]()
        allowed = list[int]()
        room = context.piece if len(limits) > 1 else inf
        for ids, filled, limit in zip(context.ids, self._filled.values(), limits, strict=True):
            limit = max(0, min(limit, self._max_tokens - len(ids)))
            lacking = len(ids) - 1 - filled if limit else 0
            counts.append(int(min(lacking, room)))
            room -= counts[-1]
            allowed.append(limit if counts[-1] == lacking else 0)
        while self._spare(counts, allowed) < 0 and self._prefixes.drop(self.model):
            pass
        for index in reversed(range(len(counts))):
            if self._spare(counts, allowed) < 0:  # the youngest rows give way
                counts[index] = allowed[index] = 0
        if not any(counts):
            return allowed
        own = self._own(context)
        tokens = list[int]()
        for row, ids, start, count in zip(
            context.rows, context.ids, own.filled, counts, strict=True
        ):
            tokens += ids[start : start + count]
            self._filled[row] += count
        hidden = self.model.embed(torch.tensor(tokens).to(self.model.device, non_blocking=True))
        self.model.run_layers(
            hidden, 0, self.model.num_layers, own.places(counts, [0] * len(counts))
        )
        for index, (row, ids, count) in enumerate(
            zip(context.rows, context.ids, counts, strict=True)
        ):
            if count >= _KEPT and self._spare([0] * len(counts), allowed) >= 1:
                self._prefixes.keep(
                    self.model, self._target, ids[: self._filled[row]], self._cache, index
                )
        return allowed

    def _spare(self, counts: Sequence[int], limits: Sequence[int]) -> float:
        """Pages left free by these tokens and drafts of the rows; negative if they need more."""
        sizes = zip(self._filled.values(), counts, limits, strict=True)
        stops = [filled + count + limit + (limit > 0) for filled, count, limit in sizes]
        return self._cache.free_pages(stops)

    def _own(self, context: Context) -> Context:
        filled = list(self._filled.values())
        return replace(
            context, cache=self._cache, indices=range(len(filled)), filled=filled, recorder=None
        )

    def _take_rows(self, context: Context) -> None:
        """Gives the cache the rows of the context, in their order."""
        for row, ids in zip(context.rows, context.ids, strict=True):
            if row not in self._filled:
                cache, self._filled[row] = self._prefixes.begin(
                    self.model, self._target, ids, self._max_tokens
                )
                self._cache.join(cache)
        rows = list(self._filled)
        order = [rows.index(row) for row in context.rows]
        if order != list(range(len(rows))):
            self._cache.keep_rows(order)
            self._filled = {row: self._filled[row] for row in context.rows}

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        # The latter: accepted drafts, and the newest token
        self._filled[row] += min(self._ran.pop(row, 0), len(verified))


def drafter(setup: DrafterSetup) -> ExitDrafter | ModelDrafter:
    """Makes the strategy's drafter. Raises ConfigError as `ExitDrafter` does, and if the model
    lacks the drafter.
    """
    config = setup.config
    model = setup.model
    weights = setup.config.draft_weights
    if config.strategy == "draft-model":
        return ModelDrafter(setup)
    if (name := config.strategy) in WITH_DRAFTER:
        if name not in model.drafters:
            raise ConfigError(f"`strategy` {name}: {NO_DRAFTER.format(name)}", "strategy")
        return ExitDrafter(setup, None, Submodel(0, block=model.drafters[name]), name)
    if config.strategy == "draft-and-verify":
        kept = Submodel(*kept_layers(config.skip, model.num_layers))
        name = f"{weights or ''} {model.num_layers - len(set(config.skip))} of {model.num_layers} layers"
        return ExitDrafter(setup, weights, kept, name.strip())
    assert config.exit_layer is not None
    return ExitDrafter(
        setup,
        weights,
        Submodel(config.exit_layer),
        drafter_name(weights, config.exit_layer, model.num_layers),
    )


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it,
    by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = tuple(
        (before, after - 1)
        for before, after in pairwise([*ascending, num_layers + 1])
        if before < after - 1
    )
    return ascending[0] - 1, spans


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """The name of a drafter in reports: `exit 8`, `int8 exit 8`, or `int8` for a copy of all
    layers.
    """
    layers = "" if exit_layer == num_layers else f"exit {exit_layer}"
    return " ".join(filter(None, (weights, layers)))
