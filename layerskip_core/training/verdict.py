"""The speedup by drafts on this machine at an acceptance rate, and the cost of a training in quality."""

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
from ..decoding import decode, decode_batch
from ..decoding.drafters.bandit import PassTimes, expected_accepted
from ..losses import target_rows
from ..model.backend import Backend, DraftEnds, DraftHead, Submodel
from ..model.cache import Places
from ..model.eagle3 import Eagle3Weights
from ..splits import timely_rows
from .answers import BATCH, own_texts
from .data import with_whole_answers

_LONGEST = 4  # tokens of the longest timed pass
_TIMES = 5  # timed runs of a pass
_MOST = 8  # drafts of a round at most
_LENGTHS = (1, 2, 4, _MOST)  # draft lengths timed through exits
_RUNS, _ROUNDS = 3, 5  # timed runs of decoding, and rounds in each
_ANSWER = 64  # tokens of an answer at most


@dataclass(frozen=True)
class SpeedEstimate:
    """The estimated speedup by drafts."""

    step: float  # seconds of a plain step
    draft: float  # one more draft, as a share of `step`; for exits with its verification
    speed: Callable[[float], tuple[float, int]]  # from an acceptance rate to (speedup, best draft length)


def exit_speedup(backend: Backend, exit_layer: int, has_block: bool) -> SpeedEstimate:
    """Times rounds of decoding with drafts through an exit. A block that does not exist yet is timed as one more layer."""
    if exit_layer not in backend.exit_blocks:
        exit_layer = min(exit_layer + has_block, backend.num_layers - 1)
    plain = DecodingConfig("autoregressive", max_new_tokens=_ANSWER, ignore_eos=True)
    drafting = replace(plain, strategy="self-speculative", exit_layer=exit_layer)
    step, rounds = _round(backend, plain), {n: _round(backend, replace(drafting, num_draft_tokens=n)) for n in _LENGTHS}

    def speed(accepted: float) -> tuple[float, int]:
        return max((step * (1 + expected_accepted((accepted, accepted), n)) / rounds[n], n) for n in _LENGTHS)

    return SpeedEstimate(step, (rounds[_MOST] - rounds[1]) / (_MOST - 1) / step, speed)


def _round(backend: Backend, config: DecodingConfig) -> float:
    """Seconds of a round of decoding, or of a plain step: the minimum over runs."""
    times = []
    for _ in range(_RUNS):
        loop, rounds, begun, first = decode(backend, [0] * _LONGEST, config), 0, 0.0, 0
        for steps, _ in enumerate(loop):
            rounds = loop.stats.rounds or steps  # plain decoding counts no rounds
            if not begun and rounds > 0:  # the first round includes the prefill
                begun, first = time.perf_counter(), rounds
            if rounds - first == _ROUNDS:
                break
        times.append((time.perf_counter() - begun) / max(1, rounds - first))
    return min(times)


@torch.inference_mode()
def eagle3_speedup(backend: Backend, stored: Eagle3Weights) -> SpeedEstimate:
    """Times a drafter in the EAGLE-3 layout, by the mean of a few drafts."""
    run, cache = _Passes(backend), backend.new_cache(1, _LONGEST + 2)
    drafter = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    newest, submodel, head = torch.zeros(1, dtype=torch.long), Submodel(0, block=drafter), DraftHead(drafter.head)

    def drafts(embedded: Tensor, _: Places) -> Tensor:
        feature = embedded[:1]
        if drafter.kernel is not None:
            return drafter.kernel(head, newest, submodel, cache.span(1, _LONGEST + 2), DraftEnds(), feature, False)[0]
        outputs = (drafter.run(backend, feature, feature, place) for place in cache.span(1, _LONGEST + 1).parts(1))
        return torch.cat([drafter.head(output).argmax(-1) for output in outputs])

    return _estimate(run, run.timed(drafts, _LONGEST) / _LONGEST)


