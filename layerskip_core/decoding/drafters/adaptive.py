"""Chooses what drafts, and how much, before every round: by expected tokens per second, plain decoding included.

The choice of exit and length by measured acceptance follows DEL (Zarch et al., COLM 2025), and a draft that ends where it will
probably be rejected follows SpecDec++ (Huang et al., 2024). Instead of layers, the times of passes are compared. Acceptance is
that of the drafts that were verified: nothing is computed for the choice alone.
"""

import time
from collections.abc import Mapping, Sequence
from math import inf
from weakref import WeakKeyDictionary

import torch

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds, Submodel
from ...model.exit_blocks import DraftBlock
from ..output import Row
from . import Context, Draft, DrafterSetup
from .bandit import GUESS, Acceptance, Arm, Bandit, Calibration, DraftTimes, PassTimes, Speed, Step
from .exit import DRAFT_MODEL, ExitDrafter, ModelDrafter, drafter_name
from .lookup import SHORTEST, LookupDrafter, copied

Drafting = ExitDrafter | ModelDrafter

_STORED = 8.0  # drafts that a stored acceptance counts as, which was measured on other texts
_EXIT_ACCEPTANCE = 0.85  # of a trained exit of which nothing is known
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92, DRAFT_MODEL: 0.75}  # of calibrated int4 weights
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # of a pass, over one by bf16 weights
# Doubt and power, see DraftEnds. Trained exits are calibrated, copies of all layers are underconfident.
_CALIBRATIONS = {"": (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3), DRAFT_MODEL: (1.0, 1)}


class AdaptiveDrafter:
    """Drafts by lookups, exits, low-bit copies or a draft model, or not at all, whichever promises the most tokens per second.

    The times of passes are measured while decoding where they cannot change the output; elsewhere they are the profile's, so
    that a sample depends on its seed alone.
    """

    def __init__(self, setup: DrafterSetup, drafters: dict[str, Drafting]) -> None:
        """`drafters`: by their names in reports."""
        # Off the CPU drafts are still running when the host has started them all, and a look at their probabilities would wait.
        self._drafters, self._reads_probs = drafters, setup.config.temperature == 0 and setup.model.device.type == "cpu"
        self._by_clock = self._reads_probs and setup.model.batch_invariant
        self.bandit = bandit_of(setup, drafters, remembered=self._by_clock)
        self._lookup = LookupDrafter(setup.config.lookup or SHORTEST, setup.eos_ids, earlier=setup.earlier)
        # By row, what was found in this round: tokens, and the acceptance of those with as much evidence.
        self._found: dict[Row, list[tuple[list[int], Acceptance]]] = {}
        self._source = "lookup"  # or grammar
        self._step, self._draft, self._rows = Step(0), Draft(torch.tensor([]), ()), list[Row]()  # the last step
        self._is_timed = False
        self._drafted = 0.0  # when its draft was done; 0 after its pass
        # The loop's seconds do not count the caller's time: less those of the clock, and when the last pass was done.
        self._offset = self._verified = 0.0

    def draft(self, context: Context, limits: Sequence[int]) -> Draft:
        rows, self._offset = len(limits), context.seconds - time.perf_counter()
        if context.rows[0] not in self._rows:  # there were other steps between
            self._verified = context.seconds
        step, self._is_timed = self.bandit.next_step(rows) if self._by_clock else Step(rows), self._by_clock
        if rows < len(context.filled):  # the pass reads prompts too
            step.speed, self._is_timed = Speed(), False
        self._step, self._draft, self._rows = step, Draft(context.newest, (0,) * rows), [*context.rows]
        if step.looks:
            self._find(context, limits)
            self._draft = self._best_draft(context, limits, step)
        step.verified, self._drafted = len(self._draft.tokens), time.perf_counter()
        return self._draft

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Learns from the acceptance of a row's drafts, and from the first row of a round how long the round took."""
        step = self._step
        if self._drafted:
            now, last = time.perf_counter(), self._verified
            self._verified, passed, self._drafted = now + self._offset, now - self._drafted, 0.0
            if self._is_timed:
                self.bandit.observe(step, self._verified - last, passed)
        step.speed.tokens += len(verified)
        for tokens, acceptance in self._found.pop(row, ()):  # the target's choice judges them, drafted or not
            pairs = list(zip(tokens, verified, strict=False))
            right = next((place for place, (token, chosen) in enumerate(pairs) if token != chosen), len(pairs))
            acceptance.observe(min(right + 1, len(pairs)), right)
        if step.arm is not None:
            step.arm.acceptance.observe(drafted, len(verified) - 1)
            self._drafters[step.arm.name].observe(row, drafted, verified)
            if self._draft.confidence:
                step.arm.calibration.observe(len(verified) - 1, self._draft.confidence)

    def _find(self, context: Context, limits: Sequence[int]) -> None:
        """What a grammar forces, else what followed in the row's own text and in earlier answers."""
        # Alone, a row's drafter runs through what is forced, and goes on after it.
        alone = len(limits) == 1 and self._reads_probs and bool(self._drafters)
        forced = [[] if alone else context.forced(index, limit) for index, limit in enumerate(limits)]
        self._source = "grammar" if any(forced) else "lookup"
        lookups = zip(self._lookup.find(context, limits), self._lookup.recall(context, limits), strict=True)
        for row, must, found in zip(context.rows, forced, lookups, strict=True):
            by_kind = [(tokens, self.bandit.lookup_acceptance(kind, evidence)) for kind, (tokens, evidence) in enumerate(found)]
            self._found[row] = [found for found in ([(must, self.bandit.forced)] if must else by_kind) if found[0]]

    def _best_draft(self, context: Context, limits: Sequence[int], step: Step) -> Draft:
        plan = self.bandit.plan(len(limits), min(map(len, context.ids)))
        looked_up, rate = self._looked_up(context.rows, plan.rate)
        if plan.arm is None or rate > plan.rate:
            return copied(context, looked_up, self._source)
        step.arm, by_ends = plan.arm, self._reads_probs and len(limits) == 1
        limits = limits if by_ends else [min(plan.length, limit) for limit in limits]
        started = time.perf_counter()
        if isinstance(drafter := self._drafters[plan.arm.name], ModelDrafter):
            limits = drafter.follow(context, limits)
            followed = time.perf_counter()  # which takes its time once for a text
            self._verified, started = self._verified + followed - started, followed
        draft = drafter.draft(context, limits, plan.ends if by_ends else DraftEnds())
        step.drafts, step.draft_seconds = max(draft.counts), time.perf_counter() - started
        return draft

    def _looked_up(self, rows: Sequence[Row], rate: float) -> tuple[list[list[int]], float]:
        """By row, as much of the best continuation as pays where other drafts give this rate; the rate that this promises."""
        passes, expected, drafts = self.bandit.passes, float(len(rows)), list[list[int]]()
        least = rate * passes.slope(len(rows))  # probability of a token that is worth its time
        for row in rows:
            draft, most = list[int](), 0.0
            for tokens, acceptance in self._found.get(row, ()):
                probability, later = acceptance.means()
                count, accepted = 0, 0.0
                while count < len(tokens) and probability > least:
                    count, accepted, probability = count + 1, accepted + probability, probability * later
                if accepted > most:
                    draft, most = tokens[:count], accepted
            drafts.append(draft)
            expected += most
        return drafts, expected / (passes.of(len(rows) + sum(map(len, drafts))) + self.bandit.rest)


