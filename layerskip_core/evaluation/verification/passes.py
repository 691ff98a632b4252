"""Logits: a row alone and among others, a text in one pass and in pieces, one thread and several."""

import os
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from .results import CheckResult, Mismatch, Promise
from .subject import Ids, Subject

_LONGEST_PIECE = 9
ROWS, PIECES, THREADS = "row alone = among others", "token by token = at once", "any number of threads"


def check_passes(subject: Subject) -> Iterator[CheckResult]:
    """Logits of every prompt with its output. With kernels that are batch-invariant they have the same bits."""
    backend = subject.loaded.backend
    if backend.exact:
        return  # takes one row, and splits the calls of drafts alone
    promise: Promise = "bits" if backend.batch_invariant else "near-ties"
    texts = subject.texts
    alone = [subject.logits(torch.tensor([text]))[0] for text in texts]
    yield _compared(subject, ROWS, f"{len(texts)} rows", promise, alone, _together(subject, texts))
    yield _compared(subject, PIECES, "one by one", promise, alone, [_pieces(subject, text, [1] * len(text)) for text in texts])
    random = Random(subject.seed)
    pieces = [_pieces(subject, text, _sizes(len(text), random)) for text in texts]
    yield _compared(subject, PIECES, f"pieces of 1 to {_LONGEST_PIECE}", promise, alone, pieces)
    cores = os.cpu_count() or 1
    if backend.device.type == "cpu" and cores > 1:
        before = torch.get_num_threads()
        other = cores if before == 1 else 1
        torch.set_num_threads(other)
        try:
            found = [subject.logits(torch.tensor([text]))[0] for text in texts]
        finally:
            torch.set_num_threads(before)
        yield _compared(subject, THREADS, f"{before} and {other}", promise, alone, found)


def _together(subject: Subject, texts: list[Ids]) -> list[Tensor]:
    """The texts as rows of one call, padded at their ends."""
    longest = max(map(len, texts))
    rows = torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts])
    return [row[: len(text)] for row, text in zip(subject.logits(rows), texts, strict=True)]


def _pieces(subject: Subject, text: Ids, sizes: list[int]) -> Tensor:
    return subject.logits(torch.tensor([text]), sizes)[0]


def _sizes(length: int, random: Random) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(random.randint(1, _LONGEST_PIECE), length - sum(sizes)))
    return sizes


def _compared(
    subject: Subject, check: str, setting: str, promise: Promise, expected: list[Tensor], found: list[Tensor]
) -> CheckResult:
    """Logits (T, V) by text. A mismatch is the first place with another token, or where bits count with other bits."""
    mismatches: list[Mismatch] = []
    deviation = 0.0
    for number, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        deviation = max(deviation, float((wanted - got).abs().max()))
        tokens, others = wanted.argmax(-1), got.argmax(-1)
        differs = (wanted != got).any(-1) if promise == "bits" else tokens != others
        if differs.any():
            place = int(differs.byte().argmax())
            pair = int(tokens[place]), int(others[place])
            mismatches.append(subject.place(number, place, *pair, lambda row=wanted[place]: row))  # type: ignore[misc]
    return subject.result(check, setting, promise, len(expected), sum(map(len, expected)), mismatches, deviation)
