"""The speedup by drafts on this machine, at an acceptance rate."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

from ..checkpoint.info import CheckpointInfo
from ..checkpoint.open import for_decoding
from ..config.decoding import DecodingConfig
from ..config.model import PackingConfig
from ..decoding import DecodingLoop, decode
from ..decoding.drafters.bandit import expected_accepted
from ..model.backend import Backend, DraftBlock
from ..model.eagle3 import Eagle3Weights
from .plan import RunPlan
from .recipe import SMALL_MODEL
from .sharding import process_index

_PROMPT_TOKENS = 4  # of the timed answers
_TURNS = 9  # in each a plain step and every kind of round is timed once
_NARROW = 1.2  # greatest ratio of the ends of an interval; a wider one supports no number
_MOST = 8  # drafts of a round at most
_LENGTHS = (1, 2, 4, _MOST)  # draft lengths timed through exits
_PLAIN = DecodingConfig("autoregressive", max_new_tokens=256, ignore_eos=True)  # timed


@dataclass(frozen=True)
class Turn:
    """Seconds of a plain step and of rounds by number of drafts, measured one right after
    another.
    """

    step: float
    rounds: Mapping[int, float]


@dataclass(frozen=True)
class Speedup:
    """An estimated speedup over plain decoding, at the best number of drafts, with the interval of
    its measurement.

    `most`: what arithmetic allows at any number of drafts: the tokens of a round over the weights
    that it reads.
    """

    value: float
    low: float
    high: float
    drafts: int
    most: float

    @property
    def is_known(self) -> bool:
        """False where the turns differ too much, as on a busy machine."""
        return self.high <= _NARROW * self.low


@dataclass(frozen=True)
class SpeedEstimate:
    """Times of decoding with drafts, from which the speedup at an acceptance rate follows."""

    turns: Sequence[Turn]
    depth: float = 0.0  # weights that a draft reads at least, as a share of those of a plain step

    @property
    def step(self) -> float:
        """Seconds of a plain step."""
        return median(turn.step for turn in self.turns)

    @property
    def draft(self) -> float:
        """The time of one more draft, as a share of a plain step; for exits with its
        verification.
        """
        return median(
            (turn.rounds[_MOST] - turn.rounds[1]) / (_MOST - 1) / turn.step for turn in self.turns
        )

    def speed(self, accepted: float) -> Speedup:
        """The speedup at an acceptance rate, with the number of drafts that gives the most."""
        speedups = [self._speedup(accepted, drafts) for drafts in self.turns[0].rounds]
        best = max(speedups, key=lambda speedup: speedup.value)
        return replace(best, most=max(speedup.most for speedup in speedups))

    def _speedup(self, accepted: float, drafts: int) -> Speedup:
        tokens = 1 + expected_accepted((accepted, accepted), drafts)
        most = tokens / (1 + drafts * self.depth)
        ratios = sorted(tokens * turn.step / turn.rounds[drafts] for turn in self.turns)
        # The second and the second last of nine enclose the median with 96% confidence, whatever
        # the distribution.
        low = ratios[1]
        high = ratios[-2]
        return Speedup(min(median(ratios), most), min(low, most), min(high, most), drafts, most)


def exit_speedup(backend: Backend, exit_layer: int, has_block: bool) -> SpeedEstimate:
    """Times rounds of decoding with drafts through an exit. A block that does not exist yet is
    timed as one more layer.
    """
    layers = exit_layer + has_block
    if exit_layer not in backend.exit_blocks:
        exit_layer = min(layers, backend.num_layers - 1)
    drafting = replace(_PLAIN, strategy="self-speculative", exit_layer=exit_layer)
    return SpeedEstimate(_timed_turns(backend, drafting), _depth(backend, layers))


def eagle3_speedup(backend: Backend, stored: Eagle3Weights) -> SpeedEstimate:
    """Times rounds of decoding with a drafter in the EAGLE-3 layout, which `backend` need not have.

    Until the model is saved with the drafter, its KV entries have no layer of their own: they take
    the place of the last layer's, whose values do not matter for a time.
    """
    with _lent_eagle3(backend, stored):
        return SpeedEstimate(_timed_turns(backend, replace(_PLAIN, strategy="eagle3")))


@contextmanager
def _lent_eagle3(backend: Backend, stored: Eagle3Weights) -> Iterator[None]:
    """Gives a backend without an EAGLE-3 drafter this one for a while."""
    drafters = cast(dict[str, DraftBlock], backend.drafters)
    if "eagle3" in drafters:
        yield
        return
    drafters["eagle3"] = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    try:
        yield
    finally:
        del drafters["eagle3"]


def _timed_turns(backend: Backend, drafting: DecodingConfig) -> list[Turn]:
    """Steps and rounds take turns, so that a busy machine slows both."""
    steps = _round_seconds(backend, _PLAIN)
    rounds = {}
    for drafts in _LENGTHS:
        rounds[drafts] = _round_seconds(backend, replace(drafting, num_draft_tokens=drafts))
    turns = []
    for _ in range(_TURNS):
        step = next(steps)
        turns.append(Turn(step, {drafts: next(seconds) for drafts, seconds in rounds.items()}))
    return turns


def _depth(backend: Backend, layers: int) -> float:
    """The share of a plain step's weights that the first `layers` layers have. 0 for a small model:
    there what a step costs besides its weights counts, and drafts share it.
    """
    spec = backend.spec
    if spec.parameters < SMALL_MODEL:
        return 0.0
    of_head = spec.vocab * spec.hidden / spec.weights_read(1)
    return (1 - of_head) * layers / backend.num_layers


def _round_seconds(backend: Backend, config: DecodingConfig) -> Iterator[float]:
    """Seconds of rounds of decoding; where an answer ends, another begins. A round with a prefill
    counts only where the context has no room for another.
    """
    while True:
        rounds = _step_seconds(decode(backend, [0] * _PROMPT_TOKENS, config))
        with_prefill = next(rounds)
        yield next(rounds, with_prefill)
        yield from rounds


def _step_seconds(loop: DecodingLoop) -> Iterator[float]:
    while True:
        started = time.perf_counter()
        if next(loop, None) is None:
            return
        yield time.perf_counter() - started


@dataclass(frozen=True)
class Verdict:
    """The estimated speedup by an exit or a drafter."""

    name: str
    accepted: float  # share of first drafts accepted on held-out rows
    speedup: Speedup  # over plain decoding, at the best draft length


def verdicts(plan: RunPlan, module: Any, info: CheckpointInfo) -> list[Verdict]:
    """Verdicts on the exits or the drafter of a run, on this machine. Empty without held-out rows,
    and in processes but the first.
    """
    agreement = info.agreement
    measured = [layer for layer, name in module.names.items() if name in agreement]
    if not measured or process_index() > 0:
        return []
    backend = for_decoding(plan.config.output, plan.device, plan.config.dtype).backend
    found = []
    for exit_layer in measured:
        accepted = agreement[module.names[exit_layer]]
        speedup = module.estimated_speedup(backend, exit_layer).speed(accepted)
        name = f"exit {exit_layer}" if exit_layer else "the drafter"
        found.append(Verdict(name, accepted, speedup))
    return found
