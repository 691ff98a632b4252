"""Encoded rows for training, in memory or as a stream, and their batches."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ...config.data import DataConfig
from ...data.examples import Row, stream_rows
from ...errors import DataError
from ...losses import IGNORED
from .encoder import Encoder
from .step_rows import process_index, world_size

_SHUFFLED = 10_000  # rows of a stream in the shuffle buffer
_SAMPLED = 64  # rows of a stream that are read to plan a run


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows, `count` of them. `truncated` counts those cut at the maximum length, `tokens` the tokens after that, and
    `left_out` the rows whose prompt leaves no room for a token of the completion.

    `digest` is of all tokens and labels in their order. For a stream the counts are those of its first rows.
    """

    rows: Any  # datasets.Dataset of input_ids, labels and length; or StreamedRows
    tokens: int
    target_tokens: int
    truncated: int
    longest: int
    count: int
    left_out: int
    digest: str | None = None  # of a stream none

    @property
    def streamed(self) -> bool:
        return isinstance(self.rows, StreamedRows)


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> EncodedData:
    """All rows in memory. Raises DataError if none has a target token within the maximum length."""
    from datasets import Dataset

    encoded = [_compact(row) for row in encoder.rows(rows)]
    kept = list(filter(_has_target, encoded))
    columns = {name: [row[name] for row in kept] for name in kept[0]} if kept else {}
    data = _counted(Dataset.from_dict(columns) if kept else None, encoded, encoder)
    digest = hashlib.sha256()
    for row in kept:
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    return replace(data, digest=digest.hexdigest()[:16])


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose lists take 4 bytes for each number instead of 8 and more."""
    return {name: np.array(value, dtype=np.int32) if isinstance(value, list) else value for name, value in row.items()}


def encode_stream(config: DataConfig, encoder: Encoder, seed: int) -> EncodedData:
    """An endless stream of rows. Raises DataError like `encode_rows`, judged by the first rows."""
    stream = StreamedRows(config, encoder, seed, process_index(), world_size())
    sample = list(itertools.islice(encoder.rows(stream_rows(config)), _SAMPLED))
    return _counted(stream, sample, encoder)


def _counted(rows: Any, seen: list[dict[str, Any]], encoder: Encoder) -> EncodedData:
    kept = list(filter(_has_target, seen))
    if not kept:
        raise _no_room(encoder)
    return EncodedData(
        rows,
        tokens=sum(row["length"] for row in kept),
        target_tokens=sum(int((np.asarray(row["labels"]) != IGNORED).sum()) for row in kept),
        truncated=sum(row["truncated"] for row in kept),
        longest=max(row["length"] for row in kept),
        count=len(kept),
        left_out=len(seen) - len(kept),
    )


def _no_room(encoder: Encoder) -> DataError:
    return DataError(f"no row has room for a completion within `max_length` {encoder.max_length}: every prompt is longer")


def _has_target(row: dict[str, Any]) -> bool:
    return bool((np.asarray(row["labels"])[1:] != IGNORED).any())  # nothing predicts the first token


class StreamedRows(IterableDataset):  # type: ignore[type-arg]
    """Encoded rows of a file or hub data set, pass after pass, endlessly. The seed decides how the buffer shuffles them.

    Of several processes each reads all rows, and encodes its own share of them.
    """

    def __init__(self, config: DataConfig, encoder: Encoder, seed: int, process: int = 0, processes: int = 1) -> None:
        self._config = config
        self._encoder = encoder
        self._seed = seed
        self._process = process
        self._processes = processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            empty = True
            for row in self.one_pass(number):
                empty = False
                yield row
            if empty:  # the file has changed since the run was planned, or has too few rows
                fewer = f", or the data has fewer rows than the {self._processes} processes" if self._processes > 1 else ""
                raise DataError(f"{_no_room(self._encoder)}{fewer}")

    def one_pass(self, number: int) -> Iterator[dict[str, Any]]:
        """The rows of this process in pass `number` over the data."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        shuffled = _shuffled(stream_rows(self._config), generator)
        yield from filter(_has_target, self._encoder.rows(itertools.islice(shuffled, self._process, None, self._processes)))


def _shuffled(rows: Iterable[Row], generator: torch.Generator) -> Iterator[Row]:
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < _SHUFFLED:
            waiting.append(row)
            continue
        at = int(torch.randint(_SHUFFLED, (), generator=generator))
        yield waiting[at]
        waiting[at] = row
    yield from (waiting[at] for at in torch.randperm(len(waiting), generator=generator).tolist())


@dataclass(frozen=True)
class Collator:
    """Makes a batch (B, T) of rows, padded at the right, where causality alone keeps real tokens from seeing padding.
    `lengths` (B,) are those without padding.

    Packed rows add `documents` (B, T), -1 in the padding.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"input_ids": _padded(rows, "input_ids", self.pad_id), "labels": _padded(rows, "labels", IGNORED)}
        batch["lengths"] = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["labels"][:, 0] = IGNORED  # nothing predicts a row's first token; it must not count as a target either
        if "documents" in rows[0]:
            batch["documents"] = _padded(rows, "documents", -1)
        return batch


def _padded(rows: list[dict[str, Any]], name: str, filler: int) -> Tensor:
    length = max(len(row[name]) for row in rows)
    return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])