class _Passes:
    """Timed passes of a backend over a few tokens."""

    def __init__(self, backend: Backend) -> None:
        ids = torch.zeros(_LONGEST, dtype=torch.long, device=backend.device)
        self.backend, self._cache, self.hidden = backend, backend.new_cache(1, _LONGEST), backend.embed(ids)

    def timed(self, run: Callable[[Tensor, Places], Tensor], tokens: int) -> float:
        """Median seconds of `run` over the embeddings (T, D) of the first `tokens`, after a warm-up."""
        places, times = self._cache.span(0, tokens), []
        for _ in range(1 + _TIMES):
            started = time.perf_counter()
            float(run(self.hidden[:tokens], places).sum())  # synchronises with the device
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def seconds(self, tokens: int) -> float:
        """Seconds of a whole pass, head included."""
        model = self.backend
        return self.timed(lambda hidden, places: model.unembed(model.run_layers(hidden, 0, model.num_layers, places)), tokens)


def _estimate(run: _Passes, draft: float) -> SpeedEstimate:
    """The estimate for drafts that take `draft` seconds each."""
    known = [run.seconds(tokens) for tokens in range(1, _LONGEST + 1)]
    step, passes = known[0], PassTimes.measured(known)

    def speed(accepted: float) -> tuple[float, int]:
        def speedup(drafts: int) -> float:
            return step * (1 + expected_accepted((accepted, accepted), drafts)) / (drafts * draft + passes.of(drafts + 1))

        return max((speedup(drafts), drafts) for drafts in range(1, _MOST + 1))

    return SpeedEstimate(step, draft / step, speed)


class Original:
    """Measures losses on a model's own texts and held-out rows, and exact match: before its training, in fp32, and after."""

    def __init__(self, trainable: Trainable, held_out: Sequence[Any], seed: int, trained_rows: int) -> None:
        """`trained_rows`: of the whole run. Shorter runs read and answer fewer held-out rows."""
        self._model = trainable.model.eval()
        self._backend = trainable.backend
        self._decoder = decoder_of(trainable)
        few = with_whole_answers(held_out[: timely_rows(trained_rows)])
        self._own = own_texts(self._decoder, seed)
        self._held_out = [row for row, _ in few]
        self._asked = [_question(row, start) for row, start in few if _is_answerable(row, start)]
        self._before = self._measured()
        self.example: AnsweredRow | None = None  # the first of the answered rows, after the training

    def cost(self) -> Cost:
        self._model.eval()
        before, after = self._before, self._measured()
        losses = (before.loss, after.loss) if self._held_out else None
        exact_match = None
        if self._asked:
            exact_match = (fmean(before.right), fmean(after.right))
            prompt, reference = map(self._decoder.detokenize, self._asked[0])
            self.example = AnsweredRow(prompt, reference, after.first_answer)
        same = float((before.best == after.best).float().mean())
        tokens, asked = len(before.best), len(self._asked)
        return Cost(tokens, same, exp(before.own_loss), exp(after.own_loss), losses, exact_match, asked)

    @torch.no_grad()
    def _measured(self) -> "_Measured":
        best, own_loss = self._read(self._own)
        _, loss = self._read(self._held_out)
        right, first_answer = self._answered()
        return _Measured(best, own_loss, loss, right, first_answer)

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, float]:
        """(argmax tokens (N,), mean loss) over the targets."""
        backend, best, loss = self._backend, list[Tensor](), 0.0
        for row in rows:
            ids, labels = (torch.as_tensor(row[name]).to(backend.device).long()[None] for name in ("input_ids", "labels"))
            states = backend.texts.states(ids, (backend.num_layers,))[backend.num_layers]
            hidden, targets = target_rows(states, labels)
            logits = backend.unembed(hidden).float()
            best.append(logits.argmax(-1).cpu())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        return torch.cat(best) if best else torch.empty(0), loss / max(1, sum(map(len, best)))

    def _answered(self) -> tuple[list[bool], str]:
        """Whether the greedy answer to each question equals its reference, up to outer white space; and the first answer."""
        decoder, texts = self._decoder, [""] * len(self._asked)
        for at in range(0, len(self._asked), BATCH):
            prompts, wanted = zip(*self._asked[at : at + BATCH], strict=True)
            config = DecodingConfig("autoregressive", max_new_tokens=max(map(len, wanted)))
            for answer in decode_batch(self._backend, prompts, config, decoder.eos_ids, decoder.detokenize):
                texts[at + answer.row] = answer.text
        references = [decoder.detokenize(reference) for _, reference in self._asked]
        right = [text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)]
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
