"""What an adaptive drafter knows: how often drafts are accepted, and how long passes take."""

from collections.abc import Sequence

_MEMORY = 0.98  # weight of what was known, per new observation
_FADING = 0.999  # weight of how often drafts were accepted, per round in which none was tried
_STRENGTH = 4.0  # observations that a prior counts as
_JUMP = 2.0  # a time that is longer than expected by more than this factor was disturbed, and counts as this much
_PRIOR_AT, _PRIOR_WEIGHT = 4, 2.0  # a prior of a line counts as so many measurements of so many rows or passes
_RIDGE = 30.0  # what the first slope counts, as a sum of squared distances from the mean n


class Chance:
    """A probability, estimated from what was seen lately and from a prior that counts as a few observations."""

    def __init__(self, prior: float, strength: float = _STRENGTH) -> None:
        self._prior, self._strength = prior, strength
        self._tested = self._accepted = 0.0

    @property
    def mean(self) -> float:
        return (self._accepted + self._strength * self._prior) / (self._tested + self._strength)

    def observe(self, accepted: bool) -> None:
        self._tested = _MEMORY * self._tested + 1
        self._accepted = _MEMORY * self._accepted + accepted

    def forget(self, rounds: int) -> None:
        """Moves towards the prior: what has not been tried for long is worth another try."""
        kept = _FADING**rounds
        self._tested *= kept
        self._accepted *= kept


class Acceptance:
    """The chance that a draft is accepted given that all before it were: of the first in a round, and of later ones."""

    def __init__(self, first: Chance, later: Chance) -> None:
        self._first, self._later = first, later

    @property
    def first(self) -> float:
        return self._first.mean

    @property
    def later(self) -> float:
        return self._later.mean

    def observe(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right, and the next one, if there is one, was wrong."""
        for place in range(min(accepted + 1, drafted)):
            (self._later if place else self._first).observe(place < accepted)

    def compare(self, draft: Sequence[int], said: Sequence[int]) -> None:
        """Observes a draft that was not verified itself, by what the target said in its place."""
        known = list(zip(draft, said, strict=False))
        accepted = next((place for place, (drafted, token) in enumerate(known) if drafted != token), len(known))
        self.observe(min(accepted + 1, len(known)), accepted)

    def forget(self, rounds: int) -> None:
        self._first.forget(rounds)
        self._later.forget(rounds)


class Doubts:
    """How the probability that a drafter gives its token tells that it is rejected: scale * (1 - p)^power."""

    def __init__(self, scale: float, power: int) -> None:
        self.power = power
        self._rejected, self._doubted = _STRENGTH * scale, _STRENGTH

    @property
    def scale(self) -> float:
        return self._rejected / self._doubted

    def observe(self, confidence: Sequence[float], accepted: int) -> None:
        """Of drafts with these probabilities the first `accepted` were right, and the next one, if there is one, was wrong."""
        if confidence:
            tested = confidence[: accepted + 1]
            self._rejected = _MEMORY * self._rejected + (len(tested) > accepted)
            self._doubted = _MEMORY * self._doubted + sum((1 - prob) ** self.power for prob in tested)


class LinearTime:
    """The time of n passes, or of a pass of n rows: a fixed part and one for each, fitted to what was measured.

    Discounted least squares. A line, because each measurement then tells something about every n: with a time for each n, one
    disturbed measurement would keep its n from ever being tried again. Where all measurements have nearly the same n, the slope
    is that of the line that is known at first, in the unit of the measurements.
    """

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = self._first = fixed, each
        self._sums = [0.0] * 5  # of the weights, n, n n, time, n time
        self._add(_PRIOR_AT, self.of(_PRIOR_AT), _PRIOR_WEIGHT)
        self._prior = self._sums

    def of(self, n: int) -> float:
        return self.fixed + n * self.each

    def scale(self, factor: float) -> None:
        """Into another unit."""
        self._sums = _in_unit(self._sums, factor)
        self._fit()

    def observe(self, n: int, time: float) -> None:
        self._sums = [_MEMORY * total for total in self._sums]
        self._add(n, min(time, _JUMP * self.of(n)), 1.0)
        self._fit()

    def forget(self, rounds: int, unit: float) -> None:
        """Moves towards what was known at first, whose unit has this length now: a disturbance must not last."""
        kept = _MEMORY**rounds
        prior = _in_unit(self._prior, unit)
        self._sums = [kept * total + (1 - kept) * known for total, known in zip(self._sums, prior, strict=True)]
        self._fit()

    def _add(self, n: int, time: float, weight: float) -> None:
        added = (1.0, n, n * n, time, n * time)
        self._sums = [total + weight * value for total, value in zip(self._sums, added, strict=True)]

    def _fit(self) -> None:
        """Ridge regression towards the first slope; neither part is below 0."""
        weight, of_n, of_squares, of_times, of_products = self._sums
        fixed, each = self._first
        expected = fixed * weight + each * of_n
        slope = each * of_times / expected if expected else 0.0
        spread = of_squares - of_n * of_n / weight
        self.each = max((of_products - of_n * of_times / weight + _RIDGE * slope) / (spread + _RIDGE), 0.0)
        self.fixed = (of_times - self.each * of_n) / weight
        if self.fixed < 0:
            self.fixed, self.each = 0.0, of_products / of_squares


def _in_unit(sums: Sequence[float], factor: float) -> list[float]:
    """The sums of a LinearTime, with times in a unit of which the old one has `factor`."""
    return [*sums[:3], factor * sums[3], factor * sums[4]]


def slowdown(verify: LinearTime, batch: int) -> float:
    """How many times as long a pass of any layers takes for one token of each of `batch` rows as for one row."""
    return verify.of(batch) / verify.of(1)


def best_length(
    first: float, later: float, draft: LinearTime, ahead: int, verify: LinearTime, batch: int, most: int
) -> tuple[float, int]:
    """The most expected tokens per unit of time for one row, and the number of drafts, 1..most, that gives them.

    A round of d drafts takes d + `ahead` passes of the draft side, and a pass of d + 1 tokens for each of `batch` rows. It
    gives a token of the target's and each draft that survives: 1 + a + a a' + ... (Leviathan et al., 2023, section 3.1).
    `draft` is for one row; `slowdown` says how much longer more of them take.
    """
    best_rate, best, tokens, survival = 0.0, 0, 1.0, first
    slower = slowdown(verify, batch)
    once, each = slower * draft.of(ahead) + verify.of(batch), slower * draft.each + batch * verify.each
    for length in range(1, most + 1):
        tokens += survival
        rate = tokens / (once + length * each)
        if rate <= best_rate:
            break
        best_rate, best = rate, length
        survival *= later
    return best_rate, best