_REMEMBERED: WeakKeyDictionary[Backend, dict[str, Bandit]] = WeakKeyDictionary()


def bandit_of(setup: DrafterSetup, drafters: Mapping[str, Drafting], remembered: bool) -> Bandit:
    """Of drafters by their names.

    `remembered`: with all that was learnt from the model's earlier outputs in this process. Otherwise every output starts from
    the profile, and from usual values for what that lacks.
    """
    model, config = setup.model, setup.config
    by_drafters = _REMEMBERED.setdefault(model, {}) if remembered else {}
    # Where logits are changed, drafts are no single calls of a kernel.
    key = f"{config.changes_logits} {config.num_draft_tokens} {', '.join(drafters)}"
    if key not in by_drafters:
        known, times = config.profile.passes, DraftTimes()
        passes = PassTimes.measured(known) if known else PassTimes.usual(model.row_cost, model.spec)
        tries = 0.0 if remembered else 1e9  # where nothing is measured, nothing is tried to be measured
        arms = {name: _arm(name, each, model, config.profile, passes, times, tries) for name, each in drafters.items()}
        by_drafters[key] = Bandit(passes, arms, config.num_draft_tokens)
    return by_drafters[key]


def _arm(
    name: str, drafter: Drafting, model: Backend, profile: DraftProfile, passes: PassTimes, times: DraftTimes, tries: float
) -> Arm:
    """With priors from the profile, and from the weights that a step reads."""
    spec = model.spec
    head = spec.vocab * spec.hidden / spec.weights_read(1)  # its share of the weights that a pass reads
    layer = (1 - head) / spec.layers
    if isinstance(drafter, ModelDrafter):
        kind, exit_layer, reach = DRAFT_MODEL, spec.layers, float(drafter.model.room)
        part = drafter.model.spec.weights_read(1) / spec.weights_read(1)
    else:
        kind, exit_layer, reach = drafter.weights or "", drafter.submodel.exit_layer, inf
        scored = 1.0 if drafter.vocabulary is None else drafter.vocabulary.count / spec.vocab
        part = (exit_layer + (drafter.submodel.block is not None)) * layer + head * scored
    is_exit = exit_layer < spec.layers
    known = profile.drafts if profile.passes else {}  # without both the units would differ
    steps = passes.part(known.get(name, part * passes.of(1) * _COPY_COST.get(kind, 1.0)), part)
    prior, strength = profile.acceptance.get(name), _STORED
    if prior is None:
        of_exit = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE) if is_exit else 1.0
        prior, strength = of_exit * _COPY_ACCEPTANCE.get(kind, 1.0), GUESS
    share = 1.0 if kind else 1 - exit_layer * layer  # the target goes on from the exit
    calibration = Calibration(*_CALIBRATIONS["" if is_exit else kind])
    return Arm(name, Acceptance(prior, prior, strength), steps, times, share, calibration, tries, reach)


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
