"""What adaptive drafting chooses by: a table of measured times, averages of acceptance, and expected tokens per second by both.

Drafters are the arms of a bandit. An arm is judged by the upper end of what its acceptance may be (UCB: Auer et al., 2002), so
that it is tried.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, hypot, inf, log2, sqrt

from ...model.backend import DraftEnds
from ...model.spec import AnySpec

GUESS = 4.0  # drafts that a guessed acceptance counts as
_MEMORY = 0.995  # weight of what was known of acceptance, per new draft
_UNUSED, _FORGOTTEN = 0.999, 0.5  # weight of what is known of an arm, per step without it; tries whose times are forgotten
_RECENT = 0.97  # weight of the steps that were known, per new one
_NEW = 0.1  # weight of a new time in a table
_OUTLIER_FACTOR = 2.0  # a time that is longer than expected by more was disturbed, and counts as this much
_GUESSED = 0.7  # of its time takes a copy, where what it looks up may be right, until that is measured
_EXPLORED = 0.005  # what steps that look for drafts, or plain ones, may cost where the others give more
_FEW = 8  # steps or tries that say nothing of later ones
_COMPARED = 8  # arms are compared in one of so many choices, at first in each
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of drafts, that are compared
_POWERS = 11  # of 2, whose passes have known times
# Acceptance of lookups by the binary digits of their evidence: in the row's own text, and in earlier answers.
_LOOKUPS = (0.3, 0.3, 0.4, 0.55, 0.75, 0.9), (0.15, 0.4, 0.7, 0.7, 0.85, 0.95, 0.95, 0.97)
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
_AHEAD = 8  # tokens over which the time of one more is averaged


class Acceptance:
    """The probability that a draft is accepted if all before it were: of the first draft of a round, and of later ones.

    Averages in which newer drafts count more, and a prior as `strength` drafts.
    """

    def __init__(self, first: float, later: float, strength: float = GUESS) -> None:
        self._priors, self._strength = (first, later), strength
        self._tested, self._accepted = [0.0, 0.0], [0.0, 0.0]

    def means(self, at_best: bool = False) -> tuple[float, float]:
        """Of first and later drafts; `at_best`: the upper ends of their intervals of a standard deviation (Wilson, 1927)."""
        found = []
        for tested, accepted, prior in zip(self._tested, self._accepted, self._priors, strict=True):
            count, right = tested + self._strength, accepted + self._strength * prior
            mean = right / count
            found.append((right + 0.5 + sqrt(right * (1 - mean) + 0.25)) / (count + 1) if at_best else mean)
        return found[0], found[1]

    def observe(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right, and the next one, if there is one, was wrong."""
        tested = min(accepted + 1, drafted)
        for place, (new, right) in enumerate(((min(tested, 1), min(accepted, 1)), (tested - 1, accepted - 1))):
            if new > 0:
                kept = _MEMORY**new
                self._tested[place] = kept * self._tested[place] + new
                self._accepted[place] = kept * self._accepted[place] + right

    def fade(self, kept: float) -> None:
        """Moves towards the priors."""
        self._tested = [kept * tested for tested in self._tested]
        self._accepted = [kept * accepted for accepted in self._accepted]


def expected_accepted(means: tuple[float, float], drafts: float) -> float:
    """a + a a' + ... for the means a of a first draft and a' of later ones (Leviathan et al., 2023, section 3.1)."""
    first, later = means
    return first * (1 - later**drafts) / (1 - later) if later < 1 else first * drafts


