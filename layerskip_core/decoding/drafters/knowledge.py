"""Adaptive drafting's knowledge of a model: how often its drafters are right, and how long passes take.

The drafters are the arms of a bandit. An arm is judged by the upper end of the interval of its acceptance (UCB: Auer et al.,
2002), and one that was never tried by a shorter time than expected, so that it is tried. estimates.py has what is estimated.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import inf
from weakref import WeakKeyDictionary

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds
from .estimates import (
    NO_OTHERS,
    OUTLIER_FACTOR,
    PERIODS,
    STRENGTH,
    TIMES,
    Acceptance,
    Arm,
    Calibration,
    Pace,
    PassTimes,
    best_length,
)
from .exit import DRAFT_MODEL, ExitDrafter, ModelDrafter

Drafting = ExitDrafter | ModelDrafter

_MEASURED = 8.0  # observations that an acceptance counts as that was measured, on other texts
_DEVIATIONS = 1.0  # standard deviations between what is expected of an arm and what it is judged by
_UNTRIED = 0.5  # by so much more than 1 an arm that was never tried may be faster than expected; by less after each try

_EXIT_ACCEPTANCE = 0.85  # of a trained exit of which nothing is known
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92, DRAFT_MODEL: 0.75}  # of calibrated int4 weights
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # of a pass, over one by bf16 weights
# Doubt and power, see DraftEnds. Trained exits are calibrated, copies of all layers are underconfident.
_CALIBRATIONS = {"": (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3), DRAFT_MODEL: (1.0, 1)}
# Least evidence of a lookup; acceptance of its first token, and of further ones.
_LOOKUPS = ((0, 0.3, 0.5), (2, 0.5, 0.7), (3, 0.6, 0.7), (4, 0.75, 0.8), (8, 0.9, 0.9), (16, 0.95, 0.95))
# The same in earlier answers. A text that follows one of them for 64 tokens repeats it.
_ANSWER_LOOKUPS = ((0, 0.15, 0.6), (1, 0.4, 0.6), (3, 0.7, 0.6), (8, 0.85, 0.75), (16, 0.95, 0.85), (64, 0.97, 0.97))
_FORCED = 0.97, 0.99  # what a grammar forces can be spelled by other tokens
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
# One step in every `_PLAIN_EVERY` has no drafts, so that the time of such steps is known, and some of the first ones. Not the
# very first: a short output has few steps, and drafts usually pay.
_PLAIN_FIRST, _PLAIN_AT, _PLAIN_EVERY = (4, 12, 28, 60), 124, 128
# Where looking for drafts gained less than this over plain decoding lately, one step of so many looks for them: the fewer the
# more it loses.
_LOOKS, _LOOKS_ALONE = ((0.97, 16), (1.03, 4)), 4  # of several rows, and of one, whose text may soon be another
_DOUBTFUL, _DOUBTFUL_PLAIN_EVERY = 1.15, 8  # below this gain, one step of so many is plain, so that the gain is known well
_REST = 0.1  # of a pass: what the rest of a step may be if nothing is known of it
_FEW = 48  # tokens of a row, from steps that looked for drafts
_SETTLED, _COMPARED = 64, 8  # after so many choices, all arms are compared in one of so many


class Knowledge:
    """The estimates for one model. Times are in passes of one token, as the first one that was measured."""

    def __init__(self, passes: PassTimes, arms: dict[str, Arm]) -> None:
        self.passes, self.arms = passes, arms
        self._lookups = [  # in the row's own text, and in earlier answers
            [(least, Acceptance(first, later, _LOOKUP_STRENGTH)) for least, first, later in priors]
            for priors in (_LOOKUPS, _ANSWER_LOOKUPS)
        ]
        self.forced = Acceptance(*_FORCED, _MEASURED)  # of what a grammar forces
        self._pass_seconds: float | None = None
        self.rest = 0.0  # the time of a step that looks for drafts besides drafts and pass
        self._steps = self._choices = 0
        self._last: Arm | None = None  # that was chosen
        # By the number of binary digits of the rows, and whether steps looked for drafts: their tokens and seconds, which fade,
        # and all of their tokens.
        self._periods: dict[tuple[int, bool], list[float]] = {}

    def acceptance_of_lookup(self, evidence: int, in_answers: bool = False) -> Acceptance:
        """Of a continuation with this evidence, see `History.continuation`, in the row's own text or in earlier answers."""
        return next(acceptance for least, acceptance in reversed(self._lookups[in_answers]) if evidence >= least)

    def wants_plain_step(self, rows: int = 1) -> bool:
        """Whether this step should have no drafts: so that its time is known, or as they gain too little with so many rows.

        Counts the steps.
        """
        step, self._steps = self._steps, self._steps + 1
        gain = self._gain(rows)
        for below, every in _LOOKS:
            if gain < below:
                return step % (every if rows > 1 else _LOOKS_ALONE) > 0
        every, at = (_DOUBTFUL_PLAIN_EVERY, 4) if gain < _DOUBTFUL else (_PLAIN_EVERY, _PLAIN_AT)
        return step % every == at or step in _PLAIN_FIRST

    def observe_period(self, rows: int, looks: bool, tokens: int, seconds: float, in_passes: float = 0.0) -> None:
        """The whole of a step of so many rows. `looks`: whether the step looked for drafts.

        `in_passes`: the seconds of its drafts and of the target's pass.
        """
        if not looks or self._choices >= _SETTLED:  # the first tries of what does not pay say nothing of what is chosen later
            known = self._periods.setdefault((rows.bit_length(), looks), [0.0, 0.0, 0.0])
            known[:] = PERIODS * known[0] + tokens, PERIODS * known[1] + seconds, known[2] + tokens
        if looks and self._pass_seconds is not None:
            most = OUTLIER_FACTOR * self.rest + _REST * self.passes.of(1)  # a step that took longer was disturbed
            self.rest += TIMES * (min((seconds - in_passes) / self._pass_seconds, most) - self.rest)

    @property
    def _pace(self) -> float:
        """How long the target's passes take, over what was expected from the first that was measured."""
        return self.passes.of(1) / self.passes.of(1, at_first=True)

    def _gain(self, rows: int) -> float:
        """Tokens per second with about so many rows where steps look for drafts, over those of plain steps; inf if unknown."""
        looking, plain = (self._periods.get((rows.bit_length(), looks), [0.0, 0.0, 0.0]) for looks in (True, False))
        if looking[2] < _FEW * rows:
            return inf
        # No plain step measured yet: 1.0, which forces one.
        return looking[0] * plain[1] / (plain[0] * looking[1]) if plain[0] else 1.0

    def best_length(
        self, arm: Arm, rows: int, most: int, deviations: float = 0.0, others: tuple[float, int] = NO_OTHERS
    ) -> tuple[float, int]:
        """See `best_length`, by the mean acceptance of the arm, or the upper end of its interval of so many deviations."""
        step = arm.step(rows, self._pace)
        if deviations:
            step /= 1 + _UNTRIED / (1 + arm.tries + arm.pace.tries / STRENGTH)
        chances = arm.acceptance.chances(deviations)
        rest = self.rest + arm.pace.each
        found = best_length(chances, step, self.passes, most, arm.ahead, arm.share, rows, others, arm.length, rest)
        arm.length = found[1]
        return found

    def choose(
        self, rate: float, most: int, rows: int, mixed: tuple[int, tuple[float, int]] | None = None, shortest: int = 0
    ) -> tuple[Arm, bool] | None:
        """The arm that may give the most tokens per unit of time, if more than `rate`, for all `rows`; or, and then True, for
        some of them, as `mixed` says, while the others look up. A drafter whose states the target goes on from needs all rows.
        `shortest`: tokens of the shortest text, which the arm must reach.
        """
        best = None
        self._choices += 1
        last = self._last if self._choices > _SETTLED and self._choices % _COMPARED else None
        for arm in self.arms.values() if last is None else [last]:
            arm.fade(self._choices)
            if shortest >= arm.reach:
                continue
            plans = [(rows, NO_OTHERS)] if mixed is None or arm.share < 1 else [(rows, NO_OTHERS), mixed]
            for count, others in plans:
                promised, _ = self.best_length(arm, count, most, _DEVIATIONS, others)
                if promised > rate:
                    rate, best = promised, (arm, others is not NO_OTHERS)
        if last is None:
            self._last = None if best is None else best[0]
        if best is not None:
            best[0].last_choice = self._choices
        return best

    def ends(self, arm: Arm, rate: float, length: int) -> DraftEnds:
        """Where the probability of all drafts so far is so low that one more does not pay at this rate. For one row."""
        cost = rate * (arm.step(1, self._pace) + arm.share * self.passes.slope(length + 1))  # in tokens
        gain = arm.acceptance.chances()[1]
        survival = cost / gain if cost < gain else 1.0
        return DraftEnds(survival=survival, doubt=arm.calibration.doubt, power=arm.calibration.power)

    def observe_round(
        self, arm: Arm | None, rows: int, drafted: int, tokens: int, draft_seconds: float, verify_seconds: float
    ) -> None:
        """`rows` got `drafted` tokens each by this arm; then a pass over `tokens` verified."""
        share = 1.0 if arm is None else arm.share
        expected = self.passes.of(tokens)
        if self._pass_seconds is None:
            self._pass_seconds = verify_seconds / (share * expected)
        verify_time = verify_seconds / self._pass_seconds
        if share == 1:
            self.passes.observe(tokens, verify_time)
        if arm is not None and drafted:
            arm.observe_times(rows, drafted, draft_seconds / self._pass_seconds, verify_time, expected)


