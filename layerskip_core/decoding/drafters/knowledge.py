"""Adaptive drafting's knowledge of a model: how often its drafters are right, and how long passes take.

The drafters are the arms of a bandit. An arm is judged by the upper end of the interval of its acceptance (UCB: Auer et al.,
2002), and one that was never tried by a shorter time than expected, so that it is tried.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import hypot, inf, log, log2, prod, sqrt
from weakref import WeakKeyDictionary

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds
from .exit import ExitDrafter

_MEMORY = 0.995  # weight of what was known, per new observation
_LONG_MEMORY = 0.998  # the same of how far to trust a probability, which differs less between texts
_FADING = 0.999  # the same per round in which an arm was not tried
_STRENGTH = 4.0  # observations that a prior counts as
_MEASURED = 8.0  # the same of one that was measured, on other texts
_DEVIATIONS = 1.0  # standard deviations between what is expected of an arm and what it is judged by
_UNTRIED = 0.5  # by so much more than 1 an arm that was never tried may be faster than expected; by less after each try
_TIMES = 0.07  # weight of a newly measured time
_POWERS = 11  # of 2, whose passes have known times
_LEAST_DOUBT = 1e-4  # nothing is more certain
_JUMP = 2.0  # a time that is longer than expected by more than this factor was disturbed, and counts as this much
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of drafts, that are compared

_EXIT_ACCEPTANCE = 0.85  # of a trained exit of which nothing is known
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92}  # of calibrated int4 weights
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # of a pass, over one by bf16 weights
# Doubt and power, see DraftEnds. Trained exits are calibrated, copies of all layers are right more often than they say.
_CALIBRATIONS = {None: (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3)}
# Least evidence of a lookup; acceptance of its first token, and of further ones.
_LOOKUPS = ((0, 0.3, 0.5), (2, 0.5, 0.7), (3, 0.6, 0.7), (4, 0.75, 0.8), (8, 0.9, 0.9), (16, 0.95, 0.95))
# The same in earlier answers. A text that follows one of them for 64 tokens repeats it.
_ANSWER_LOOKUPS = ((0, 0.15, 0.6), (1, 0.4, 0.6), (3, 0.7, 0.6), (8, 0.85, 0.75), (16, 0.95, 0.85), (64, 0.97, 0.97))
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
# One step in every `_PLAIN_EVERY` has no drafts, so that the time of such steps is known, and some of the first ones. Not the
# very first: a short output has few steps, and drafts usually pay.
_PLAIN_FIRST, _PLAIN_AT, _PLAIN_EVERY = (4, 12, 28, 60), 124, 128
# Where looking for drafts gained less than this over plain decoding lately, one step of so many looks for them: the fewer the
# more it loses.
_LOOKS, _LOOKS_ALONE = ((0.97, 16), (1.03, 4)), 4  # of several rows, and of one, whose text may soon be another
_DOUBTFUL, _DOUBTFUL_PLAIN_EVERY = 1.15, 8  # below this gain, one step of so many is plain, so that the gain is known well
_ORIGIN = 0.5  # weight of a draft without steps that takes no time
_PERIODS = 0.97  # weight of the times of steps that were known, per new one
_REST = 0.1  # of a pass: what the rest of a step may be if nothing is known of it
_FEW = 48  # tokens of a row, from steps that looked for drafts
_SETTLED, _COMPARED = 64, 8  # after so many choices, all arms are compared in one of so many


NO_OTHERS = 0.0, 0  # see `best_length`


class Acceptance:
    """The chance that a draft is accepted given that all before it were: of the first in a round, and of later ones.

    Estimated from what was seen lately, and from priors that count as `strength` observations each.
    """

    def __init__(self, first: float, later: float, strength: float = _STRENGTH) -> None:
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
        numbers = [1 << power for power in range(_POWERS)]
        times = (known[n - 1] if n <= measured else of_one + each * (n - 1) for n in numbers)
        self._first = list(accumulate(times, max))
        self._times = list(self._first)
        self._weights = [0.0] * len(numbers)

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
        error, longest = min(time / self.of(n), _JUMP) - 1, 0.0
        for place, near in enumerate(_nearness(n)):
            self._weights[place] += near
            weight = max(_TIMES, 1 / (1 + self._weights[place]))
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
    return [2.0 ** (-abs(where - place) / 2) for place in range(_POWERS)]


class Calibration:
    """How far to trust a drafter's own probability p: its draft is rejected with probability doubt * (1 - p)^power.

    The power is that under which what was seen is most probable.
    """

    def __init__(self, doubt: float, power: int) -> None:
        self._rejected = _STRENGTH * doubt
        self._doubted = dict.fromkeys((1, 3), _STRENGTH)  # by power, sum of (1 - p)^power over the drafts tested
        self._likelihood = {known: 2.0 * (known == power) for known in self._doubted}  # logarithms
        self._prior = doubt, power
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
    3.1), a and a' being the `chances` of `Acceptance`. `others`: the tokens that other rows of the pass are expected to get,
    and those that the pass has of them. `near`: where the search begins. `rest`: the time of a round besides drafts and pass.
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
            time = min(time, _JUMP * (self.each + self.factor * expected))
        self.tries += 1
        terms = 1.0, expected, time, expected * expected, expected * time
        self._sums = [_PERIODS * known + new for known, new in zip(self._sums, terms, strict=True)]
        count, x, y, xx, xy = self._sums
        spread = (count + _ORIGIN) * xx - x * x
        self.factor = ((count + _ORIGIN) * xy - x * y) / spread
        self.each = (y - self.factor * x) / (count + _ORIGIN)
        if self.each < 0:
            self.each, self.factor = 0.0, xy / xx


class Arm:
    """One way to draft, and what is known about it.

    Attributes:
        steps: the times of passes of its layers by their rows.
        pace: of the drafts of all arms with the same kernels.
        ahead: passes besides one per token: 1 where the target needs the last draft's state.
        share: of a pass of the target that is left to verify its drafts.
        tries: rounds of it whose times were measured.
    """

    def __init__(
        self,
        name: str,
        acceptance: Acceptance,
        steps: PassTimes,
        pace: Pace,
        share: float,
        calibration: Calibration,
        tries: float,
    ) -> None:
        self.name, self.acceptance, self.calibration, self.tries = name, acceptance, calibration, tries
        self.steps, self.pace, self.share, self.ahead = steps, pace, share, int(share < 1)
        self.length = 1  # of the draft that was last found best
        self.last_choice = 0  # the number of the choice at which it was chosen, or up to which it has faded

    def fade(self, choice: int) -> None:
        """Before the choice with this number: without a try for long, it may have been unlucky, or its times disturbed."""
        rounds, self.last_choice = choice - 1 - self.last_choice, choice - 1
        if rounds:
            self.acceptance.fade(rounds)
            self.steps.fade(rounds)

    def step(self, rows: int, pace: float) -> float:
        """The time of a step, which is that of arms with the same kernels as far as this one was not tried.

        `pace`: of the target's passes, if none of them was tried.
        """
        pace = self.pace.factor if self.pace.tries else pace
        own, usual = self.steps.of(rows), pace * self.steps.of(rows, at_first=True)
        trust = 1.0 if self.tries == inf else self.tries / (self.tries + _STRENGTH)
        return trust * own + (1 - trust) * usual

    def observe_times(self, rows: int, drafted: int, draft_time: float, verify_time: float, whole_pass: float) -> None:
        """Times of a round; `whole_pass`: of the target over the same tokens, as expected."""
        self.tries += 1
        count = drafted + self.ahead
        self.pace.observe(count * self.steps.of(rows, at_first=True), draft_time)
        self.steps.observe(rows, max(draft_time - self.pace.each, 0.0) / count)
        if self.ahead:
            self.share += _TIMES * (min(verify_time / whole_pass, 1.0) - self.share)


class Knowledge:
    """The estimates for one model. Times are in passes of one token, as the first one that was measured."""

    def __init__(self, passes: PassTimes, arms: dict[str, Arm]) -> None:
        self.passes, self.arms = passes, arms
        self._lookups = [  # in the row's own text, and in earlier answers
            [(least, Acceptance(first, later, _LOOKUP_STRENGTH)) for least, first, later in priors]
            for priors in (_LOOKUPS, _ANSWER_LOOKUPS)
        ]
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
        """From one step of so many rows to the next, all included. `looks`: whether the step looked for drafts.

        `in_passes`: the seconds of its drafts and of the target's pass.
        """
        if not looks or self._choices >= _SETTLED:  # the first tries of what does not pay say nothing of what is chosen later
            known = self._periods.setdefault((rows.bit_length(), looks), [0.0, 0.0, 0.0])
            known[:] = _PERIODS * known[0] + tokens, _PERIODS * known[1] + seconds, known[2] + tokens
        if looks and self._pass_seconds is not None:
            most = _JUMP * self.rest + _REST * self.passes.of(1)  # a step that took longer was disturbed
            self.rest += _TIMES * (min((seconds - in_passes) / self._pass_seconds, most) - self.rest)

    @property
    def _pace(self) -> float:
        """How long the target's passes take, over what was expected from the first that was measured."""
        return self.passes.of(1) / self.passes.of(1, at_first=True)

    def _gain(self, rows: int) -> float:
        """Tokens per second with about so many rows where steps look for drafts, over those of plain steps; inf if unknown."""
        looking, plain = (self._periods.get((rows.bit_length(), looks), [0.0, 0.0, 0.0]) for looks in (True, False))
        if looking[2] < _FEW * rows:
            return inf
        # Where no plain step is known, it is none, so that one will be.
        return looking[0] * plain[1] / (plain[0] * looking[1]) if plain[0] else 1.0

    def best_length(
        self, arm: Arm, rows: int, most: int, deviations: float = 0.0, others: tuple[float, int] = NO_OTHERS
    ) -> tuple[float, int]:
        """See `best_length`, by the mean acceptance of the arm, or the upper end of its interval of so many deviations."""
        step = arm.step(rows, self._pace)
        if deviations:
            step /= 1 + _UNTRIED / (1 + arm.tries + arm.pace.tries / _STRENGTH)
        chances = arm.acceptance.chances(deviations)
        rest = self.rest + arm.pace.each
        found = best_length(chances, step, self.passes, most, arm.ahead, arm.share, rows, others, arm.length, rest)
        arm.length = found[1]
        return found

    def choose(
        self, rate: float, most: int, rows: int, mixed: tuple[int, tuple[float, int]] | None = None
    ) -> tuple[Arm, bool] | None:
        """The arm that may give the most tokens per unit of time, if more than `rate`, for all `rows`; or, and then True, for
        some of them, as `mixed` says, while the others look up. A drafter whose states the target goes on from needs all rows.
        """
        best = None
        self._choices += 1
        last = self._last if self._choices > _SETTLED and self._choices % _COMPARED else None
        for arm in self.arms.values() if last is None else [last]:
            arm.fade(self._choices)
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


