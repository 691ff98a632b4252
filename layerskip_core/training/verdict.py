"""The speedup by drafts on this machine at an acceptance rate, and the cost of a training in
quality.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import fmean, median
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.info import CheckpointInfo, Cost
from ..checkpoint.loaded import Trainable, decoder_of
from ..checkpoint.open import for_decoding
from ..config.decoding import DecodingConfig
from ..config.model import PackingConfig
from ..decoding import DecodingLoop, decode, decode_batch
from ..decoding.drafters.bandit import expected_accepted
from ..losses import target_rows
from ..model.backend import Backend, DraftBlock
from ..model.eagle3 import Eagle3Weights
from ..splits import timely_rows
from .answers import BATCH, own_texts
from .data import with_whole_answers
from .plan import RunPlan
from .recipe import SMALL_MODEL
from .sharding import process_index

_PROMPT_TOKENS = 4  # of the timed answers
_TURNS = 9  # in each a plain step and every kind of round is timed once
_NARROW = 1.2  # greatest ratio of the ends of an interval; a wider one supports no number
_MOST = 8  # drafts of a round at most
_LENGTHS = (1, 2, 4, _MOST)  # draft lengths timed through exits
_ANSWER = 64  # tokens of an answer at most
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
    drafters = cast(dict[str, DraftBlock], backend.drafters)
    own = dict(drafters)
    if "eagle3" not in own:
        drafters["eagle3"] = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    try:
        return SpeedEstimate(_timed_turns(backend, replace(_PLAIN, strategy="eagle3")))
    finally:
        drafters.clear()
        drafters.update(own)


def _timed_turns(backend: Backend, drafting: DecodingConfig) -> list[Turn]:
    """Steps and rounds take turns, so that a busy machine slows both."""
    steps = _Rounds(backend, _PLAIN)
    rounds = {
        drafts: _Rounds(backend, replace(drafting, num_draft_tokens=drafts)) for drafts in _LENGTHS
    }
    turns = []
    for _ in range(_TURNS):
        step = steps.seconds()
        turns.append(Turn(step, {drafts: each.seconds() for drafts, each in rounds.items()}))
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


class _Rounds:
    """Rounds of decoding, one at a time; where an answer ends, another begins."""

    def __init__(self, backend: Backend, config: DecodingConfig) -> None:
        self._backend = backend
        self._config = config
        self._loop: DecodingLoop | None = None

    def seconds(self) -> float:
        """Seconds of the next round. A round with a prefill counts only where the context has no
        room for another.
        """
        if self._loop is not None:
            seconds = _time_of_step(self._loop)
            if seconds is not None:
                return seconds
        self._loop = decode(self._backend, [0] * _PROMPT_TOKENS, self._config)
        with_prefill = _time_of_step(self._loop)
        assert with_prefill is not None  # an answer has at least one step
        seconds = _time_of_step(self._loop)
        if seconds is None:
            self._loop = None
            return with_prefill
        return seconds


def _time_of_step(loop: DecodingLoop) -> float | None:
    """Seconds of the loop's next step; None at its end."""
    started = time.perf_counter()
    done = next(loop, None)
    return None if done is None else time.perf_counter() - started


class Baseline:
    """What a model does before its training: losses on its own texts and on held-out rows, and
    exact match, in fp32. `cost` compares with the trained model.
    """

    def __init__(
        self, trainable: Trainable, held_out: Sequence[Any], seed: int, trained_rows: int
    ) -> None:
        """`trained_rows`: of the whole run. Shorter runs read and answer fewer held-out rows."""
        self._model = trainable.model.eval()
        self._backend = trainable.backend
        self._decoder = decoder_of(trainable)
        few = with_whole_answers(held_out[: timely_rows(trained_rows)])
        self._own_texts = own_texts(self._decoder, seed)
        self._held_out = [row for row, _ in few]
        self._questions = [
            _Question.of(row, start) for row, start in few if _is_answerable(row, start)
        ]
        self._before = self._measure()
        # The first of the questions, after the training
        self.example: AnsweredRow | None = None

    def cost(self) -> Cost:
        self._model.eval()
        before = self._before
        after = self._measure()
        exact_match = None
        if self._questions:
            exact_match = (fmean(before.right), fmean(after.right))
            first = self._questions[0]
            self.example = AnsweredRow(
                self._decoder.detokenize(first.prompt),
                self._decoder.detokenize(first.reference),
                after.first_answer,
            )
        return Cost(
            tokens=len(before.best),
            agreement=float((before.best == after.best).float().mean()),
            before=exp(before.own_loss),
            after=exp(after.own_loss),
            task=(before.loss, after.loss) if self._held_out else None,
            exact_match=exact_match,
            answered=len(self._questions),
        )

    @torch.no_grad()
    def _measure(self) -> "_Measured":
        best, own_loss = self._read(self._own_texts)
        _, loss = self._read(self._held_out)
        right, first_answer = self._answer()
        return _Measured(best, own_loss, loss, right, first_answer)

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, float]:
        """(argmax tokens (N,), mean loss) over the targets."""
        backend = self._backend
        best = list[Tensor]()
        loss = 0.0
        for row in rows:
            ids = torch.as_tensor(row["input_ids"]).to(backend.device).long()[None]
            labels = torch.as_tensor(row["labels"]).to(backend.device).long()[None]
            states = backend.texts.states(ids, (backend.num_layers,))[backend.num_layers]
            hidden, targets = target_rows(states, labels)
            logits = backend.unembed(hidden).float()
            best.append(logits.argmax(-1).cpu())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        if not best:
            return torch.empty(0), 0.0
        tokens = torch.cat(best)
        return tokens, loss / max(1, len(tokens))

    def _answer(self) -> tuple[list[bool], str]:
        """Whether the greedy answer to each question equals its reference, up to outer white space;
        and the first answer.
        """
        decoder = self._decoder
        texts = [""] * len(self._questions)
        for at in range(0, len(self._questions), BATCH):
            batch = self._questions[at : at + BATCH]
            longest = max(len(question.reference) for question in batch)
            answers = decode_batch(
                self._backend,
                [question.prompt for question in batch],
                DecodingConfig("autoregressive", max_new_tokens=longest),
                decoder.eos_ids,
                decoder.detokenize,
            )
            for index, answer in enumerate(answers, start=at):
                texts[index] = answer.text
        right = []
        for text, question in zip(texts, self._questions, strict=True):
            right.append(text.strip() == decoder.detokenize(question.reference).strip())
        return right, "".join(texts[:1])


class AnsweredRow(NamedTuple):
    """A held-out row and the trained model's answer, as text."""

    prompt: str
    reference: str
    answer: str


class _Measured(NamedTuple):
    best: Tensor  # argmax tokens of the model's own texts
    own_loss: float  # mean over these texts
    loss: float  # mean over held-out rows
    right: list[bool]  # by answered row
    first_answer: str


def _is_answerable(row: Mapping[str, Any], start: int) -> bool:
    """Whether a row has a prompt, more than BOS, and a whole answer that is short."""
    return start > 1 and len(row["input_ids"]) - start <= _ANSWER and not row["truncated"]


@dataclass(frozen=True)
class _Question:
    """Token ids of a held-out row."""

    prompt: list[int]
    reference: list[int]

    @classmethod
    def of(cls, row: Mapping[str, Any], start: int) -> "_Question":
        """`start`: index of the reference's first token."""
        ids = row["input_ids"].tolist()
        return cls(ids[:start], ids[start:])


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
