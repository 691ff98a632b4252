"""The order in which a run sees its rows: a function of the seed alone, so that resuming needs no history."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50  # optimizer steps whose rows are sorted together


class RunOrder(Sampler[int]):
    """Row indices of a whole run as one long epoch: pass after pass over the rows, rows of similar length side by side.

    (Trainer's own sampler draws each epoch from global random state: a run resumed after the first one sees another order.)
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> None:
        self._lengths = lengths
        self._rows_per_step = rows_per_step
        self._total = rows_per_step * steps
        self._seed = seed

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        waiting: list[int] = []
        left = self._total
        for number in itertools.count():
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            waiting += torch.randperm(len(self._lengths), generator=generator).tolist()
            for pool in self._pools(waiting):
                for at in torch.randperm(len(pool), generator=generator).tolist():
                    if not left:
                        return
                    yield from pool[at]
                    left -= len(pool[at])
            waiting = waiting[
                len(waiting) // self._rows_per_step * self._rows_per_step :
            ]  # too few for a step: the next pass's

    def _pools(self, rows: list[int]) -> Iterator[list[list[int]]]:
        """Whole steps of rows of similar length, _POOL steps at a time."""
        size = self._rows_per_step
        whole = rows[: len(rows) // size * size]
        for start in range(0, len(whole), size * _POOL):
            pool = sorted(whole[start : start + size * _POOL], key=lambda row: -self._lengths[row])
            yield [pool[at : at + size] for at in range(0, len(pool), size)]
