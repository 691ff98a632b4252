"""The choice of adaptive drafting: measured step times, average acceptance rates, and the expected
tokens per second by both.

Drafters are the arms of a bandit. They are compared at the upper ends of the intervals of their
acceptance rates (UCB: Auer et al., 2002), so that uncertain ones are tried.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import accumulate
from math import hypot, inf, log2, sqrt

from ...model.backend import DraftEnds
from ...model.spec import AnySpec

GUESS = 4.0  # drafts that a guessed acceptance rate counts as
_MEMORY = 0.995  # decay of acceptance counts per new draft
# Decay of an arm per choice without it; tries below which its times are dropped
_UNUSED = 0.999
_FORGOTTEN = 0.5
_RECENT = 0.97  # decay of earlier steps per new one
# Above 1: on texts unlike those of its training a drafter's probabilities are too high
_MOST_DOUBT = 16.0
_NEW = 0.1  # weight of a new time in a table of times
# Times over this multiple of the expected one were disturbed, and count as that
_OUTLIER_FACTOR = 2.0
_GUESSED = 0.7  # prior time of a copy's draft over one without lookups to verify
# Share of time for trying each slower source of drafts
_EXPLORED = 0.005
_FEW = 8  # first steps or tries, which do not count
_FEWEST_STEPS, _MOST_STEPS = 16, 256  # between two tries: texts change
_COMPARED = 8  # choices between comparisons of all arms; fewer at first
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # draft lengths that are compared
_POWERS = 11  # of 2 in a table of times
# Acceptance rates of lookups by the bit length of their evidence, in the row's own text and in
# earlier answers: priors.
_LOOKUPS = (0.3, 0.3, 0.4, 0.55, 0.75, 0.9), (0.15, 0.4, 0.7, 0.7, 0.85, 0.95, 0.95, 0.97)
_LOOKUP_STRENGTH = 2.0  # of these priors: low, because texts differ
_AHEAD = 8  # tokens over which the slope is averaged


class Acceptance:
    """Acceptance rates of the first draft of a round, and of later ones whose predecessors were
    accepted.

    Exponentially weighted, with a prior that counts as `strength` drafts.
    """

    def __init__(self, prior: float, strength: float = GUESS) -> None:
        self._prior = prior
        self._strength = strength
        self._tested = [0.0, 0.0]
        self._accepted = [0.0, 0.0]

    def means(self, at_best: bool = False) -> tuple[float, float]:
        """The rates of first and later drafts; `at_best`: upper ends of intervals of a standard
        deviation (Wilson, 1927).
        """
        rates = []
        for tested, accepted in zip(self._tested, self._accepted, strict=True):
            count = tested + self._strength
            right = accepted + self._strength * self._prior
            rate = right / count
            if at_best:
                rate = (right + 0.5 + sqrt(right * (1 - rate) + 0.25)) / (count + 1)
            rates.append(rate)
        return rates[0], rates[1]

    def observe(self, drafted: int, accepted: int) -> None:
        """Counts a draft of `drafted` tokens: the first `accepted` were right, the next, if any,
        was wrong.
        """
        tested = min(accepted + 1, drafted)
        self._add(0, min(tested, 1), min(accepted, 1))
        self._add(1, tested - 1, accepted - 1)

    def _add(self, index: int, tested: int, accepted: int) -> None:
        if tested > 0:
            decay = _MEMORY**tested
            self._tested[index] = decay * self._tested[index] + tested
            self._accepted[index] = decay * self._accepted[index] + accepted

    def fade(self, kept: float) -> None:
        """Moves the rates towards the priors."""
        self._tested = [kept * tested for tested in self._tested]
        self._accepted = [kept * accepted for accepted in self._accepted]


def expected_accepted(means: tuple[float, float], drafts: float) -> float:
    """a + a a' + ..., for the rates a of the first draft and a' of later ones (Leviathan et al.,
    2023, section 3.1).
    """
    first, later = means
    if later >= 1:
        return first * drafts
    accepted: float = first * (1 - later**drafts) / (1 - later)
    return accepted


class PassTimes:
    """Step times by number of tokens: a monotone table at powers of 2, interpolated linearly.

    A pass of few tokens waits for memory and one of many for arithmetic, so no single line fits.
    The first measurement sets the unit. Each moves all entries by its relative error, distant ones
    less: unmeasured entries keep the prior's shape.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = list(accumulate((prior(1 << power) for power in range(_POWERS)), max))
        self._times = list(self._prior)
        self.is_measured = False

    @classmethod
    def measured(cls, times: Sequence[float]) -> "PassTimes":
        """From the times of passes of 1, 2, ... tokens, extrapolated by a line. On a GPU the last
        may be below the first.
        """
        each = max(times[-1] - times[0], 0.0) / max(len(times) - 1, 1)

        def time_of(n: int) -> float:
            if n <= len(times):
                return times[n - 1]
            return times[0] + each * (n - 1)

        return cls(time_of)

    @classmethod
    def usual(cls, row_cost: float, spec: AnySpec) -> "PassTimes":
        """In passes of one token. With experts, more tokens read more weights."""
        one = hypot(1.0, row_cost)
        return cls(lambda n: hypot(spec.weights_read(n) / spec.weights_read(1), row_cost * n) / one)

    def time_of(self, n: int) -> float:
        power = max(0, (n - 1).bit_length() - 1)
        below = min(power, _POWERS - 2)
        low = self._times[below]
        start = 1 << below
        return low + (self._times[below + 1] - low) * (n - start) / start

    def slope(self, n: int) -> float:
        """The time of one more token."""
        return (self.time_of(n + _AHEAD) - self.time_of(n)) / _AHEAD

    @property
    def measured_over_prior(self) -> float:
        """Of the time of one token."""
        return self._times[0] / self._prior[0]

    def observe(self, n: int, seconds: float, usual: float = inf) -> None:
        """`usual`: the expected unit, if known."""
        if not self.is_measured:
            unit = min(seconds / self.time_of(n), _OUTLIER_FACTOR * usual)
            self._times = [unit * time for time in self._prior]
            self.is_measured = True
        error = min(seconds / self.time_of(n), _OUTLIER_FACTOR) - 1
        longest = 0.0
        for power, weight in enumerate(_weights(n)):
            longest = max(longest, self._times[power] * (1 + error * _NEW * weight))
            self._times[power] = longest


