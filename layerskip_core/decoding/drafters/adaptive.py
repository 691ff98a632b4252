"""Chooses what drafts, and how much, before every round: by expected tokens per unit of time, plain decoding included.

The choice of exit and length by measured acceptance follows DEL (Zarch et al., COLM 2025), and a draft that ends where it will
probably be rejected follows SpecDec++ (Huang et al., 2024). Instead of layers, the times of passes are compared. Acceptance is
that of the drafts that were verified: nothing is computed for the choice alone.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...model.backend import DraftEnds, Submodel
from ...model.exit_blocks import DraftBlock
from ..output import Row
from . import Context, Draft, DrafterSetup
from .estimates import NO_OTHERS, Acceptance, Arm
from .exit import DRAFT_MODEL, ExitDrafter, ModelDrafter, drafter_name
from .knowledge import Drafting, knowledge_of
from .lookup import SHORTEST, LookupDrafter, copied

_LONGER = 1.25  # a draft that stays certain may be this many times as long as is best on average


class AdaptiveDrafter:
    """Drafts by lookups, exits, low-bit copies or a draft model, or not at all, whichever promises the most tokens per second.

    A pass may verify looked-up tokens of some rows and another drafter's of the others. The times of passes are measured while
    decoding where they cannot change the output; elsewhere they are the profile's, so that a sample depends on its seed alone.
    """

    def __init__(self, setup: DrafterSetup, drafters: dict[str, Drafting]) -> None:
        """`drafters`: by their names in reports."""
        self._drafters, self._is_greedy = drafters, setup.config.temperature == 0
        self._on_cpu = setup.model.device.type == "cpu"
        # Elsewhere drafts are still running on the device when the host has started them all.
        self._by_clock = self._is_greedy and setup.model.batch_invariant and self._on_cpu
        kind = "processed" if setup.config.changes_logits else "plain"  # whose drafts are single calls of a kernel
        self._known = knowledge_of(setup.model, drafters, setup.config.profile, remembered=self._by_clock, kind=kind)
        self._lookup = LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids, earlier=setup.earlier)
        # By row: the continuations in its text and in an earlier answer, and how likely they are.
        self._found: dict[Row, list[tuple[list[int], Acceptance]]] = {}
        self._source = "lookup"  # or grammar
        self._arm: Arm | None = None  # what drafts this round for the rows without a lookup
        self._drafted_rows: list[Row] = []  # by it
        self._steps = 0  # of it
        self._draft: Draft | None = None  # of the round
        self._draft_seconds = self._drafted_at = 0.0  # how long its steps took; when the draft was done
        self._is_timed = self._looks = False
        self._began = self._in_passes = 0.0  # the loop's seconds before the last step, and those of its drafts and its pass
        self._got = 0  # tokens that it gave

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        self._arm, self._drafted_rows = None, []
        draft, rows = Draft(context.newest, (0,) * len(limits)), len(limits)
        if self._by_clock and self._draft is not None and len(self._draft.counts) == rows:
            self._known.observe_period(rows, self._looks, self._got, context.seconds - self._began, self._in_passes)
        self._began, self._got = context.seconds, 0
        self._looks = not (self._by_clock and self._known.wants_plain_step(rows))
        if self._looks:
            self._find(context, limits)
            draft = self._best_draft(context, limits)
        self._draft, self._drafted_at, self._is_timed = draft, time.perf_counter(), False
        return draft

    def _find(self, context: Context, limits: Sequence[int]) -> None:
        # Alone, a row's drafter runs through what is forced, and goes on after it.
        alone = len(context.rows) == 1 and self._is_greedy and self._on_cpu and bool(self._drafters)
        forced = {row: [] if alone else context.forced(index, limits[index]) for index, row in enumerate(context.rows)}
        self._source = "grammar" if any(forced.values()) else "lookup"
        self._found.update((row, [(tokens, self._known.forced)]) for row, tokens in forced.items() if tokens)
        for in_answers, lookups in enumerate((self._lookup.find(context, limits), self._lookup.recall(context, limits))):
            for row, (tokens, evidence) in zip(context.rows, lookups, strict=True):
                if tokens and not forced[row]:  # the target's verdict judges them whether they are used or not
                    acceptance = self._known.acceptance_of_lookup(evidence, bool(in_answers))
                    self._found.setdefault(row, []).append((tokens, acceptance))

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Learns from the acceptance of a row's drafts, and from the first row of a round how long the round took."""
        draft, known = self._draft, self._known
        assert draft is not None
        if self._by_clock and not self._is_timed:
            self._is_timed = True
            seconds = self._draft_seconds if self._arm else 0.0, time.perf_counter() - self._drafted_at
            self._in_passes = sum(seconds)
            known.observe_round(self._arm, len(self._drafted_rows), self._steps, len(draft.tokens), *seconds)
        self._got += len(verified)
        for found, acceptance in self._found.pop(row, []):
            acceptance.compare(found, verified)
        if self._arm is not None and row in self._drafted_rows:
            self._arm.acceptance.observe(drafted, len(verified) - 1)
            self._drafters[self._arm.name].observe(row, drafted, verified)
            if draft.confidence:
                self._arm.calibration.observe(len(verified) - 1, draft.confidence)

    def _best_draft(self, context: Context, limits: Sequence[int]) -> Draft:
        looked_up, rate, others = self._lookups(context.rows)
        plan = self._plan(rate, max(limits), looked_up, others, min(map(len, context.ids)))
        if plan is None:
            return copied(context, looked_up, self._source)
        self._arm, rows, length, ends = plan
        self._drafted_rows = [context.rows[index] for index in rows]
        within = set(rows)
        capped = [min(length, limit) if index in within else 0 for index, limit in enumerate(limits)]
        if isinstance(drafter := self._drafters[self._arm.name], ModelDrafter):
            capped = drafter.follow(context, capped)  # which takes its time once for a text
        started = time.perf_counter()  # the choice takes its time whatever drafts, and is not the arm's
        draft = drafter.draft(context, capped, ends)
        self._draft_seconds, self._steps = time.perf_counter() - started, max(draft.counts)
        draft = replace(draft, survival=self._arm.calibration.survival(draft.confidence))
        return draft if len(rows) == len(limits) else _merged(draft, copied(context, looked_up))

    def _plan(
        self, rate: float, most: int, looked_up: Sequence[list[int]], others: tuple[float, int], shortest: int
    ) -> tuple[Arm, list[int], int, DraftEnds] | None:
        """The arm that may beat lookups, which give this `rate`; the rows that it drafts for, how much, and where it ends.

        It drafts for all rows or, as `others` says, for those without a lookup. A drafter whose states the target goes on from
        needs all. `shortest`: tokens of the shortest text.
        """
        known, batch = self._known, len(looked_up)
        alone = [index for index, tokens in enumerate(looked_up) if not tokens]
        mixes = self._is_greedy and 0 < len(alone) < batch
        chosen = known.choose(rate, most, batch, (len(alone), others) if mixes else None, shortest)
        if chosen is None:
            return None
        arm, is_mixed = chosen
        rows, elsewhere = (alone, others) if is_mixed else (list(range(batch)), NO_OTHERS)
        rate, length = known.best_length(arm, len(rows), most, others=elsewhere)
        # Such a draft ends where the draft side is uncertain. Off the CPU every look at that would wait for the device.
        if self._is_greedy and batch == 1 and self._on_cpu:
            return arm, rows, min(int(_LONGER * length), most), known.ends(arm, rate, length)
        return arm, rows, length, DraftEnds()

    def _lookups(self, rows: Sequence[Row]) -> tuple[list[list[int]], float, tuple[float, int]]:
        """By row, as much of the continuation found as pays; the tokens per unit of time that this promises.

        And, of the rows that look up, how many tokens they are expected to get, and how many the pass verifies.
        """
        passes, rest, batch = self._known.passes, self._known.rest, len(rows)
        survivals: list[tuple[float, int]] = []
        best_found: dict[Row, list[int]] = {}
        for index, row in enumerate(rows):
            if row in self._found:
                tokens, acceptance = max(self._found[row], key=lambda found: found[1].expected(len(found[0])))
                best_found[row] = tokens
                survival, later = acceptance.chances()
                for _ in tokens:
                    survivals.append((survival, index))
                    survival *= later
        survivals.sort(reverse=True)
        counts, best_counts, expected = [0] * batch, [0] * batch, float(batch)
        best_rate = batch / (passes.of(batch) + rest)
        for verified, (survival, index) in enumerate(survivals, start=batch + 1):
            counts[index] += 1
            expected += survival
            rate = expected / (passes.of(verified) + rest)
            if rate > best_rate:
                best_rate, best_counts = rate, list(counts)
            elif rate < 0.8 * best_rate:
                break
        used = [index for index, count in enumerate(best_counts) if count]
        gained = sum(survival for survival, _ in survivals[: sum(best_counts)])
        looked_up = [best_found[row][:count] if count else [] for row, count in zip(rows, best_counts, strict=True)]
        return looked_up, best_rate, (len(used) + gained, len(used) + sum(best_counts))


