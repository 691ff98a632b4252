"""The order of a run's rows: a function of the seed alone, so that resuming needs no history."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

_POOL = 50  # optimizer steps whose rows are sorted together


class OrderedRows(Dataset[Any]):
    """The rows of a whole run in sequence: all passes over the data as one long epoch.

    (Trainer's own shuffling depends on global random state, so that a run resumed in a later epoch gets another order.)
    """

    def __init__(self, rows: Any, order: Iterator[int]) -> None:
        """`rows`: a datasets.Dataset; `order`: an index into it per row of the run."""
        self._rows = rows
        self._order = array("q", order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Any:
        return self._rows[self._order[position]]


def run_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> Iterator[int]:
    """Row indices of a whole run: pass after pass over the rows, rows of similar length side by side."""
    waiting: list[int] = []
    left = rows_per_step * steps
    for number in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        waiting += torch.randperm(len(lengths), generator=generator).tolist()
        for pool in _pools(waiting, lengths, rows_per_step):
            for at in torch.randperm(len(pool), generator=generator).tolist():
                if not left:
                    return
                yield from pool[at]
                left -= len(pool[at])
        waiting = waiting[len(waiting) // rows_per_step * rows_per_step :]  # too few for a step: the next pass takes them


def _pools(rows: list[int], lengths: Sequence[int], size: int) -> Iterator[list[list[int]]]:
    """Whole steps of `size` rows of similar length, _POOL steps at a time."""
    whole = rows[: len(rows) // size * size]
    for start in range(0, len(whole), size * _POOL):
        pool = sorted(whole[start : start + size * _POOL], key=lambda row: -lengths[row])
        yield [pool[at : at + size] for at in range(0, len(pool), size)]
