"""The speedup by drafts on this machine at an acceptance rate, and the cost of a training in
quality.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.info import Cost
from ..checkpoint.loaded import Trainable, decoder_of
from ..config.decoding import DecodingConfig
from ..config.model import PackingConfig
from ..decoding import DecodingLoop, decode, decode_batch
from ..decoding.drafters.bandit import PassTimes, expected_accepted
from ..losses import target_rows
from ..model.backend import Backend, DraftCall, DraftEnds, DraftHead, Submodel
from ..model.cache import Places
from ..model.eagle3 import Eagle3Weights
from ..splits import timely_rows
from .answers import BATCH, own_texts
from .data import with_whole_answers
from .recipe import SMALL_MODEL

_LONGEST = 4  # tokens of the longest timed pass
_TURNS = 9  # in each a plain step and every kind of round is timed once
_NARROW = 1.2  # greatest ratio of the ends of an interval; a wider one supports no number
_MOST = 8  # drafts of a round at most
_LENGTHS = (1, 2, 4, _MOST)  # draft lengths timed through exits
_ANSWER = 64  # tokens of an answer at most
_TIMED_TOKENS = 256  # of a timed answer, at most


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
        value, low, high = self._ratios(accepted, drafts)
        return Speedup(min(value, most), min(low, most), min(high, most), drafts, most)

    def _ratios(self, accepted: float, drafts: int) -> tuple[float, float, float]:
        """(median, low end, high end) of the turns' speedups.

        The second and the second last of nine enclose the median with 96% confidence, whatever the
        distribution.
        """
        tokens = 1 + expected_accepted((accepted, accepted), drafts)
        ratios = sorted(tokens * turn.step / turn.rounds[drafts] for turn in self.turns)
        return median(ratios), ratios[1], ratios[-2]


def exit_speedup(backend: Backend, exit_layer: int, has_block: bool) -> SpeedEstimate:
    """Times rounds of decoding with drafts through an exit. A block that does not exist yet is
    timed as one more layer.
    """
    layers = exit_layer + has_block
    if exit_layer not in backend.exit_blocks:
        exit_layer = min(layers, backend.num_layers - 1)
    plain = DecodingConfig("autoregressive", max_new_tokens=_TIMED_TOKENS, ignore_eos=True)
    drafting = replace(plain, strategy="self-speculative", exit_layer=exit_layer)
    steps = _Rounds(backend, plain)
    rounds = {
        drafts: _Rounds(backend, replace(drafting, num_draft_tokens=drafts)) for drafts in _LENGTHS
    }
    turns = []
    for _ in range(_TURNS):
        step = steps.seconds()
        turns.append(Turn(step, {drafts: each.seconds() for drafts, each in rounds.items()}))
    return SpeedEstimate(turns, _depth(backend, layers))


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
        if self._loop is not None and (took := _time_of_step(self._loop)) is not None:
            return took
        self._loop = decode(self._backend, [0] * _LONGEST, self._config)
        first = _time_of_step(self._loop)
        second = _time_of_step(self._loop)
        if second is None:
            self._loop = None
        took = first if second is None else second
        assert took is not None  # an answer has at least one step
        return took


def _time_of_step(loop: DecodingLoop) -> float | None:
    """Seconds of the loop's next step; None at its end."""
    started = time.perf_counter()
    done = next(loop, None)
    took = time.perf_counter() - started
    return None if done is None else took


@torch.inference_mode()
def eagle3_speedup(backend: Backend, stored: Eagle3Weights) -> SpeedEstimate:
    """Times a drafter in the EAGLE-3 layout, by the mean of a few drafts."""
    run = _Passes(backend)
    cache = backend.new_cache(1, _LONGEST + 2)
    drafter = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    newest = torch.zeros(1, dtype=torch.long)
    submodel = Submodel(0, block=drafter)
    head = DraftHead(drafter.head)

    def drafts(embedded: Tensor, _: Places) -> Tensor:
        feature = embedded[:1]
        if drafter.kernel is not None:
            places = cache.span(1, _LONGEST + 2)
            call = DraftCall(
                head, newest, submodel, places, DraftEnds(), feature=feature, runs_last=False
            )
            return drafter.kernel(call)[0]
        outputs = (
            drafter.run(backend, feature, feature, place)
            for place in cache.span(1, _LONGEST + 1).parts(1)
        )
        return torch.cat([drafter.head(output).argmax(-1) for output in outputs])

    turns = []
    for turn in range(1 + _TURNS):
        draft = run.timed(drafts, _LONGEST) / _LONGEST
        known = [run.seconds(tokens) for tokens in range(1, _LONGEST + 1)]
        passes = PassTimes.measured(known)
        rounds = {count: count * draft + passes.of(count + 1) for count in range(1, _MOST + 1)}
        if turn > 0:  # the first warms up
            turns.append(Turn(known[0], rounds))
    return SpeedEstimate(turns)