def _merged(draft: Draft, lookups: Draft) -> Draft:
    """The drafts of the rows that the second has none for, and those of the second."""
    looked_up = frozenset(index for index, count in enumerate(lookups.counts) if count)
    parts = [(lookups if index in looked_up else draft).by_row()[index] for index in range(len(draft.counts))]
    counts = tuple(looked or drafted for drafted, looked in zip(draft.counts, lookups.counts, strict=True))
    return replace(draft, tokens=torch.cat(parts), counts=counts, lookups=looked_up)


def drafter(setup: DrafterSetup) -> AdaptiveDrafter:
    """Drafts by the trained exits, low-bit copies with as many layers and with all, drafters beside it, a draft model."""
    model, config = setup.model, setup.config
    drafters: dict[str, Drafting] = {} if model.draft_model is None else {DRAFT_MODEL: ModelDrafter(setup)}
    blocks: list[DraftBlock] = [block for exit_layer, block in model.exit_blocks.items() if exit_layer in config.exits]
    for name, block in model.drafters.items():
        blocks.append(block)
        drafters[name] = ExitDrafter(setup, None, Submodel(0, block=block), name)
    tapped = sorted({tap for block in blocks for tap in block.taps})
    for weights, side in model.draft_sides.items():
        exits = [exit_layer for exit_layer in config.exits if exit_layer < model.num_layers and exit_layer <= side.num_layers]
        if weights is not None and (side.num_layers == model.num_layers or not exits):
            exits.append(side.num_layers)
        for exit_layer in exits:
            taps = tuple(lower for lower in tapped if 0 < lower < exit_layer) if side.shares_states else ()
            name = drafter_name(weights, exit_layer, model.num_layers)
            drafters[name] = ExitDrafter(setup, weights, Submodel(exit_layer, taps=taps), name)
            if weights is not None and exit_layer == model.num_layers:
                for beside in model.drafters:  # which draft for the copy
                    both = f"{name} and {beside}"
                    drafters[both] = ExitDrafter(setup, weights, Submodel(exit_layer), both, beside)
    return AdaptiveDrafter(setup, drafters)
