"""Adaptive drafting's knowledge of a model: its drafters, their acceptance, and the time of passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds
from .exit import ExitDrafter

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


class Acceptance:
    """The chance that a draft is accepted given that all before it were: of the first in a round, and of later ones.

    Estimated from what was seen lately, and from priors that count as `strength` observations each.
    """

    def __init__(self, first: float, later: float, strength: float = _STRENGTH) -> None:
        self._priors, self._strength = (first, later), strength
        self._tested, self._accepted = [0.0, 0.0], [0.0, 0.0]  # of first drafts, of later ones

    @property
    def chances(self) -> tuple[float, float]:
        """Of the first draft and of later ones."""
        first, later = (
            (accepted + self._strength * prior) / (tested + self._strength)
            for tested, accepted, prior in zip(self._tested, self._accepted, self._priors, strict=True)
        )
        return first, later

    def observe(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right, and the next one, if there is one, was wrong."""
        for index in range(min(accepted + 1, drafted)):
            of = int(index > 0)
            self._tested[of] = _MEMORY * self._tested[of] + 1
            self._accepted[of] = _MEMORY * self._accepted[of] + (index < accepted)

    def compare(self, draft: Sequence[int], said: Sequence[int]) -> None:
        """Observes a draft that was not verified itself, by the target's token in its place."""
        known = list(zip(draft, said, strict=False))
        accepted = next((index for index, (drafted, token) in enumerate(known) if drafted != token), len(known))
        self.observe(min(accepted + 1, len(known)), accepted)

    def forget(self, rounds: int) -> None:
        """Moves towards the priors: what has not been tried for long is worth another try."""
        kept = _FADING**rounds
        self._tested = [kept * tested for tested in self._tested]
        self._accepted = [kept * accepted for accepted in self._accepted]


class LinearTime:
    """The time of n passes, or of a pass of n rows: a fixed part and one for each, fitted to what was measured.

    Discounted least squares. A line, because each measurement then tells something about every n: with a time for each n, one
    disturbed measurement would keep its n from ever being tried again. Where all measurements have nearly the same n, the slope
    is that of the line that is known at first, in the unit of the measurements.
    """

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = self._first = fixed, each
        sums = _weighted(_PRIOR_WEIGHT, _PRIOR_AT, self.of(_PRIOR_AT))
        self._prior = self._sums = sums  # of the weights, n, n n, time, n time

    def of(self, n: int) -> float:
        return self.fixed + n * self.each

    def observe(self, n: int, time: float) -> None:
        self._fit(_MEMORY, _weighted(1.0, n, min(time, _JUMP * self.of(n))))

    def forget(self, rounds: int, unit: float) -> None:
        """Moves towards what was known at first, whose unit has this length now: a disturbance must not last."""
        kept = _MEMORY**rounds
        units = (1.0, 1.0, 1.0, unit, unit)
        self._fit(kept, [(1 - kept) * known * length for known, length in zip(self._prior, units, strict=True)])

    def _fit(self, kept: float, added: Sequence[float]) -> None:
        """Ridge regression towards the first slope, of what is kept and what is added; neither part is below 0."""
        self._sums = [kept * total + new for total, new in zip(self._sums, added, strict=True)]
        weight, of_n, of_squares, of_times, of_products = self._sums
        fixed, each = self._first
        expected = fixed * weight + each * of_n
        slope = each * of_times / expected if expected else 0.0
        spread = of_squares - of_n * of_n / weight
        self.each = max((of_products - of_n * of_times / weight + _RIDGE * slope) / (spread + _RIDGE), 0.0)
        self.fixed = (of_times - self.each * of_n) / weight
        if self.fixed < 0:
            self.fixed, self.each = 0.0, of_products / of_squares


def _weighted(weight: float, n: int, time: float) -> list[float]:
    """A measurement in the sums of a LinearTime."""
    return [weight * value for value in (1.0, n, n * n, time, n * time)]