class _Passes:
    """Timed passes of a backend over a few tokens."""

    def __init__(self, backend: Backend) -> None:
        ids = torch.zeros(_LONGEST, dtype=torch.long, device=backend.device)
        self.backend = backend
        self._cache = backend.new_cache(1, _LONGEST)
        self.hidden = backend.embed(ids)

    def timed(self, run: Callable[[Tensor, Places], Tensor], tokens: int) -> float:
        """Seconds of `run` over the embeddings (T, D) of the first `tokens`."""
        places = self._cache.span(0, tokens)
        started = time.perf_counter()
        float(run(self.hidden[:tokens], places).sum())  # synchronises with the device
        return time.perf_counter() - started

    def seconds(self, tokens: int) -> float:
        """Seconds of a whole pass, head included."""
        model = self.backend
        return self.timed(
            lambda hidden, places: model.unembed(
                model.run_layers(hidden, 0, model.num_layers, places)
            ),
            tokens,
        )


class Original:
    """Measures losses on a model's own texts and held-out rows, and exact match: before its
    training, in fp32, and after.
    """

    def __init__(
        self, trainable: Trainable, held_out: Sequence[Any], seed: int, trained_rows: int
    ) -> None:
        """`trained_rows`: of the whole run. Shorter runs read and answer fewer held-out rows."""
        self._model = trainable.model.eval()
        self._backend = trainable.backend
        self._decoder = decoder_of(trainable)
        few = with_whole_answers(held_out[: timely_rows(trained_rows)])
        self._own = own_texts(self._decoder, seed)
        self._held_out = [row for row, _ in few]
        self._asked = [_question(row, start) for row, start in few if _is_answerable(row, start)]
        self._before = self._measured()
        # The first of the answered rows, after the training
        self.example: AnsweredRow | None = None

    def cost(self) -> Cost:
        self._model.eval()
        before = self._before
        after = self._measured()
        losses = (before.loss, after.loss) if self._held_out else None
        exact_match = None
        if self._asked:
            exact_match = (fmean(before.right), fmean(after.right))
            prompt, reference = map(self._decoder.detokenize, self._asked[0])
            self.example = AnsweredRow(prompt, reference, after.first_answer)
        same = float((before.best == after.best).float().mean())
        tokens = len(before.best)
        asked = len(self._asked)
        return Cost(
            tokens, same, exp(before.own_loss), exp(after.own_loss), losses, exact_match, asked
        )

    @torch.no_grad()
    def _measured(self) -> "_Measured":
        best, own_loss = self._read(self._own)
        _, loss = self._read(self._held_out)
        right, first_answer = self._answered()
        return _Measured(best, own_loss, loss, right, first_answer)

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, float]:
        """(argmax tokens (N,), mean loss) over the targets."""
        backend = self._backend
        best = list[Tensor]()
        loss = 0.0
        for row in rows:
            ids, labels = (
                torch.as_tensor(row[name]).to(backend.device).long()[None]
                for name in ("input_ids", "labels")
            )
            states = backend.texts.states(ids, (backend.num_layers,))[backend.num_layers]
            hidden, targets = target_rows(states, labels)
            logits = backend.unembed(hidden).float()
            best.append(logits.argmax(-1).cpu())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        return torch.cat(best) if best else torch.empty(0), loss / max(1, sum(map(len, best)))

    def _answered(self) -> tuple[list[bool], str]:
        """Whether the greedy answer to each question equals its reference, up to outer white space;
        and the first answer.
        """
        decoder = self._decoder
        texts = [""] * len(self._asked)
        for at in range(0, len(self._asked), BATCH):
            prompts, wanted = zip(*self._asked[at : at + BATCH], strict=True)
            config = DecodingConfig("autoregressive", max_new_tokens=max(map(len, wanted)))
            for answer in decode_batch(
                self._backend, prompts, config, decoder.eos_ids, decoder.detokenize
            ):
                texts[at + answer.row] = answer.text
        references = [decoder.detokenize(reference) for _, reference in self._asked]
        right = [
            text.strip() == reference.strip()
            for text, reference in zip(texts, references, strict=True)
        ]
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


def _question(row: Mapping[str, Any], start: int) -> tuple[list[int], list[int]]:
    """(prompt, reference) as token ids."""
    ids = row["input_ids"].tolist()
    return ids[:start], ids[start:]