class PassTimes:
    """Times of steps by a number of tokens: a table at powers of 2, linear between them, that never falls.

    A pass of few tokens waits for memory and one of many for arithmetic, so that no one line fits. The first measurement sets
    the unit. Each moves all entries by its relative error, the less the further they are: what was not measured keeps the shape
    of the prior.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = list(accumulate((prior(1 << power) for power in range(_POWERS)), max))
        self._times, self.is_measured = list(self._prior), False

    @classmethod
    def measured(cls, times: Sequence[float]) -> "PassTimes":
        """From the times of passes of 1, 2, ... tokens, and a line beyond. On a GPU the last may be below the first."""
        each = max(times[-1] - times[0], 0.0) / max(len(times) - 1, 1)
        return cls(lambda n: times[n - 1] if n <= len(times) else times[0] + each * (n - 1))

    @classmethod
    def usual(cls, row_cost: float, spec: AnySpec) -> "PassTimes":
        """In passes of one token. Tokens choose other experts, so that memory gives more weights for more tokens."""
        one = hypot(1.0, row_cost)
        return cls(lambda n: hypot(spec.weights_read(n) / spec.weights_read(1), row_cost * n) / one)

    def of(self, n: int) -> float:
        below = min((n - 1).bit_length() - 1 if n > 1 else 0, _POWERS - 2)
        low, start = self._times[below], 1 << below
        return low + (self._times[below + 1] - low) * (n - start) / start

    def slope(self, n: int) -> float:
        """Of one more token."""
        return (self.of(n + _AHEAD) - self.of(n)) / _AHEAD

    @property
    def pace(self) -> float:
        """The time of one token over its prior."""
        return self._times[0] / self._prior[0]

    def observe(self, n: int, seconds: float, usual: float = inf) -> None:
        """`usual`: the unit, as far as it is known."""
        if not self.is_measured:
            unit = min(seconds / self.of(n), _OUTLIER_FACTOR * usual)
            self._times, self.is_measured = [unit * time for time in self._prior], True
        error, longest = min(seconds / self.of(n), _OUTLIER_FACTOR) - 1, 0.0
        for place, near in enumerate(_nearness(n)):
            self._times[place] = longest = max(longest, self._times[place] * (1 + error * _NEW * near))


@lru_cache(256)
def _nearness(n: int) -> list[float]:
    """How much a measurement of n tokens says of each power of 2."""
    return [2.0 ** (-abs(log2(n) - power) / 2) for power in range(_POWERS)]


class Calibration:
    """How far to trust a drafter's probability p: the draft is rejected with probability doubt * (1 - p)^power."""

    def __init__(self, doubt: float, power: int) -> None:
        self.doubt, self.power, self._rejected, self._doubted = doubt, power, GUESS * doubt, GUESS

    def observe(self, accepted: int, probs: Sequence[float]) -> None:
        """Of drafts with these probabilities the first `accepted` were right, and the next one, if there is one, was wrong."""
        tested, power = probs[: accepted + 1], self.power
        kept = _MEMORY ** len(tested)
        self._rejected = kept * self._rejected + (len(tested) > accepted)
        self._doubted = kept * self._doubted + sum([(1 - prob) ** power for prob in tested])
        self.doubt = min(self._rejected / max(self._doubted, 1e-9), 1.0)


@dataclass(eq=False)
class Arm:
    """A drafter, and what is known of it."""

    name: str
    acceptance: Acceptance
    step: float  # prior time of a draft of one row
    part: float  # of what more rows cost the target, that they cost it
    share: float  # of a pass of the target that is left to verify its drafts
    calibration: Calibration
    reach: float = inf  # it drafts for texts of fewer tokens
    guesses: bool = False  # whether it verifies what it looks up while it drafts for one row
    tries: float = 0.0  # less, the longer ago they were
    pace: float = 1.0  # its times over their prior, in those of the target's


@dataclass(frozen=True)
class Plan:
    """What drafts in the next steps of so many rows: `length` drafts of each, or of one as many as `ends` lets through."""

    arm: Arm | None
    length: int
    ends: DraftEnds
    rate: float  # tokens per second that it may give
    made: int  # the number of the choice


@dataclass
class Speed:
    """Of steps of about so many rows, that look for drafts or do not; newer ones count more."""

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    since: int = 0  # steps of the other kind since this one, the slower, was tried

    def add(self, tokens: int, seconds: float) -> None:
        self.steps, self.tokens = _RECENT * self.steps + 1, _RECENT * self.tokens + tokens
        self.seconds = _RECENT * self.seconds + seconds


@dataclass
class Step:
    """A step of the loop."""

    rows: int
    looks: bool = True  # for drafts
    found: bool = False  # in the only row's text
    arm: Arm | None = None  # that drafted
    drafts: int = 0  # of each row
    verified: int = 0  # tokens of the target's pass
    tokens: int = 0  # that it gave, if it looked