_REMEMBERED: WeakKeyDictionary[Backend, dict[str, Knowledge]] = WeakKeyDictionary()


def knowledge_of(
    model: Backend, drafters: Mapping[str, Drafting], profile: DraftProfile, remembered: bool, kind: str = "plain"
) -> Knowledge:
    """What is known of drafters by their names.

    `remembered`: with all that was learnt from the model's earlier outputs in this process. Otherwise every output starts from
    the profile, and from usual values for what that lacks. `kind`: of drafts, whose times differ.
    """
    by_drafters = _REMEMBERED.setdefault(model, {}) if remembered else {}
    key = ", ".join((kind, *drafters))
    if key not in by_drafters:
        by_drafters[key] = _at_first(model, drafters, profile, remembered)
    return by_drafters[key]


def _at_first(model: Backend, drafters: Mapping[str, Drafting], profile: DraftProfile, measures: bool) -> Knowledge:
    """`measures`: whether times will be measured; else those that are known count as if they were."""
    spec = model.spec
    head = spec.vocab * spec.hidden / spec.weights_read(1)  # its share of the weights that a pass reads
    layer = (1 - head) / spec.layers
    passes = PassTimes(1.0, 0.0, profile.passes or PassTimes.usual(model.row_cost, spec))
    arms: dict[str, Arm] = {}
    paces = defaultdict[str, Pace](Pace)
    for name, drafter in drafters.items():
        known = profile.drafts if profile.passes else {}  # without both the units would differ
        if isinstance(drafter, ModelDrafter):
            kind, exit_layer, reach = DRAFT_MODEL, spec.layers, float(drafter.model.room)
            part = drafter.model.spec.weights_read(1) / spec.weights_read(1)
        else:
            kind, exit_layer, reach = drafter.weights or "", drafter.submodel.exit_layer, inf
            scored = 1.0 if drafter.vocabulary is None else drafter.vocabulary.count / spec.vocab
            part = (exit_layer + (drafter.submodel.block is not None)) * layer + head * scored
        is_exit = exit_layer < spec.layers
        steps = passes.of_part(known.get(name, part * passes.of(1) * _COPY_COST.get(kind, 1.0)), part)
        acceptance, strength = profile.acceptance.get(name), _MEASURED
        if acceptance is None:
            of_exit = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE) if is_exit else 1.0
            acceptance, strength = of_exit * _COPY_ACCEPTANCE.get(kind, 1.0), STRENGTH
        calibration = Calibration(*_CALIBRATIONS["" if is_exit else kind])
        share = 1.0 if kind else 1 - exit_layer * layer  # the target goes on from the exit
        pace, tries = paces[kind if exit_layer else name], 0.0 if measures else inf
        known_acceptance = Acceptance(acceptance, acceptance, strength)
        arms[name] = Arm(name, known_acceptance, steps, pace, share, calibration, tries, reach)
    return Knowledge(passes, arms)
