"""What adaptive drafting knows of a model: what can draft, how often it is right, and how long passes take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds

_MEMORY = 0.98  # weight of what was known, per new observation
_FADING = 0.999  # weight of how often drafts were accepted, per round in which none was tried
_STRENGTH = 4.0  # observations that a prior counts as
_JUMP = 2.0  # a time that is longer than expected by more than this factor was disturbed, and counts as this much
_PRIOR_AT, _PRIOR_WEIGHT = 4, 2.0  # a prior of a line counts as so many measurements of so many rows or passes
_RIDGE = 30.0  # ridge weight towards the prior slope, in units of the sum of (n - mean)^2

_CALL = 0.03  # of a pass of one row: what a draft takes besides its passes
_ROW = 0.06  # of a pass of one row: for each further row
_SLOW_ROW = 0.5  # the same for transformers' layers on a CPU, whose kernels are made for one row or for many
_EXIT_ACCEPTANCE = 0.85  # of a trained exit of which nothing is known
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92}  # of calibrated int4 weights
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # of a pass, over one by bf16 weights
# Doubt and power, see DraftEnds. Trained exits are calibrated, copies of all layers are right more often than they say.
_CALIBRATIONS = {None: (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3)}
# Least evidence of a lookup; acceptance of its first token, and of further ones.
_LOOKUPS = ((0, 0.3, 0.5), (2, 0.5, 0.7), (3, 0.6, 0.7), (4, 0.75, 0.8), (8, 0.9, 0.9), (16, 0.95, 0.95))
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
# One step in every `_PLAIN_EVERY` has no drafts, so that the time of such steps is known. Not the first one: a short output
# has few steps, and drafts usually pay.
_PLAIN_AT, _PLAIN_EVERY = 4, 128


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


class Calibration:
    """The probability that a draft is rejected, from the probability p that its drafter gave it: scale * (1 - p)^power."""

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


@dataclass
class Option:
    """One way to draft, and what is known about it. All times are in the same unit."""

    name: str
    acceptance: Acceptance
    draft: LinearTime  # by passes of the draft's layers, of one row
    ahead: int  # passes besides one per token: 1 where the target needs the last draft's state
    verify: LinearTime  # by rows
    calibration: Calibration

    def plan(self, batch: int, most: int) -> tuple[float, int]:
        """Expected tokens per unit of time and row, and the length that gives them."""
        chance = self.acceptance
        return best_length(chance.first, chance.later, self.draft, self.ahead, self.verify, batch, most)

    def ends(self, rate: float) -> DraftEnds:
        """Where the probability of all drafts so far is so low that one more does not pay at this rate."""
        cost, gain = rate * (self.draft.each + self.verify.each), self.acceptance.later  # in tokens, if all so far are right
        survival = cost / gain if cost < gain else 1.0
        return DraftEnds(survival=survival, doubt=self.calibration.scale, power=self.calibration.power)


class Knowledge:
    """What is known of one model. Times are in passes of one row until the first is measured, then in seconds."""

    def __init__(self, plain: LinearTime, options: dict[str, Option]) -> None:
        self.plain = plain
        self.options = options
        self._lookups = [
            (least, Acceptance(Chance(first, _LOOKUP_STRENGTH), Chance(later, _LOOKUP_STRENGTH)))
            for least, first, later in _LOOKUPS
        ]
        self._first_pass = plain.of(1)
        self._steps = 0
        self._is_measured = False

    def acceptance_of_lookup(self, evidence: int) -> Acceptance:
        """Of a continuation with this evidence, see `History.continuation`."""
        return next(acceptance for least, acceptance in reversed(self._lookups) if evidence >= least)

    def wants_plain_step(self) -> bool:
        """Whether this step should be one without drafts, so that their time is known. Counts the steps."""
        step, self._steps = self._steps, self._steps + 1
        return step % _PLAIN_EVERY == _PLAIN_AT

    def forget(self, option: Option, rounds: int) -> None:
        """What has not been tried for long is worth another try: it may have been unlucky, or its times disturbed."""
        unit = self.plain.of(1) / self._first_pass
        option.acceptance.forget(rounds)
        option.draft.forget(rounds, unit)
        if option.verify is not self.plain:
            option.verify.forget(rounds, unit)

    def observe_round(self, option: Option | None, drafted: int, draft_time: float, rows: int, verify_time: float) -> None:
        """`option` drafted, or, if None, a lookup or nothing; then a pass of `rows` verified. Times are in seconds."""
        verify = self.plain if option is None else option.verify
        if not self._is_measured:
            self._is_measured = True
            times = [self.plain, *(option.draft for option in self.options.values())]
            times += [option.verify for option in self.options.values() if option.verify is not self.plain]
            factor = verify_time / verify.of(rows)
            for each in times:
                each.scale(factor)
        verify.observe(rows, verify_time)
        if option is not None and drafted:
            option.draft.observe(drafted + option.ahead, draft_time / slowdown(verify, rows // (drafted + 1)))


class Drafting(NamedTuple):
    """What drafts: the layers up to an exit, and perhaps its block, by a low-bit copy or, if None, by the target's own."""

    weights: str | None
    exit_layer: int
    has_block: bool = False