@lru_cache(256)
def _weights(n: int) -> list[float]:
    """The weight of a measurement of n tokens at each power of 2."""
    return [2.0 ** (-abs(log2(n) - power) / 2) for power in range(_POWERS)]


class Calibration:
    """Maps a drafter's probability p of its draft to the probability of rejection, doubt * (1 -
    p)^power.
    """

    def __init__(self, doubt: float, power: int) -> None:
        self.doubt = doubt
        self.power = power
        self._rejected = GUESS * doubt
        self._doubted = GUESS

    def observe(self, accepted: int, probs: Sequence[float]) -> None:
        """Counts drafts with these probabilities: the first `accepted` were right, the next, if
        any, was wrong.
        """
        tested = probs[: accepted + 1]
        power = self.power
        kept = _MEMORY ** len(tested)
        self._rejected = kept * self._rejected + (len(tested) > accepted)
        self._doubted = kept * self._doubted + sum([(1 - prob) ** power for prob in tested])
        self.doubt = min(self._rejected / max(self._doubted, 1e-9), _MOST_DOUBT)


@dataclass(eq=False)
class Arm:
    """A drafter and its statistics."""

    name: str
    acceptance: Acceptance
    step: float  # prior time of a draft of one row
    row_cost: float  # of more rows, over their cost in the target
    target_share: float  # of the target's pass that is left to verify its drafts
    calibration: Calibration
    max_text: float = inf  # tokens of a text below which it can draft
    verifies_lookups: bool = False  # while it drafts for one row
    tries: float = 0.0  # decayed
    measured_over_prior: float = 1.0  # its times, relative to the target's


@dataclass(frozen=True)
class Plan:
    """The drafter of the next steps of so many rows: `length` drafts each, or for one row as many
    as `ends` permits.
    """

    arm: Arm | None
    length: int
    ends: DraftEnds
    rate: float  # expected tokens per second, at best
    chosen_at: int  # index of the choice


class Source(Enum):
    """What a step verified."""

    PLAIN = auto()  # no drafts
    LOOKUPS = auto()  # and what a grammar forces
    ARM = auto()


