"""What an adaptive drafter knows: how often drafts are accepted, and how long passes take."""

from collections.abc import Sequence

_MEMORY = 0.98  # weight of what was known, per new observation
_STRENGTH = 4.0  # observations that a prior counts as
_JUMP = 2.0  # a time that is longer than expected by more than this factor was disturbed, and counts as this much
_PRIOR_AT, _PRIOR_WEIGHT = (1, 16), 2.0  # two points of the line that is known at first


class Chance:
    """A probability, estimated from what was seen lately and from a prior that counts as a few observations."""

    def __init__(self, prior: float, strength: float = _STRENGTH) -> None:
        self._prior, self._strength = prior, strength
        self._tested = self._accepted = 0.0

    @property
    def mean(self) -> float:
        return (self._accepted + self._strength * self._prior) / (self._tested + self._strength)

    def observe(self, accepted: bool) -> None:
        self.forget()
        self._tested += 1
        self._accepted += accepted

    def forget(self, observations: int = 1) -> None:
        """Moves towards the prior: what has not been tried for long is worth another try."""
        kept = _MEMORY**observations
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

    Discounted least squares, with a prior as two measurements. A line, because each measurement then tells something about
    every n: with a time for each n, one disturbed measurement would keep its n from ever being tried again.
    """

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = fixed, each
        self._sums = [0.0] * 5  # of the weights, n, n n, time, n time
        for n in _PRIOR_AT:
            self._add(n, fixed + n * each, _PRIOR_WEIGHT)

    def of(self, n: int) -> float:
        return self.fixed + n * self.each

    def scale(self, factor: float) -> None:
        """Into another unit."""
        self.fixed *= factor
        self.each *= factor
        self._sums[3] *= factor
        self._sums[4] *= factor

    def observe(self, n: int, time: float) -> None:
        self._sums = [_MEMORY * total for total in self._sums]
        self._add(n, min(time, _JUMP * self.of(n)), 1.0)
        weight, of_n, of_squares, of_times, of_products = self._sums
        each = (weight * of_products - of_n * of_times) / (weight * of_squares - of_n * of_n)
        self.each = max(each, 0.0)
        self.fixed = max((of_times - self.each * of_n) / weight, 0.0)

    def _add(self, n: int, time: float, weight: float) -> None:
        for place, value in enumerate((1.0, n, n * n, time, n * time)):
            self._sums[place] += weight * value


def best_length(
    first: float, later: float, draft: LinearTime, ahead: int, verify: LinearTime, batch: int, most: int
) -> tuple[float, int]:
    """The most expected tokens per unit of time for one row, and the number of drafts, 1..most, that gives them.

    A round of d drafts takes d + `ahead` passes of the draft side, and a pass of d + 1 tokens for each of `batch` rows. It
    gives a token of the target's and each draft that survives: 1 + a + a a' + ... (Leviathan et al., 2023, section 3.1).
    """
    best_rate, best, tokens, survival = 0.0, 0, 1.0, first
    once, each = draft.of(ahead) + verify.of(batch), draft.each + batch * verify.each
    for length in range(1, most + 1):
        tokens += survival
        rate = tokens / (once + length * each)
        if rate <= best_rate:
            break
        best_rate, best = rate, length
        survival *= later
    return best_rate, best
