"""Chooses what drafts, and how much, before every round: by expected tokens per unit of time, plain decoding included.

The choice of exit and length by measured acceptance follows DEL (Zarch et al., COLM 2025), and a draft that ends where it will
probably be rejected follows SpecDec++ (Huang et al., 2024). Instead of layers, the times of passes are compared. Acceptance is
that of the drafts that were verified: nothing is computed for the choice alone.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from ...model.backend import DraftEnds, Submodel
from . import Context, Draft, DrafterSetup
from .exit import ExitDrafter, drafter_name
from .knowledge import Acceptance, LinearTime, Option, best_length, knowledge_of
from .lookup import SHORTEST, LookupDrafter, copied

_FREE = LinearTime(0.0, 0.0)  # a lookup takes no time
_COMPARED = 8  # rounds
_LONGER = 2  # a draft that stays certain may be this many times as long as is best on average


class AdaptiveDrafter:
    """Drafts by a lookup, by exits or by low-bit copies, or not at all, whichever promises the most tokens per second.

    The times of passes are measured while decoding, unless that could change the output, which then would depend on more than
    its seed: without that they are those that were known before.
    """

    def __init__(self, setup: DrafterSetup, drafters: dict[str, ExitDrafter]) -> None:
        """`drafters`: by their names in reports."""
        self._drafters, self._is_greedy = drafters, setup.sampler.is_greedy
        self._by_clock = self._is_greedy and setup.model.batch_invariant
        self._known = knowledge_of(setup.model, drafters, setup.config.profile, remembered=self._by_clock)
        self._lookup = LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids)
        self._found: dict[int, tuple[list[int], Acceptance]] = {}  # by row: the continuation in its text, and how likely it is
        self._preferred: Option | None = None  # of the options, whether a lookup was better or not
        self._chosen: Option | None = None  # what drafted this round; None for a lookup and for plain decoding
        self._rounds = 0
        self._draft: Draft | None = None  # of the round
        self._started, self._ended = 0.0, 0.0  # of the draft
        self._is_timed = False

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        batch = len(limits)
        for row, (tokens, evidence) in zip(context.rows, self._lookup.find(context, limits), strict=True):
            if tokens:  # the target's verdict judges them whether they are used or not
                self._found[row] = tokens, self._known.acceptance_of_lookup(evidence)
        option, length, rate = self._plan(batch, max(limits))
        self._chosen, self._started = None, time.perf_counter()
        draft = None
        if not (self._by_clock and self._known.wants_plain_step()):
            draft = self._copied(context, rate)
            if draft is None and option is not None:
                self._chosen, ends = option, DraftEnds()
                # Such a draft ends where the draft side is uncertain. Off the CPU every look at that would wait for the device.
                if self._is_greedy and batch == 1 and context.newest.device.type == "cpu":
                    ends, length = option.ends(rate), min(_LONGER * length, limits[0])
                context = replace(context, positions=context.positions[:, : length + 1])
                draft = self._drafters[option.name].draft(context, [min(length, limit) for limit in limits], ends)
        self._draft = draft or Draft(context.newest, (0,) * batch)
        self._ended, self._is_timed = time.perf_counter(), False
        return self._draft

    def observe(self, row: int, drafted: int, verified: Sequence[int]) -> None:
        """Learns from the acceptance of a row's drafts, and from the first row of a round how long the round took."""
        assert self._draft is not None
        if self._by_clock and not self._is_timed:
            self._is_timed, (rows, tokens) = True, self._draft.tokens.shape
            draft_time, verify_time = self._ended - self._started, time.perf_counter() - self._ended
            self._known.observe_round(self._chosen, tokens - 1, draft_time, rows * tokens, verify_time)
        found, acceptance = self._found.pop(row, ([], None))
        if acceptance is not None:
            acceptance.compare(found, verified)
        if self._chosen is not None:
            self._chosen.observe(drafted, len(verified) - 1, self._draft.confidence)

    def _plan(self, batch: int, most: int) -> tuple[Option | None, int, float]:
        """The option that promises most, None for plain decoding, with its length and its tokens per unit of time and row.

        As long as it beats plain decoding, the last choice is compared with the others in one round of `_COMPARED` only.
        """
        chosen, length, rate = None, 0, 1 / self._known.plain.of(batch)
        last, self._rounds = self._preferred, self._rounds + 1
        if last is not None and self._rounds < _COMPARED:
            promised, best = last.plan(batch, most)
            if promised > rate:
                return last, best, promised
        for option in self._known.options.values():
            if option is not last:
                self._known.forget(option, self._rounds)
            promised, best = option.plan(batch, most)
            if promised > rate:
                chosen, length, rate = option, best, promised
        self._preferred, self._rounds = chosen, 0
        return chosen, length, rate

    def _copied(self, context: Context, rate: float) -> Draft | None:
        """The continuations that were found, if on average over the rows they promise more than `rate`."""
        if not self._found:
            return None
        batch, plain = len(context.rows), self._known.plain
        alone = 1 / plain.of(batch)
        drafts: list[list[int]] = []
        promised = 0.0
        for row in context.rows:
            tokens, acceptance = self._found.get(row, ([], None))
            of_row, length = 0.0, 0
            if acceptance is not None:
                of_row, length = best_length(acceptance.chances, _FREE, 0, plain, batch, len(tokens))
            promised += max(of_row, alone)
            drafts.append(tokens[:length] if of_row > alone else [])
        return copied(context, drafts) if any(drafts) and promised > batch * rate else None


def drafter(setup: DrafterSetup) -> AdaptiveDrafter:
    """Drafts by the trained exits, and by low-bit copies with as many layers and with all."""
    model, config = setup.model, setup.config
    drafters: dict[str, ExitDrafter] = {}
    with_blocks = sorted(exit_layer for exit_layer in model.exit_blocks if exit_layer in config.exits)
    for weights, side in model.draft_sides.items():
        exits = [exit_layer for exit_layer in config.exits if exit_layer < model.num_layers and exit_layer <= side.num_layers]
        if weights is not None and (side.num_layers == model.num_layers or not exits):
            exits.append(side.num_layers)
        for exit_layer in exits:
            taps = tuple(lower for lower in with_blocks if lower < exit_layer) if side.shares_states else ()
            name = drafter_name(weights, exit_layer, model.num_layers)
            drafters[name] = ExitDrafter(setup, weights, Submodel(exit_layer, taps=taps), name)
    return AdaptiveDrafter(setup, drafters)