_REMEMBERED: WeakKeyDictionary[Backend, dict[str, Knowledge]] = WeakKeyDictionary()


def knowledge_of(model: Backend, drafters: Mapping[str, Drafting], profile: DraftProfile, remembered: bool) -> Knowledge:
    """What is known of these drafters, by name.

    `remembered`: with all that was learnt from the model's earlier outputs in this process. Otherwise every output starts from
    the profile, and from usual values for what that lacks.
    """
    if not remembered:
        return _at_first(model, drafters, profile)
    by_drafters = _REMEMBERED.setdefault(model, {})
    key = ", ".join(drafters)
    if key not in by_drafters:
        by_drafters[key] = _at_first(model, drafters, profile)
    return by_drafters[key]


def _at_first(model: Backend, drafters: Mapping[str, Drafting], profile: DraftProfile) -> Knowledge:
    spec = model.spec
    embedding = spec.vocab * spec.hidden
    head = embedding / (spec.parameters - (0 if spec.tied else embedding))  # its share of the weights that a pass reads
    layer = (1 - head) / spec.layers
    plain = _passes(model, profile)
    step = plain.of(1)
    options: dict[str, Option] = {}
    for name, (weights, exit_layer, has_block) in drafters.items():
        known = profile.drafts if profile.passes else {}  # without both the units would differ
        draft = known.get(name, ((exit_layer + has_block) * layer + head) * step * _COPY_COST.get(weights or "", 1.0))
        is_exit = exit_layer < spec.layers
        acceptance = profile.acceptance.get(name)
        if acceptance is None:
            of_exit = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE) if is_exit else 1.0
            acceptance = of_exit * _COPY_ACCEPTANCE.get(weights or "", 1.0)
        verify = plain
        if weights is None:
            rest = 1 - exit_layer * layer  # of a pass: the target goes on from the exit
            verify = LinearTime(rest * plain.fixed, rest * plain.each)
        times, ahead = LinearTime(_CALL * step, draft), int(weights is None)
        calibration = Calibration(*_CALIBRATIONS[None if is_exit else weights])
        options[name] = Option(name, Acceptance(Chance(acceptance), Chance(acceptance)), times, ahead, verify, calibration)
    return Knowledge(plain, options)


def _passes(model: Backend, profile: DraftProfile) -> LinearTime:
    """Times of a pass by its rows: those of the profile, or usual ones in passes of one row."""
    if len(profile.passes) > 1:
        # Where rows cost nothing, as on a GPU, the last time may be below the first; many rows must not take less than no time.
        each = max(profile.passes[-1] - profile.passes[0], 0.0) / (len(profile.passes) - 1)
        return LinearTime(profile.passes[0] - each, each)
    each = _SLOW_ROW if model.implementation == "generic" and model.device.type == "cpu" else _ROW
    return LinearTime(1 - each, each)