def best_length(
    chances: tuple[float, float], draft: LinearTime, ahead: int, verify: LinearTime, batch: int, most: int
) -> tuple[float, int]:
    """The most expected tokens per unit of time for one row, and the number of drafts, 1..most, that gives them.

    A round of d drafts takes d + `ahead` passes of the draft side, and a pass of d + 1 tokens for each of `batch` rows. It
    gives a token of the target's and each draft that survives: 1 + a + a a' + ... (Leviathan et al., 2023, section 3.1), a and
    a' being the `chances` of `Acceptance`. `draft` is for one row; more of them take longer as a pass of the target does.
    """
    best_rate, best, tokens, (survival, later) = 0.0, 0, 1.0, chances
    slower = verify.of(batch) / verify.of(1)
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
    """One way to draft, and what is known about it. All times are in the same unit.

    A draft of probability p by its drafter is taken to be rejected with probability doubt * (1 - p)^power.
    """

    name: str
    acceptance: Acceptance
    draft: LinearTime  # by passes of the draft's layers, of one row
    ahead: int  # passes besides one per token: 1 where the target needs the last draft's state
    verify: LinearTime  # by rows
    rejected: float  # lately, and so the sum of (1 - p)^power over the drafts that were tested
    doubted: float
    power: int

    @property
    def doubt(self) -> float:
        return self.rejected / self.doubted

    def plan(self, batch: int, most: int) -> tuple[float, int]:
        """Expected tokens per unit of time and row, and the length that gives them."""
        return best_length(self.acceptance.chances, self.draft, self.ahead, self.verify, batch, most)

    def ends(self, rate: float) -> DraftEnds:
        """Where the probability of all drafts so far is so low that one more does not pay at this rate."""
        cost, gain = rate * (self.draft.each + self.verify.each), self.acceptance.chances[1]  # in tokens, if all were right
        return DraftEnds(survival=cost / gain if cost < gain else 1.0, doubt=self.doubt, power=self.power)

    def observe(self, drafted: int, accepted: int, probs: Sequence[float]) -> None:
        """The first `accepted` of `drafted` tokens, perhaps with these probabilities, were right, and the next one wrong."""
        self.acceptance.observe(drafted, accepted)
        if probs:
            tested = probs[: accepted + 1]
            self.rejected = _MEMORY * self.rejected + (len(tested) > accepted)
            self.doubted = _MEMORY * self.doubted + sum((1 - prob) ** self.power for prob in tested)


class Knowledge:
    """The estimates for one model. Times are in passes of one row, as the first one that was measured."""

    def __init__(self, plain: LinearTime, options: dict[str, Option]) -> None:
        self.plain, self.options = plain, options
        self._lookups = [(least, Acceptance(first, later, _LOOKUP_STRENGTH)) for least, first, later in _LOOKUPS]
        self._first_pass = plain.of(1)
        self._pass_seconds: float | None = None
        self._steps = 0

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
        for times in (option.draft, option.verify):
            if times is not self.plain:
                times.forget(rounds, unit)

    def observe_round(self, option: Option | None, drafted: int, draft_time: float, rows: int, verify_time: float) -> None:
        """`option` drafted, or, if None, a lookup or nothing; then a pass of `rows` verified. Times are in seconds."""
        verify = self.plain if option is None else option.verify
        if self._pass_seconds is None:
            self._pass_seconds = verify_time / verify.of(rows)
        verify.observe(rows, verify_time / self._pass_seconds)
        if option is not None and drafted:
            slower = verify.of(rows // (drafted + 1)) / verify.of(1)
            option.draft.observe(drafted + option.ahead, draft_time / self._pass_seconds / slower)


_REMEMBERED: WeakKeyDictionary[Backend, dict[str, Knowledge]] = WeakKeyDictionary()


def knowledge_of(model: Backend, drafters: Mapping[str, ExitDrafter], profile: DraftProfile, remembered: bool) -> Knowledge:
    """What is known of drafters by their names.

    `remembered`: with all that was learnt from the model's earlier outputs in this process. Otherwise every output starts from
    the profile, and from usual values for what that lacks.
    """
    by_drafters = _REMEMBERED.setdefault(model, {}) if remembered else {}
    key = ", ".join(drafters)
    if key not in by_drafters:
        by_drafters[key] = _at_first(model, drafters, profile)
    return by_drafters[key]


def _at_first(model: Backend, drafters: Mapping[str, ExitDrafter], profile: DraftProfile) -> Knowledge:
    spec, passes = model.spec, profile.passes
    embedding = spec.vocab * spec.hidden
    head = embedding / (spec.parameters - (0 if spec.tied else embedding))  # its share of the weights that a pass reads
    layer = (1 - head) / spec.layers
    if len(passes) > 1:
        # Where rows cost nothing, as on a GPU, the last time may be below the first; many rows must not take less than no time.
        each = max(passes[-1] - passes[0], 0.0) / (len(passes) - 1)
        plain = LinearTime(passes[0] - each, each)
    else:
        each = _SLOW_ROW if model.implementation == "generic" and model.device.type == "cpu" else _ROW
        plain = LinearTime(1 - each, each)
    step = plain.of(1)
    options: dict[str, Option] = {}
    for name, drafter in drafters.items():
        weights, exit_layer = drafter.weights, drafter.submodel.exit_layer
        is_exit = exit_layer < spec.layers
        known = profile.drafts if passes else {}  # without both the units would differ
        layers = exit_layer + (drafter.submodel.block is not None)
        draft = known.get(name, (layers * layer + head) * step * _COPY_COST.get(weights or "", 1.0))
        acceptance = profile.acceptance.get(name)
        if acceptance is None:
            of_exit = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE) if is_exit else 1.0
            acceptance = of_exit * _COPY_ACCEPTANCE.get(weights or "", 1.0)
        verify = plain
        if weights is None:
            rest = 1 - exit_layer * layer  # of a pass: the target goes on from the exit
            verify = LinearTime(rest * plain.fixed, rest * plain.each)
        doubt, power = _CALIBRATIONS[None if is_exit else weights]
        options[name] = Option(
            *(name, Acceptance(acceptance, acceptance), LinearTime(_CALL * step, draft), int(weights is None), verify),
            *(_STRENGTH * doubt, _STRENGTH, power),
        )
    return Knowledge(plain, options)