@dataclass
class Speed:
    """Decayed totals of steps of one source, with about so many rows."""

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    since: int = 0  # steps since the last of this source

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def is_due(self, faster: float) -> bool:
        """Whether to try it again where others give so many tokens per second: the slower it is,
        the less often.
        """
        every = (faster / self.rate - 1) / _EXPLORED
        return self.since >= min(max(every, _FEWEST_STEPS), _MOST_STEPS)

    def pays(self, plain: "Speed") -> bool:
        """Whether it is no slower than plain steps, or not known, or due."""
        return self.steps < _FEW or self.rate >= plain.rate or self.is_due(plain.rate)

    def add(self, tokens: int, seconds: float) -> None:
        self.steps = _RECENT * self.steps + 1
        self.tokens = _RECENT * self.tokens + tokens
        self.seconds = _RECENT * self.seconds + seconds
        self.since = 0


@dataclass
class Step:
    """One step of the decoding loop."""

    rows: int
    looks_up: bool = True
    tries_arms: bool = True
    found: bool = False  # lookups, for a single row
    arm: Arm | None = None  # the drafter
    drafts: int = 0  # most of a row
    verified: int = 0  # tokens of the target's pass
    tokens: int = 0  # new ones


class Bandit:
    """Statistics of a model and its drafters, and the choice between them."""

    def __init__(self, passes: PassTimes, arms: Mapping[str, Arm], most: int) -> None:
        """`passes`: times of steps without an arm. `most`: drafts of a row."""
        self.passes = passes
        self.arms = arms
        self._lookups = list[list[Acceptance]]()
        for priors in _LOOKUPS:
            self._lookups.append([Acceptance(prior, _LOOKUP_STRENGTH) for prior in priors])
        self._lengths = (*(length for length in _LENGTHS if length < most), most)
        # By bit length of the number of rows
        self._speeds = defaultdict[tuple[int, Source], Speed](Speed)
        self._times: dict[tuple[Arm, int], PassTimes] = {}  # see `times`
        # By rows, and whether a single row has lookups
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._choices = 0  # steps so far, plain ones included
        self._compared = 0  # the same at the last comparison

    def lookup_acceptance(self, recalled: bool, evidence: int) -> Acceptance:
        """Of lookups with about so much evidence, see `History.continuation`, in the row's text or
        in earlier answers.
        """
        by_evidence = self._lookups[recalled]
        return by_evidence[min(evidence.bit_length(), len(by_evidence) - 1)]

    def times(self, arm: Arm, rows: int, found: bool) -> PassTimes:
        """Its step times by drafts per row plus one; in units of the target's prior until
        measured.
        """
        verifies = found and arm.verifies_lookups
        key = arm, 0 if verifies else rows.bit_length()
        times = self._times.get(key)
        if times is None:
            passes = self.passes
            scale = passes.measured_over_prior
            num_extra = int(arm.target_share < 1)
            step = arm.step + arm.row_cost * (passes.time_of(rows) - passes.time_of(1)) / scale
            if verifies:
                step *= _GUESSED
            times = PassTimes(
                lambda n: (
                    (n - 1 + num_extra) * step + arm.target_share * passes.time_of(rows * n) / scale
                )
            )
            self._times[key] = times
        return times

    def unit(self, arm: Arm, times: PassTimes) -> float:
        if times.is_measured:
            return 1.0
        return arm.measured_over_prior * self.passes.measured_over_prior

    def next_step(self, rows: int) -> Step:
        """A step that looks for drafts where they pay, and now and then elsewhere, to compare.

        Each source is judged by the steps that had its drafts, against plain ones: so a bad
        drafter does not hide what lookups gain. The first step is plain: it sets the unit of times.
        """
        plain, lookups, arms = (self._speeds[rows.bit_length(), source] for source in Source)
        for speed in (plain, lookups, arms):
            speed.since += 1
        step = Step(rows, looks_up=False, tries_arms=False)
        known = [each.rate for each in (lookups, arms) if each.steps >= _FEW]
        if plain.steps and not (known and plain.is_due(max(known))):
            step.looks_up = lookups.pays(plain)
            step.tries_arms = arms.pays(plain)
        if not step.tries_arms:
            self._choices += 1
        return step

    def observe(self, step: Step, seconds: float) -> None:
        """Records the time of a step."""
        arm = step.arm
        if arm is None:
            self.passes.observe(step.verified, seconds)
        else:
            if arm.tries:  # the first draft may be slow
                times = self.times(arm, step.rows, step.found)
                scale = self.passes.measured_over_prior
                times.observe(step.drafts + 1, seconds, arm.measured_over_prior * scale)
                arm.measured_over_prior = times.measured_over_prior / scale
            arm.tries = min(arm.tries + 1, _FEW)
        source = Source.PLAIN
        if arm is not None:
            source = Source.ARM
        elif step.verified > step.rows:
            source = Source.LOOKUPS
        if arm is None or arm.tries >= _FEW:
            speed = self._speeds[step.rows.bit_length(), source]
            speed.add(step.tokens, seconds)
            plain = self._speeds[step.rows.bit_length(), Source.PLAIN]
            if speed is not plain and step.tokens * plain.seconds > seconds * plain.tokens:
                speed.since = _MOST_STEPS  # it gained: try it again

    def plan(self, rows: int, shortest: int, found: bool) -> Plan:
        """For so many rows, the shortest of `shortest` tokens. `found`: lookups in the text of a
        single row.
        """
        self._choices += 1
        plan = self._plans.get((rows, found))
        due = plan is None or self._choices - plan.chosen_at >= min(
            _COMPARED, plan.chosen_at // _COMPARED
        )
        if plan is None or due or (plan.arm is not None and shortest >= plan.arm.max_text):
            plan = self._plans[rows, found] = self._best_plan(rows, shortest, found)
        return plan

    def without_arm(self, rows: int) -> Plan:
        """Plain steps, or lookups."""
        return Plan(None, 0, DraftEnds(), rows / self.passes.time_of(rows), self._choices)

    def _best_plan(self, rows: int, shortest: int, found: bool) -> Plan:
        best = None
        plain = self.without_arm(rows)
        rate = plain.rate
        for arm in self.arms.values():
            if shortest < arm.max_text:
                bound, _ = self.best_length(arm, rows, found, at_best=True)
                if bound > rate:
                    best = arm
                    rate = bound
        kept = _UNUSED ** (self._choices - self._compared)
        self._compared = self._choices
        for arm in self.arms.values():  # older statistics are of other text, or disturbed times
            if arm is not best:
                arm.acceptance.fade(kept)
                arm.tries *= kept
                if 0 < arm.tries < _FORGOTTEN:
                    arm.tries = 0.0
                    arm.measured_over_prior = 1.0
                    self._times = {
                        key: times for key, times in self._times.items() if key[0] is not arm
                    }
        if best is None:
            return plain
        expected, length = self.best_length(best, rows, found)
        return Plan(best, length, self._ends(best, found, expected, length), rate, self._choices)

    def best_length(
        self, arm: Arm, rows: int, found: bool = False, at_best: bool = False
    ) -> tuple[float, int]:
        """The most expected tokens per second by draft length, `at_best` at the upper acceptance
        rates; and the length.
        """
        means = arm.acceptance.means(at_best)
        times = self.times(arm, rows, found)
        best = 0.0
        length = 0
        for drafts in self._lengths:
            rate = rows * (1 + expected_accepted(means, drafts)) / times.time_of(drafts + 1)
            if rate <= best:
                break
            best = rate
            length = drafts
        return best / self.unit(arm, times), length

    def _ends(self, arm: Arm, found: bool, rate: float, length: int) -> DraftEnds:
        """Ends a draft of one row where the probability that it is accepted whole is too low for
        one more to pay at `rate`.

        One more takes the mean time of the last drafts up to `length`: times of longer ones are
        never measured.
        """
        times = self.times(arm, 1, found)
        shorter = max((other for other in self._lengths if other < length), default=0)
        seconds = (times.time_of(length + 1) - times.time_of(shorter + 1)) / (length - shorter)
        cost = rate * self.unit(arm, times) * seconds
        survival = min(cost / max(arm.acceptance.means()[1], 1e-9), 1.0)
        return DraftEnds(
            survival=survival, doubt=arm.calibration.doubt, power=arm.calibration.power
        )