class Bandit:
    """What is known of a model and its drafters, and the choice between them."""

    def __init__(self, passes: PassTimes, arms: Mapping[str, Arm], most: int) -> None:
        """`passes`: of the target, and of steps without an arm. `most`: drafts of a row."""
        self.passes, self.arms = passes, arms
        self._lookups = [[Acceptance(prior, prior, _LOOKUP_STRENGTH) for prior in priors] for priors in _LOOKUPS]
        self._lengths = (*(length for length in _LENGTHS if length < most), most)
        # By the number of binary digits of the rows, and whether steps look for drafts.
        self._speeds = defaultdict[tuple[int, bool], Speed](Speed)
        self._times: dict[tuple[Arm, int], PassTimes] = {}  # of steps by drafts and one, see `times`
        self._plans: dict[tuple[int, bool], Plan] = {}  # by rows, and whether something was found for the only one
        self._choices = self._compared = 0  # plain steps are choices, too

    def lookup_acceptance(self, recalled: bool, evidence: int) -> Acceptance:
        """Of continuations with about so much evidence, see `History.continuation`, in the row's text or in earlier ones."""
        by_evidence = self._lookups[recalled]
        return by_evidence[min(evidence.bit_length(), len(by_evidence) - 1)]

    def times(self, arm: Arm, rows: int, found: bool) -> PassTimes:
        """Of its steps by the drafts of a row, and one; in units of the target's prior until they are measured."""
        guesses = found and arm.guesses
        key = arm, 0 if guesses else rows.bit_length()
        if (known := self._times.get(key)) is None:
            passes, pace, ahead = self.passes, self.passes.pace, int(arm.share < 1)
            step = (arm.step + arm.part * (passes.of(rows) - passes.of(1)) / pace) * (_GUESSED if guesses else 1.0)
            known = self._times[key] = PassTimes(lambda n: (n - 1 + ahead) * step + arm.share * passes.of(rows * n) / pace)
        return known

    def unit(self, arm: Arm, times: PassTimes) -> float:
        return 1.0 if times.is_measured else arm.pace * self.passes.pace

    def next_step(self, rows: int) -> Step:
        """One that looks for drafts or does not: what is faster, or now and then the other, to find out whether it is."""
        looking, plain = (self._speeds[rows.bit_length(), looks] for looks in (True, False))
        looks = plain.steps > 0  # the first gives the unit of times
        if looks and looking.steps >= _FEW:
            gain = looking.tokens * plain.seconds / (looking.seconds * plain.tokens)
            slower, every = looking if gain < 1 else plain, (max(gain, 1 / gain) - 1) / _EXPLORED
            slower.since = (slower.since + 1) % ceil(min(max(every, 16), 256))  # the next text may be another one
            looks = (gain < 1) == (slower.since == 0)
        self._choices += not looks
        return Step(rows, looks)

    def observe(self, step: Step, seconds: float) -> None:
        """How long a step took."""
        arm, looking, plain = step.arm, *(self._speeds[step.rows.bit_length(), looks] for looks in (True, False))
        if arm is None:
            self.passes.observe(step.verified, seconds)
        else:
            if arm.tries:  # the first draft of all may be a slow one
                times, pace = self.times(arm, step.rows, step.found), self.passes.pace
                times.observe(step.drafts + 1, seconds, arm.pace * pace)
                arm.pace = times.pace / pace
            arm.tries = min(arm.tries + 1, _FEW)
        if not step.looks:
            plain.add(step.rows, seconds)
        elif arm is None or arm.tries >= _FEW:
            looking.add(step.tokens, seconds)
            if step.tokens * plain.seconds > seconds * plain.tokens:
                looking.since = -1  # what gains goes on

    def plan(self, rows: int, shortest: int, found: bool) -> Plan:
        """For so many rows, the shortest text of which has so many tokens. `found`: something in the text of the only row."""
        self._choices += 1
        plan = self._plans.get((rows, found))
        due = plan is None or self._choices - plan.made >= min(_COMPARED, plan.made // _COMPARED)
        if plan is None or due or (plan.arm is not None and shortest >= plan.arm.reach):
            plan = self._plans[rows, found] = self._best_plan(rows, shortest, found)
        return plan

    def _best_plan(self, rows: int, shortest: int, found: bool) -> Plan:
        best, rate = None, rows / self.passes.of(rows)
        for arm in self.arms.values():
            if shortest < arm.reach and (bound := self.best_length(arm, rows, found, at_best=True)[0]) > rate:
                best, rate = arm, bound
        kept, self._compared = _UNUSED ** (self._choices - self._compared), self._choices
        for arm in self.arms.values():  # others' text may be another one, and their times may have been disturbed
            if arm is not best:
                arm.acceptance.fade(kept)
                arm.tries *= kept
                if 0 < arm.tries < _FORGOTTEN:
                    arm.tries, arm.pace = 0.0, 1.0
                    self._times = {key: times for key, times in self._times.items() if key[0] is not arm}
        if best is None:
            return Plan(None, 0, DraftEnds(), rate, self._choices)
        expected, length = self.best_length(best, rows, found)
        return Plan(best, length, self._ends(best, found, expected, length), rate, self._choices)

    def best_length(self, arm: Arm, rows: int, found: bool = False, at_best: bool = False) -> tuple[float, int]:
        """The most tokens per second that this arm is expected to give, or gives `at_best`, and the drafts that give them."""
        means, times, best, length = arm.acceptance.means(at_best), self.times(arm, rows, found), 0.0, 0
        for drafts in self._lengths:
            rate = rows * (1 + expected_accepted(means, drafts)) / times.of(drafts + 1)
            if rate <= best:
                break
            best, length = rate, drafts
        return best / self.unit(arm, times), length

    def _ends(self, arm: Arm, found: bool, rate: float, length: int) -> DraftEnds:
        """Where the probability that all drafts are accepted is so low that one more does not pay at this rate. For one row."""
        times, gain = self.times(arm, 1, found), arm.acceptance.means()[1]
        cost = rate * self.unit(arm, times) * times.slope(length + 1)  # in tokens
        survival = cost / gain if cost < gain else 1.0
        return DraftEnds(survival=survival, doubt=arm.calibration.doubt, power=arm.calibration.power)
