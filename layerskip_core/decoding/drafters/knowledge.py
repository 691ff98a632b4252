"""All that adaptive drafting knows about a model: what can draft, how often it is right, how long it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ...config.decoding import DraftProfile
from ...model.backend import Backend, DraftEnds
from .estimates import Acceptance, Chance, Doubts, LinearTime, best_length, slowdown

_CALL = 0.03  # of a pass of one row: what a draft takes besides its passes
_ROW = 0.06  # of a pass of one row: for each further row
_SLOW_ROW = 0.5  # the same for transformers' layers on a CPU, whose kernels are made for one row or for many
_EXIT_ACCEPTANCE = 0.85  # of a trained exit of which nothing is known
_COPY_ACCEPTANCE = {"int8": 0.95, "int4": 0.92}  # of calibrated int4 weights
_COPY_COST = {"int8": 0.5, "int4": 0.33}  # of a pass, over one by bf16 weights
# Doubt and power, see DraftEnds. Trained exits are calibrated, copies of all layers are right more often than they say.
_DOUBTS = {None: (1.0, 1), "int8": (0.15, 3), "int4": (0.8, 3)}
# Least evidence of a lookup; acceptance of its first token, and of further ones.
_LOOKUPS = ((0, 0.3, 0.5), (2, 0.5, 0.7), (3, 0.6, 0.7), (4, 0.75, 0.8), (8, 0.9, 0.9), (16, 0.95, 0.95))
_LOOKUP_STRENGTH = 2.0  # of these priors: texts differ so much that they count little
# One step in every `_PLAIN_EVERY` has no drafts, so that the time of such steps is known. Not the first one: a short output
# has few steps, and drafts usually pay.
_PLAIN_AT, _PLAIN_EVERY = 4, 128


@dataclass
class Option:
    """One way to draft, and what is known about it. All times are in the same unit."""

    name: str
    acceptance: Acceptance
    draft: LinearTime  # by passes of the draft's layers, of one row
    ahead: int  # passes besides one per token: 1 where the target needs the last draft's state
    verify: LinearTime  # by rows
    doubts: Doubts

    def plan(self, batch: int, most: int) -> tuple[float, int]:
        """Expected tokens per unit of time and row, and the length that gives them."""
        chance = self.acceptance
        return best_length(chance.first, chance.later, self.draft, self.ahead, self.verify, batch, most)

    def ends(self, rate: float) -> DraftEnds:
        """Where the probability of all drafts so far is so low that one more does not pay at this rate."""
        cost, gain = rate * (self.draft.each + self.verify.each), self.acceptance.later  # in tokens, if all so far are right
        return DraftEnds(survival=cost / gain if cost < gain else 1.0, doubt=self.doubts.scale, power=self.doubts.power)


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
        doubts = Doubts(*_DOUBTS[None if is_exit else weights])
        options[name] = Option(name, Acceptance(Chance(acceptance), Chance(acceptance)), times, ahead, verify, doubts)
    return Knowledge(plain, options)


def _passes(model: Backend, profile: DraftProfile) -> LinearTime:
    """Times of a pass by its rows: those of the profile, or usual ones in passes of one row."""
    if len(profile.passes) > 1:
        # Where rows cost nothing, as on a GPU, the last time may be below the first; many rows must not take less than no time.
        each = max(profile.passes[-1] - profile.passes[0], 0.0) / (len(profile.passes) - 1)
        return LinearTime(profile.passes[0] - each, each)
    each = _SLOW_ROW if model.implementation == "generic" and model.device.type == "cpu" else _ROW
    return LinearTime(1 - each, each)
