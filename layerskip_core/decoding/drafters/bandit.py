"""What adaptive drafting chooses by: averages of acceptance, a table of measured times, and expected tokens per second by both.

Drafters are the arms of a bandit. An arm is judged by the upper end of what its acceptance may be (UCB: Auer et al., 2002), and
by a shorter time the less it was tried, so that it is tried.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import ceil, hypot, inf, log2, sqrt

from ...model.backend import DraftEnds
from ...model.spec import AnySpec

GUESS = 4.0  # drafts that a guessed acceptance counts as
_MEMORY = 0.995  # weight of what was known of acceptance, per new draft
_UNUSED = 0.999  # weight of what is known of an arm, per step without it
_RECENT = 0.97  # weight of the times and steps that were known, per new one
_LEAST_WEIGHT = 0.07  # of a new time in the table of passes
_OUTLIER_FACTOR = 2.0  # a time that is longer than expected by more was disturbed, and counts as this much
_LEAST_STEPS = 0.25  # share of a draft's time that its steps take at least
_UNTRIED = 0.5  # by so much more than 1 an arm that was never tried may be faster than expected; by less after each try
_EXPLORED = 0.01  # what steps that look for drafts, or plain ones, may cost where the others give more
_SETTLED, _COMPARED = 64, 8  # after so many choices, arms are compared in one of so many
# Of fewer steps that look for drafts the speed is not known; until then one step of so many is plain.
_FEW, _EVERY_AT_FIRST = 16, 16.0
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of drafts, that are compared
_POWERS = 11  # of 2, whose passes have known times
# Least evidence of a lookup in the row's own text; acceptance of its first token, and of further ones.
_LOOKUPS = ((16, 0.95, 0.95), (8, 0.9, 0.9), (4, 0.75, 0.8), (3, 0.6, 0.7), (2, 0.5, 0.7), (0, 0.3, 0.5))
# The same in earlier answers. A text that follows one of them for 64 tokens repeats it.
_RECALLED = ((64, 0.97, 0.97), (16, 0.95, 0.85), (8, 0.85, 0.75), (3, 0.7, 0.6), (1, 0.4, 0.6), (0, 0.15, 0.6))
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
_FORCED = 0.97, 0.99  # what a grammar forces can be spelled by other tokens
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
    """Times of passes by their number of tokens: a table at powers of 2, linear between them, that never falls.

    A pass of few tokens waits for memory and one of many for arithmetic, so that no one line fits. The first measurement sets
    the unit. Each moves all entries by its relative error, the less the further they are: what was not measured keeps the shape
    of the prior.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = list(accumulate((prior(1 << power) for power in range(_POWERS)), max))
        self._times, self._weights = list(self._prior), [0.0] * _POWERS

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

    def part(self, of_one: float, share: float) -> "PassTimes":
        """Of other passes: `of_one` token, and for each token more this share of what it takes here."""
        return PassTimes(lambda n: of_one + share * (self.of(n) - self.of(1)))

    def of(self, n: int, prior: bool = False) -> float:
        times = self._prior if prior else self._times
        below = min((n - 1).bit_length() - 1 if n > 1 else 0, _POWERS - 2)
        low, start = times[below], 1 << below
        return low + (times[below + 1] - low) * (n - start) / start

    def slope(self, n: int) -> float:
        """Of one more token."""
        return (self.of(n + _AHEAD) - self.of(n)) / _AHEAD

    @property
    def is_measured(self) -> bool:
        return any(self._weights)

    @property
    def pace(self) -> float:
        """The time of one token over its prior."""
        return self._times[0] / self._prior[0]

    def observe(self, n: int, seconds: float) -> None:
        if not self.is_measured:
            self._times = [time * seconds / self.of(n) for time in self._prior]
        error, longest = min(seconds / self.of(n), _OUTLIER_FACTOR) - 1, 0.0
        for place, near in enumerate(_nearness(n)):
            self._weights[place] += near
            weight = near * max(_LEAST_WEIGHT, 1 / (1 + self._weights[place]))
            self._times[place] = longest = max(longest, self._times[place] * (1 + error * weight))


@lru_cache(256)
def _nearness(n: int) -> list[float]:
    """How much a measurement of n tokens says of each power of 2."""
    return [2.0 ** (-abs(log2(n) - power) / 2) for power in range(_POWERS)]


