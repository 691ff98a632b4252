"""Before every round, chooses the drafter and the draft length with the most expected tokens per
second, or plain decoding.

DEL (Zarch et al., COLM 2025) chooses exit and length by measured acceptance; SpecDec++ (Huang et
al., 2024) ends a draft that will probably be rejected. We compare measured step times instead of
layers. Acceptance rates come from verified drafts: nothing is computed for the choice alone.
"""

from collections.abc import Hashable, Mapping, Sequence
from math import inf
from weakref import WeakKeyDictionary

from ...config.decoding import DecodingConfig, DraftProfile
from ...model.backend import Backend, DraftBlock, Submodel
from ..row import Row
from ..sampling import truncates
from .bandit import GUESS, Acceptance, Arm, Bandit, Calibration, PassTimes, Step
from .draft_model import DRAFT_MODEL, ModelDrafter
from .lookup import SHORTEST
from .lookup_drafter import LookupDrafter, copied
from .protocol import Draft, DrafterSetup, DraftInput
from .submodel import SubmodelDrafter, drafter_name

Drafting = SubmodelDrafter | ModelDrafter
Bandits = dict[Hashable, Bandit]

_FORCED = 64  # evidence of tokens that a grammar forces; others may spell the same text
_STORED = 8.0  # drafts that a stored acceptance rate, measured on other texts, counts as
_EXIT_ACCEPTANCE = 0.85  # prior of a trained exit without a stored rate
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92, DRAFT_MODEL: 0.75}  # priors; int4 is calibrated
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # time of a step over that with bf16 weights
# Priors of doubt and power, see DraftEnds: trained exits are calibrated, whole copies are
# underconfident.
_CALIBRATIONS = {"": (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3), DRAFT_MODEL: (1.0, 1)}


