"""What a training costs in quality: the model before and after it, on its own texts and on
held-out rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.info import Cost
from ..checkpoint.loaded import Trainable, decoder_of
from ..config.decoding import DecodingConfig
from ..decoding import decode_batch
from ..losses import target_rows
from ..splits import timely_rows
from .answers import BATCH, own_texts
from .data import with_whole_answers
from .encoding import EncodedRow

_ANSWER = 64  # tokens of an answer at most


class CostBaseline:
    """What a model does before its training: losses on its own texts and on held-out rows, and
    exact match, in fp32. `cost` compares with the trained model.
    """

    def __init__(
        self, trainable: Trainable, held_out: Sequence[EncodedRow], seed: int, trained_rows: int
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

    def cost(self) -> "tuple[Cost, AnsweredRow | None]":
        """The cost of the training since, and the first of the questions with the answer now."""
        self._model.eval()
        before = self._before
        after = self._measure()
        exact_match = None
        example = None
        if self._questions:
            exact_match = (fmean(before.right), fmean(after.right))
            first = self._questions[0]
            example = AnsweredRow(
                self._decoder.detokenize(first.prompt),
                self._decoder.detokenize(first.reference),
                after.first_answer,
            )
        cost = Cost(
            tokens=len(before.best),
            agreement=float((before.best == after.best).float().mean()),
            before=exp(before.own_loss),
            after=exp(after.own_loss),
            task=(before.loss, after.loss) if self._held_out else None,
            exact_match=exact_match,
            answered=len(self._questions),
        )
        return cost, example

    @torch.no_grad()
    def _measure(self) -> "_Quality":
        best, own_loss = self._read(self._own_texts)
        _, loss = self._read(self._held_out)
        right, first_answer = self._answer()
        return _Quality(best, own_loss, loss, right, first_answer)

    def _read(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, float]:
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


class _Quality(NamedTuple):
    best: Tensor  # argmax tokens of the model's own texts
    own_loss: float  # mean over these texts
    loss: float  # mean over held-out rows
    right: list[bool]  # by answered row
    first_answer: str


def _is_answerable(row: EncodedRow, start: int) -> bool:
    """Whether a row has a prompt, more than BOS, and a whole answer that is short."""
    return start > 1 and len(row["input_ids"]) - start <= _ANSWER and not row["truncated"]


@dataclass(frozen=True)
class _Question:
    """Token ids of a held-out row."""

    prompt: list[int]
    reference: list[int]

    @classmethod
    def of(cls, row: EncodedRow, start: int) -> "_Question":
        """`start`: index of the reference's first token."""
        ids = row["input_ids"].tolist()
        return cls(ids[:start], ids[start:])