class DraftTimes:
    """Of all drafters: a draft takes `overhead` and `pace` x the prior time of its steps, by least squares.

    Newer drafts count more, and a draft without steps that takes no time counts half.
    """

    def __init__(self) -> None:
        self.overhead, self.pace, self.tries = 0.0, 1.0, 0
        self._sums = [0.0] * 5

    def observe(self, steps: float, seconds: float) -> None:
        """`steps`: the prior time of its steps."""
        if self.tries:
            seconds = min(seconds, _OUTLIER_FACTOR * (self.overhead + self.pace * steps))
        self.tries += 1
        terms = 1.0, steps, seconds, steps * steps, steps * seconds
        self._sums = [_RECENT * known + new for known, new in zip(self._sums, terms, strict=True)]
        count, x, y, xx, xy = self._sums
        self.pace = max(((count + 0.5) * xy - x * y) / ((count + 0.5) * xx - x * x), _LEAST_STEPS * xy / xx)
        self.overhead = (y - self.pace * x) / (count + 0.5)
        if self.overhead < 0:
            self.overhead, self.pace = 0.0, xy / xx


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
    steps: PassTimes  # of its layers, by the number of rows
    draft_times: DraftTimes
    share: float  # of a pass of the target that is left to verify its drafts
    calibration: Calibration
    tries: float  # measured drafts
    reach: float  # it drafts for texts of fewer tokens

    def __post_init__(self) -> None:
        self.ahead = int(self.share < 1)  # steps besides one per draft: 1 where the target needs the last draft's state

    def step(self, rows: int, pace: float) -> float:
        """The time of a step; as far as it was not tried, by the pace of other drafters, or the target's if that is less."""
        trust, others = self.tries / (self.tries + GUESS), self.draft_times
        usual = min(others.pace, pace) if others.tries else pace
        return trust * self.steps.of(rows) + (1 - trust) * usual * self.steps.of(rows, prior=True)

    def observe(self, rows: int, drafts: int, seconds: float) -> None:
        count = drafts + self.ahead
        self.tries += 1
        self.draft_times.observe(count * self.steps.of(rows, prior=True), seconds)
        self.steps.observe(rows, max(seconds - self.draft_times.overhead, _LEAST_STEPS * seconds) / count)

    def fade(self, kept: float) -> None:
        """Without it for some steps: their text may be another one, and the times before may have been disturbed."""
        self.acceptance.fade(kept)
        self.tries *= kept


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

    def add(self, seconds: float) -> None:
        """A step, whose tokens are added to `tokens`."""
        self.steps, self.seconds = _RECENT * self.steps + 1, _RECENT * self.seconds + seconds
        self.tokens *= _RECENT


@dataclass
class Step:
    """A step of the loop."""

    rows: int
    looks: bool = True  # for drafts
    speed: Speed = field(default_factory=Speed)  # of such steps
    arm: Arm | None = None  # that gave each row so many
    drafts: int = 0
    verified: int = 0  # tokens of the target's pass
    draft_seconds: float = 0.0  # of the arm