def knowledge_of(model: Backend, drafters: Mapping[str, ExitDrafter], profile: DraftProfile, remembered: bool) -> Knowledge:
    """What is known of drafters by their names.

    `remembered`: with all that was learnt from the model's earlier outputs in this process. Otherwise every output starts from
    the profile, and from usual values for what that lacks.
    """
    by_drafters = _REMEMBERED.setdefault(model, {}) if remembered else {}
    key = ", ".join(drafters)
    if key not in by_drafters:
        by_drafters[key] = _at_first(model, drafters, profile, remembered)
    return by_drafters[key]


def _at_first(model: Backend, drafters: Mapping[str, ExitDrafter], profile: DraftProfile, measures: bool) -> Knowledge:
    """`measures`: whether times will be measured; else those that are known count as if they were."""
    spec = model.spec
    embedding = spec.vocab * spec.hidden
    head = embedding / (spec.parameters - (0 if spec.tied else embedding))  # its share of the weights that a pass reads
    layer = (1 - head) / spec.layers
    passes = PassTimes(1.0, 0.0, profile.passes or _usual_times(model.row_cost))
    arms: dict[str, Arm] = {}
    paces: dict[str | None, Pace] = defaultdict(Pace)
    for name, drafter in drafters.items():
        weights, exit_layer = drafter.weights, drafter.submodel.exit_layer
        is_exit = exit_layer < spec.layers
        known = profile.drafts if profile.passes else {}  # without both the units would differ
        layers = exit_layer + (drafter.submodel.block is not None)
        part = layers * layer + head
        steps = passes.of_part(known.get(name, part * passes.of(1) * _COPY_COST.get(weights or "", 1.0)), part)
        acceptance, strength = profile.acceptance.get(name), _MEASURED
        if acceptance is None:
            of_exit = profile.acceptance.get(f"exit {exit_layer}", _EXIT_ACCEPTANCE) if is_exit else 1.0
            acceptance, strength = of_exit * _COPY_ACCEPTANCE.get(weights or "", 1.0), _STRENGTH
        calibration = Calibration(*_CALIBRATIONS[None if is_exit else weights])
        share = 1.0 if weights else 1 - exit_layer * layer  # the target goes on from the exit
        known_acceptance = Acceptance(acceptance, acceptance, strength)
        arms[name] = Arm(name, known_acceptance, steps, paces[weights], share, calibration, tries=0.0 if measures else inf)
    return Knowledge(passes, arms)


def _usual_times(row_cost: float) -> list[float]:
    """Of passes of 1, 2, ... tokens, which wait for memory as long as these are few, and for arithmetic if they are many."""
    return [hypot(1, row_cost * n) / hypot(1, row_cost) for n in range(1, 2 ** (_POWERS - 1) + 1)]
