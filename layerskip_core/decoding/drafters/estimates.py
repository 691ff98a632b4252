"""Estimates of adaptive drafting: acceptance, the times of passes and drafts, how far to trust a probability.

And the length of a draft that is best by them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import hypot, inf, log, log2, prod, sqrt

from ...model.spec import AnySpec

STRENGTH = 4.0  # observations that a prior counts as
TIMES = 0.07  # weight of a newly measured time
PERIODS = 0.97  # weight of the times of drafts and of steps that were known, per new one
OUTLIER_FACTOR = 2.0  # a time that is longer than expected by more than this factor was disturbed, and counts as this much
POWERS = 11  # of 2, whose passes have known times
_MEMORY = 0.995  # weight of what was known, per new observation
_LONG_MEMORY = 0.998  # the same of how far to trust a probability, which differs less between texts
_FADING = 0.999  # the same per round in which an arm was not tried
_LEAST_DOUBT = 1e-4  # nothing is more certain
_ORIGIN = 0.5  # weight of a draft without steps that takes no time
LEAST_STEPS = 0.25  # share of a draft's time that its steps take at least, whatever a disturbed draft says
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of drafts, that are compared

NO_OTHERS = 0.0, 0  # see `best_length`


class Acceptance:
    """The chance that a draft is accepted given that all before it were: of the first in a round, and of later ones.

    Estimated from what was seen lately, and from priors that count as `strength` observations each.
    """

    def __init__(self, first: float, later: float, strength: float = STRENGTH) -> None:
        self._priors, self._strength = (first, later), strength
        self._tested, self._accepted = [0.0, 0.0], [0.0, 0.0]  # of first drafts, of later ones

    def chances(self, deviations: float = 0.0) -> tuple[float, float]:
        """Of the first draft and of later ones: the mean, or the upper end of Wilson's interval of so many deviations."""
        ends = []
        square = deviations * deviations
        for tested, accepted, prior in zip(self._tested, self._accepted, self._priors, strict=True):
            count = tested + self._strength
            mean = (accepted + self._strength * prior) / count
            spread = deviations * sqrt(mean * (1 - mean) / count + square / (4 * count * count))
            ends.append((mean + square / (2 * count) + spread) / (1 + square / count))
        return ends[0], ends[1]

    def observe(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right, and the next one, if there is one, was wrong."""
        for index in range(min(accepted + 1, drafted)):
            of = int(index > 0)
            self._tested[of] = _MEMORY * self._tested[of] + 1
            self._accepted[of] = _MEMORY * self._accepted[of] + (index < accepted)

    def expected(self, drafted: int) -> float:
        """How many of so many drafts will be accepted."""
        first, later = self.chances()
        return first * (1 - later**drafted) / (1 - later) if later < 1 else first * drafted

    def compare(self, draft: Sequence[int], said: Sequence[int]) -> None:
        """Observes a draft that was not verified itself, by the target's token in its place."""
        known = list(zip(draft, said, strict=False))
        accepted = next((index for index, (drafted, token) in enumerate(known) if drafted != token), len(known))
        self.observe(min(accepted + 1, len(known)), accepted)

    def fade(self, rounds: int) -> None:
        """Moves towards the priors, as far as so many rounds without a try make it worth another one."""
        kept = _FADING**rounds
        self._tested = [kept * tested for tested in self._tested]
        self._accepted = [kept * accepted for accepted in self._accepted]


class PassTimes:
    """The time of a pass by its number of tokens: known at powers of 2, linear between them, never shorter for more tokens.

    A pass of few tokens waits for memory and one of many for arithmetic, so that no one line fits. A measurement moves the
    times of all numbers by its relative error, the less the further they are: where nothing was measured, the curve keeps the
    shape that it had at first.
    """

    def __init__(self, of_one: float, each: float, known: Sequence[float] = ()) -> None:
        """A line, where the times of passes of 1, 2, ... tokens are not `known`."""
        measured = len(known)
        if measured > 1:  # where rows cost nothing, as on a GPU, the last time may be below the first
            of_one, each = known[0], max(known[-1] - known[0], 0.0) / (measured - 1)
        numbers = [1 << power for power in range(POWERS)]
        times = (known[n - 1] if n <= measured else of_one + each * (n - 1) for n in numbers)
        self._first = list(accumulate(times, max))
        self._times = list(self._first)
        self._weights = [0.0] * len(numbers)

    @staticmethod
    def usual(row_cost: float, spec: AnySpec) -> list[float]:
        """Of passes of 1, 2, ... tokens, which wait for memory as long as these are few, and for arithmetic if they are many.

        Tokens choose other experts, so that memory gives more weights for more tokens.
        """
        read = spec.weights_read(1)
        times = [hypot(spec.weights_read(n) / read, row_cost * n) for n in range(1, 2 ** (POWERS - 1) + 1)]
        return [time / times[0] for time in times]

    def of_part(self, of_one: float, share: float) -> "PassTimes":
        """Times of other passes: of one token `of_one`, and of each token more this `share` of what it takes here."""
        part = PassTimes(of_one, 0.0)
        part._first = [of_one + share * (time - self._times[0]) for time in self._times]
        part._times = list(part._first)
        return part

    def of(self, n: int, at_first: bool = False) -> float:
        """`at_first`: before anything was measured."""
        times = self._first if at_first else self._times
        below = min((n - 1).bit_length() - 1 if n > 1 else 0, len(times) - 2)
        low, high, start = times[below], times[below + 1], 1 << below
        return low + (high - low) * (n - start) / start

    def slope(self, n: int) -> float:
        """Of one more token."""
        return self.of(n + 1) - self.of(n)

    def observe(self, n: int, time: float) -> None:
        error, longest = min(time / self.of(n), OUTLIER_FACTOR) - 1, 0.0
        for place, near in enumerate(_nearness(n)):
            self._weights[place] += near
            weight = max(TIMES, 1 / (1 + self._weights[place]))
            longest = max(longest, self._times[place] * (1 + near * error * weight))
            self._times[place] = longest

    def fade(self, rounds: int) -> None:
        """Moves towards the first times where these are shorter: what was measured long ago may have been disturbed."""
        kept = _MEMORY**rounds
        self._times = [
            min(first, time) + kept * max(time - first, 0.0) for first, time in zip(self._first, self._times, strict=True)
        ]


@lru_cache(256)
def _nearness(n: int) -> list[float]:
    """How much a measurement of n tokens says of each power of 2."""
    where = log2(n)
    return [2.0 ** (-abs(where - place) / 2) for place in range(POWERS)]


class Calibration:
    """How far to trust a drafter's own probability p: its draft is rejected with probability doubt * (1 - p)^power.

    The power is the most likely one.
    """

    def __init__(self, doubt: float, power: int) -> None:
        self._rejected = STRENGTH * doubt
        self._doubted = dict.fromkeys((1, 3), STRENGTH)  # by power, sum of (1 - p)^power over the drafts tested
        self._likelihood = {known: 2.0 * (known == power) for known in self._doubted}  # logarithms
        self.power = power

    @property
    def doubt(self) -> float:
        return self._doubt(self.power)

    def _doubt(self, power: int) -> float:
        return min(self._rejected / self._doubted[power], 1.0)

    def observe(self, accepted: int, probs: Sequence[float]) -> None:
        """Of drafts with these probabilities the first `accepted` were right, and the next one, if there is one, was wrong."""
        tested = probs[: accepted + 1]
        rejected, kept = len(tested) > accepted, _LONG_MEMORY ** len(tested)
        for power, doubted in self._doubted.items():
            doubt, weights = self._doubt(power), [(1 - prob) ** power for prob in tested]
            right = prod([1 - max(doubt * weight, _LEAST_DOUBT) for weight in weights[:accepted]])
            wrong = max(doubt * weights[-1], _LEAST_DOUBT) if rejected else 1.0
            self._likelihood[power] = kept * self._likelihood[power] + log(max(right * wrong, _LEAST_DOUBT))
            self._doubted[power] = kept * doubted + sum(weights)
        self._rejected = kept * self._rejected + rejected
        self.power = max(self._likelihood, key=self._likelihood.__getitem__)

    def survival(self, probs: Sequence[float]) -> list[float]:
        """By draft, the probability that it and all before it are accepted."""
        product, doubt, power = 1.0, self.doubt, self.power
        return [product := product * (1 - doubt * (1 - prob) ** power) for prob in probs]


def best_length(
    chances: tuple[float, float],
    step: float,
    passes: PassTimes,
    most: int,
    ahead: int = 0,
    share: float = 1.0,
    rows: int = 1,
    others: tuple[float, int] = NO_OTHERS,
    near: int = 1,
    rest: float = 0.0,
) -> tuple[float, int]:
    """The most expected tokens per unit of time, and the number of drafts, 1..most, of each of `rows` that gives them.

    A round of d drafts takes d + `ahead` steps of the drafter, and the target's `share` of a pass over d + 1 tokens of each
    row. It gives a token of the target's and each draft that survives: 1 + a + a a' + ... (Leviathan et al., 2023, section
    3.1), a and a' being the `chances` of `Acceptance`. `others`: how many tokens other rows of the pass are expected to get,
    and how many it verifies of them. `near`: where the search begins. `rest`: the time of a round besides drafts and pass.
    """
    first, later = chances
    lengths = _lengths(most)

    def rate_of(length: int) -> float:
        tokens = 1 + first * ((1 - later**length) / (1 - later) if later < 1 else length)
        time = (length + ahead) * step + share * passes.of(others[1] + rows * (length + 1)) + rest
        return (others[0] + rows * tokens) / time

    place = max(bisect_right(lengths, near) - 1, 0)
    best = rate_of(lengths[place])
    for further in (1, -1):
        while 0 <= place + further < len(lengths) and (rate := rate_of(lengths[place + further])) > best:
            best, place = rate, place + further
    return best, lengths[place]


@lru_cache(64)
def _lengths(most: int) -> tuple[int, ...]:
    return (*(length for length in _LENGTHS if length < most), most)


class Pace:
    """How long drafts by the same kernels take: `each` draft besides its steps, and the steps over what was expected, `factor`.

    By least squares, in which newer drafts count more.
    """

    def __init__(self) -> None:
        self.each, self.factor, self.tries = 0.0, 1.0, 0
        self._sums = [0.0] * 5

    def observe(self, expected: float, time: float) -> None:
        """A draft took so long, and its steps were expected to take `expected`."""
        if self.tries:
            time = min(time, OUTLIER_FACTOR * (self.each + self.factor * expected))
        self.tries += 1
        terms = 1.0, expected, time, expected * expected, expected * time
        self._sums = [PERIODS * known + new for known, new in zip(self._sums, terms, strict=True)]
        count, x, y, xx, xy = self._sums
        spread = (count + _ORIGIN) * xx - x * x
        only_steps = xy / xx  # if a draft took no time besides its steps
        self.factor = max(((count + _ORIGIN) * xy - x * y) / spread, LEAST_STEPS * only_steps)
        self.each = (y - self.factor * x) / (count + _ORIGIN)
        if self.each < 0:
            self.each, self.factor = 0.0, only_steps


@dataclass(eq=False)
class Arm:
    """One way to draft, and what is known about it."""

    name: str
    acceptance: Acceptance
    steps: PassTimes  # of its layers, by their rows
    pace: Pace  # of the drafts of all arms with the same kernels
    share: float  # of a pass of the target that is left to verify its drafts
    calibration: Calibration
    tries: float  # rounds of it whose times were measured
    reach: float  # it drafts for texts of fewer tokens
    length: int = 1  # of the draft that was last found best
    last_choice: int = 0  # the number of the choice at which it was chosen, or up to which it has faded

    def __post_init__(self) -> None:
        self.ahead = int(self.share < 1)  # passes besides one per token: 1 where the target needs the last draft's state

    def fade(self, choice: int) -> None:
        """Before the choice with this number: without a try for long, it may have been unlucky, or its times disturbed."""
        rounds, self.last_choice = choice - 1 - self.last_choice, choice - 1
        if rounds:
            self.acceptance.fade(rounds)
            self.steps.fade(rounds)

    def step(self, rows: int, pace: float) -> float:
        """The time of a step; as far as this arm was not tried, by the times of arms with the same kernels.

        `pace`: of the target's passes, if none of them was tried.
        """
        pace = self.pace.factor if self.pace.tries else pace
        own, usual = self.steps.of(rows), pace * self.steps.of(rows, at_first=True)
        trust = 1.0 if self.tries == inf else self.tries / (self.tries + STRENGTH)
        return trust * own + (1 - trust) * usual

    def observe_times(self, rows: int, drafted: int, draft_time: float, verify_time: float, whole_pass: float) -> None:
        """Times of a round; `whole_pass`: of the target over the same tokens, as expected."""
        self.tries += 1
        count = drafted + self.ahead
        self.pace.observe(count * self.steps.of(rows, at_first=True), draft_time)
        self.steps.observe(rows, max(draft_time - self.pace.each, LEAST_STEPS * draft_time) / count)
        if self.ahead:
            self.share += TIMES * (min(verify_time / whole_pass, 1.0) - self.share)