class Bandit:
    """What is known of a model and its drafters, and the choice between them."""

    def __init__(self, passes: PassTimes, arms: Mapping[str, Arm], most: int) -> None:
        """`passes`: of the target. `most`: drafts of a row."""
        self.passes, self.arms, self.rest = passes, arms, 0.0  # of a step that looks for drafts: what is neither draft nor pass
        self._lookups = [
            [(least, Acceptance(first, later, _LOOKUP_STRENGTH)) for least, first, later in priors]
            for priors in (_LOOKUPS, _RECALLED)
        ]
        self.forced = Acceptance(*_FORCED)  # of what a grammar forces
        self._lengths = (*(length for length in _LENGTHS if length < most), most)
        # By the number of binary digits of the rows, and whether steps look for drafts.
        self._speeds = defaultdict[tuple[int, bool], Speed](Speed)
        self._plans: dict[int, Plan] = {}  # by rows
        self._choices = self._compared = 0

    def lookup_acceptance(self, recalled: int, evidence: int) -> Acceptance:
        """Of continuations with so much evidence, see `History.continuation`, in the row's text; with 1, in earlier ones."""
        return next(acceptance for least, acceptance in self._lookups[recalled] if evidence >= least)

    def next_step(self, rows: int) -> Step:
        """One that looks for drafts or does not: what is faster, or now and then the other, to find out whether it is."""
        looking, plain = (self._speeds[rows.bit_length(), looks] for looks in (True, False))
        gain, every = inf, _EVERY_AT_FIRST
        if looking.steps >= _FEW and plain.steps:
            gain = looking.tokens * plain.seconds / (looking.seconds * plain.tokens)
            every = min(max(abs(gain - 1) / _EXPLORED, 4), 16 if gain < 1 else 128)  # the next text may be another one
        slower = looking if gain < 1 else plain
        slower.since = (slower.since + 1) % ceil(every)
        if (gain < 1) == (slower.since > 0):
            return Step(rows, False, plain)
        return Step(rows, True, looking if self._choices > _SETTLED else Speed())  # first tries say nothing of later ones

    def observe(self, step: Step, seconds: float, verify_seconds: float) -> None:
        """How long a step took, from the pass before until its own was done, and how long its own."""
        arm = step.arm
        step.speed.add(seconds)
        if arm is None or arm.share == 1 or not self.passes.is_measured:
            self.passes.observe(step.verified, verify_seconds / (arm.share if arm else 1.0))
        else:
            arm.share += _LEAST_WEIGHT * (min(verify_seconds / self.passes.of(step.verified), 1.0) - arm.share)
        if arm is not None and step.drafts:
            arm.observe(step.rows, step.drafts, step.draft_seconds)
        if step.looks:
            most = _OUTLIER_FACTOR * self.rest + 0.1 * self.passes.of(1)  # what took longer was disturbed
            self.rest += _LEAST_WEIGHT * (min(seconds - step.draft_seconds - verify_seconds, most) - self.rest)

    def plan(self, rows: int, shortest: int) -> Plan:
        """For so many rows, the shortest text of which has so many tokens."""
        self._choices += 1
        plan = self._plans.get(rows)
        due = plan is None or self._choices <= _SETTLED or self._choices - plan.made >= _COMPARED
        if plan is None or due or (plan.arm is not None and shortest >= plan.arm.reach):
            plan = self._plans[rows] = self._best_plan(rows, shortest)
        return plan

    def _best_plan(self, rows: int, shortest: int) -> Plan:
        best, rate = None, rows / (self.passes.of(rows) + self.rest)
        for arm in self.arms.values():
            if shortest < arm.reach and (bound := self.best_length(arm, rows, at_best=True)[0]) > rate:
                best, rate = arm, bound
        kept, self._compared = _UNUSED ** (self._choices - self._compared), self._choices
        for arm in self.arms.values():
            if arm is not best:
                arm.fade(kept)
        if best is None:
            return Plan(None, 0, DraftEnds(), rate, self._choices)
        expected, length = self.best_length(best, rows)
        return Plan(best, length, self._ends(best, expected, length), rate, self._choices)

    def best_length(self, arm: Arm, rows: int, at_best: bool = False) -> tuple[float, int]:
        """The most tokens per second that this arm is expected to give, or gives `at_best`, and the drafts that give them."""
        means, best, length = arm.acceptance.means(at_best), 0.0, 0
        step = arm.step(rows, self.passes.pace)
        if at_best:
            step /= 1 + _UNTRIED / (1 + arm.tries + arm.draft_times.tries / GUESS)
        other = self.rest + arm.draft_times.overhead
        for drafts in self._lengths:
            seconds = other + (drafts + arm.ahead) * step + arm.share * self.passes.of(rows * (drafts + 1))
            rate = rows * (1 + expected_accepted(means, drafts)) / seconds
            if rate <= best:
                break
            best, length = rate, drafts
        return best, length

    def _ends(self, arm: Arm, rate: float, length: int) -> DraftEnds:
        """Where the probability that all drafts are accepted is so low that one more does not pay at this rate. For one row."""
        cost = rate * (arm.step(1, self.passes.pace) + arm.share * self.passes.slope(length + 1))  # in tokens
        gain = arm.acceptance.means()[1]
        survival = cost / gain if cost < gain else 1.0
        return DraftEnds(survival=survival, doubt=arm.calibration.doubt, power=arm.calibration.power)