class AdaptiveDrafter:
    """Drafts by lookups, exits, low-bit copies, a draft model or not at all, by the most expected
    tokens per second.

    Step times are measured while decoding if the choice cannot change the output; otherwise they
    are the profile's.
    """

    def __init__(self, setup: DrafterSetup, drafters: dict[str, Drafting]) -> None:
        """`drafters`: by name in reports."""
        self._setup = setup
        self._drafters = drafters
        # Other devices run drafts asynchronously: reading their probabilities would wait
        self._reads_probs = setup.model.device.type == "cpu"
        self._by_clock = self._reads_probs and setup.model.batch_invariant
        # Times are learned for all texts of the model in this process. Otherwise every output
        # starts from the profile, or from usual values where that has none
        self._bandits: Bandits = {}
        if self._by_clock:
            self._bandits = _REMEMBERED.setdefault(setup.model, {})
        self.bandit = self._bandit_for([setup.config])  # of the last step
        shortest = setup.config.lookup or SHORTEST
        self._lookup = LookupDrafter(shortest, earlier=setup.earlier)
        # By row, the lookups of this step, each with the acceptance rate of lookups with as much
        # evidence
        self._found: dict[Row, list[tuple[list[int], Acceptance]]] = {}
        self._source = "lookup"  # or grammar
        self._step = Step(0)  # the last, and its rows
        self._rows = list[Row]()
        self._probs: Sequence[float] = ()  # of its drafts
        # When it began, in the loop's seconds, without the caller's time; None: it is not timed
        self._begun: float | None = None

    def draft(self, given: DraftInput, limits: Sequence[int]) -> Draft:
        # Without one of its rows other steps ran in between
        if self._begun is not None and given.rows[0] in self._rows:
            self.bandit.observe(self._step, given.seconds - self._begun)
        newly_committed = self._step.verified  # at most
        self.bandit = self._bandit_for([row.config for row in given.rows])
        count = len(limits)
        step = Step(count)
        self._begun = None
        if self._by_clock:
            step = self.bandit.next_step(count)
            has_prefill = count < len(given.num_computed_tokens)
            if not has_prefill:
                self._begun = given.seconds
        self._step = step
        self._rows = [*given.rows]
        draft = Draft(given.newest, (0,) * count)
        if step.looks_up:
            self._find(given, limits)
        if step.looks_up or step.tries_arms:
            waiting = sum(given.cache.num_unwritten)
            draft = self._best_draft(given, limits, step)
            if waiting - sum(given.cache.num_unwritten) > newly_committed:
                # A block that was off wrote KV entries of earlier steps: later drafts will not
                self._begun = None
        step.verified = len(draft.tokens)
        self._probs = draft.confidence
        return draft

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Updates acceptance rates by the verified tokens of a row."""
        step = self._step
        step.tokens += len(verified)
        for tokens, acceptance in self._found.pop(row, ()):  # judged even if not drafted
            tested = min(len(tokens), len(verified))
            right = 0
            while right < tested and tokens[right] == verified[right]:
                right += 1
            acceptance.observe(min(right + 1, tested), right)
        if step.arm is not None:
            step.arm.acceptance.observe(drafted, len(verified) - 1)
            self._drafters[step.arm.name].observe(row, drafted, verified)
            if self._probs:
                step.arm.calibration.observe(len(verified) - 1, self._probs)

    def _bandit_for(self, configs: Sequence[DecodingConfig]) -> Bandit:
        """The bandit for rows of these settings.

        With changed logits, or some left out, a draft is no single call of a kernel, and has other
        times; hot samples are harder to draft. Few temperatures, because clients may send any.
        """
        is_call = True
        for config in configs:
            if config.changes_logits or (config.temperature and truncates(config)):
                is_call = False
        hottest = max(config.temperature for config in configs)
        most = self._setup.config.num_draft_tokens
        key = is_call, min(round(hottest, 1), 2.0), most, *self._drafters
        if key not in self._bandits:
            self._bandits[key] = new_bandit(self._setup, self._drafters)
        return self._bandits[key]

    def _find(self, given: DraftInput, limits: Sequence[int]) -> None:
        """Collects the tokens that a grammar forces, else lookups in the row's own text and in
        earlier answers.
        """
        # For a single row the drafter adds forced tokens itself, and drafts on after them
        drafter_forces = len(limits) == 1 and self._reads_probs and bool(self._drafters)
        own = self._lookup.find(given, limits)
        recalled = self._lookup.recall(given, limits)
        self._source = "lookup"
        for index, (row, limit) in enumerate(zip(given.rows, limits, strict=True)):
            of_own, of_answers = own[index], recalled[index]
            forced = list[int]()
            if not drafter_forces:
                forced = given.forced(index, limit)
            if forced:
                self._source = "grammar"
                of_own = [], 0
                of_answers = forced, _FORCED  # counts as a very long match
            found = self._found[row] = []
            for is_recalled, (ids, evidence) in enumerate((of_own, of_answers)):
                if ids:
                    acceptance = self.bandit.lookup_acceptance(bool(is_recalled), evidence)
                    found.append((ids, acceptance))

    def _best_draft(self, given: DraftInput, limits: Sequence[int], step: Step) -> Draft:
        # A draft of one row can end at any token, by the probabilities of its tokens
        ends_by_probs = len(limits) == 1 and self._reads_probs
        step.found = ends_by_probs and any(self._found.values())
        plan = self.bandit.without_arm(len(limits))
        if step.tries_arms:
            plan = self.bandit.plan(len(limits), min(map(len, given.ids)), step.found)
        looked_up, rate = self._looked_up(given.rows, plan.rate)
        if plan.arm is None or rate > plan.rate:
            return copied(given, looked_up, self._source)
        step.arm = plan.arm
        drafter = self._drafters[plan.arm.name]
        if ends_by_probs:
            draft = drafter.draft(given, limits, plan.ends)
        else:
            draft = drafter.draft(given, [min(plan.length, limit) for limit in limits])
        step.drafts = max(draft.counts)
        return draft

    def _looked_up(self, rows: Sequence[Row], rate: float) -> tuple[list[list[int]], float]:
        """By row, the part of the best lookup that pays if other drafts give `rate` tokens per
        second; and the rate with it.
        """
        passes = self.bandit.passes
        expected = float(len(rows))
        num_drafts = 0
        drafts = list[list[int]]()
        least = rate * passes.slope(len(rows))  # least probability of a draft that pays
        for row in rows:
            draft = list[int]()
            most = 0.0
            for tokens, acceptance in self._found.get(row, ()):
                probability, later = acceptance.means()
                count = 0
                accepted = 0.0
                while count < len(tokens) and probability > least:
                    count += 1
                    accepted += probability
                    probability *= later
                if accepted > most:
                    draft = tokens[:count]
                    most = accepted
            drafts.append(draft)
            expected += most
            num_drafts += len(draft)
        return drafts, expected / passes.time_of(len(rows) + num_drafts)


# By model, then by what else a bandit depends on
_REMEMBERED: WeakKeyDictionary[Backend, Bandits] = WeakKeyDictionary()


def new_bandit(setup: DrafterSetup, drafters: Mapping[str, Drafting]) -> Bandit:
    """A bandit over these drafters, by name, that knows the profile."""
    model = setup.model
    profile = setup.config.profile
    passes = PassTimes.usual(model.row_cost, model.spec)
    if profile.passes:
        passes = PassTimes.measured(profile.passes)
    arms = {name: _arm(name, each, model, profile, passes) for name, each in drafters.items()}
    return Bandit(passes, arms, setup.config.num_draft_tokens)


def _arm(
    name: str, drafter: Drafting, model: Backend, profile: DraftProfile, passes: PassTimes
) -> Arm:
    """Priors are from the profile, else from the weights that a step reads."""
    spec = model.spec
    # Its share of the weights that a pass reads
    head = spec.vocab * spec.hidden / spec.weights_read(1)
    layer = (1 - head) / spec.layers
    if isinstance(drafter, ModelDrafter):
        kind = DRAFT_MODEL
        exit_layer = spec.layers
        max_text = float(drafter.model.context_length())
        row_cost = drafter.model.spec.weights_read(1) / spec.weights_read(1)
    else:
        kind = drafter.weights or ""
        exit_layer = drafter.submodel.exit_layer
        max_text = inf
        scored = 1.0  # share of the vocabulary
        if drafter.vocabulary is not None:
            scored = drafter.vocabulary.count / spec.vocab
        row_cost = (exit_layer + (drafter.submodel.block is not None)) * layer + head * scored
    is_exit = exit_layer < spec.layers
    # Times of drafts and passes need one unit
    measured = profile.drafts if profile.passes else {}
    step = measured.get(name, row_cost * passes.time_of(1) * _COPY_COST.get(kind, 1.0))
    prior = profile.acceptance.get(name)
    strength = _STORED
    if prior is None:
        prior = 1.0
        if is_exit:
            prior = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE)
        prior *= _COPY_ACCEPTANCE.get(kind, 1.0)
        strength = GUESS
    # The target continues from the exit of its own weights
    target_share = 1.0 if kind else 1 - exit_layer * layer
    calibration = Calibration(*_CALIBRATIONS["" if is_exit else kind])
    acceptance = Acceptance(prior, strength)
    return Arm(name, acceptance, step, row_cost, target_share, calibration, max_text, not is_exit)


def drafter(setup: DrafterSetup) -> AdaptiveDrafter:
    """Over the trained exits, low-bit copies of them and of all layers, drafters beside the model,
    and a draft model.
    """
    model = setup.model
    config = setup.config
    drafters: dict[str, Drafting] = {}
    if model.draft_model is not None:
        drafters[DRAFT_MODEL] = ModelDrafter(setup)
    blocks = list[DraftBlock]()
    for exit_layer, exit_block in model.exit_blocks.items():
        if exit_layer in config.exits:
            blocks.append(exit_block)
    for name, block in model.drafters.items():
        blocks.append(block)
        drafters[name] = SubmodelDrafter(setup, None, Submodel(0, block=block), name)
    tapped = sorted({tap for block in blocks for tap in block.taps})
    for weights, side in model.draft_sides.items():
        exits = [
            exit_layer
            for exit_layer in config.exits
            if exit_layer < model.num_layers and exit_layer <= side.num_layers
        ]
        if weights is not None and (side.num_layers == model.num_layers or not exits):
            exits.append(side.num_layers)
        for exit_layer in exits:
            taps = list[int]()  # which the target does not need to run again for their blocks
            if side.shares_states:
                taps = [lower for lower in tapped if 0 < lower < exit_layer]
            submodel = Submodel(exit_layer, taps=tuple(taps))
            name = drafter_name(weights, exit_layer, model.num_layers)
            drafters[name] = SubmodelDrafter(setup, weights, submodel, name)
    return AdaptiveDrafter(setup, drafters)
