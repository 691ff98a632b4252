"""The rows of a run: which data it reads, encoded rows in memory or as a stream, their order, and their batches."""

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..checkpoint.loaded import Trainable
from ..config.checks import require
from ..config.data import DataConfig
from ..config.training import FinetuneConfig
from ..data.examples import PARSING_TEMPLATE, Conversation, Example, Row, is_parsing, load_rows, stream_rows
from ..errors import ConfigError, DataError
from ..losses import IGNORED
from ..prompting import CHAT, RAW, PromptTemplate, resolve_template
from .encoding import Encoder
from .sharding import process_index, world_size

COMMANDS_STEPS = 300  # of a run on `commands` without `steps`: about five minutes on two cores
_VALIDATION_ROWS = 256
_SHUFFLED = 10_000  # rows of a stream in the shuffle buffer
_SAMPLED = 64  # rows of a stream that are read to plan a run, and rows that a step is timed on
_COUNTED = 50_000  # rows whose targets are counted, evenly spaced; of a stream the first ones
_COUNTED_TOKENS = 1_000_000  # of a stream, whose rows are encoded only to be counted
_POOL = 50  # optimizer steps whose rows are sorted together


def rows_per_step(config: FinetuneConfig) -> int:
    """Rows of an optimizer step, over all processes."""
    return config.batch_size * config.accumulation * world_size()


def replayed_rows(config: FinetuneConfig) -> int:
    """Rows of a step that are the original's own text. Raises ConfigError for a share that gives no such row, or only such."""
    share, rows = config.retention.replay, rows_per_step(config)
    replayed = round(share * rows)
    needed = f"a share of the {rows} rows of a step that is one row at least, and not all"
    require(not share or 0 < replayed < rows, "replay", needed, share)
    return replayed


def data_rows(config: FinetuneConfig) -> int:
    """Rows of a step that come from the data."""
    return rows_per_step(config) - replayed_rows(config)


def is_endless(data: DataConfig) -> bool:
    """Whether the rows are drawn by a generator: a run draws as many as it will see, so that none repeats."""
    return data.name == "commands" and not data.limit


def training_rows(config: FinetuneConfig) -> list[Row]:
    """The rows to train on; of a stream only the first, to see what its rows are."""
    data = config.data
    if config.streaming:
        return list(itertools.islice(stream_rows(data), 1))
    if is_endless(data):
        data = replace(data, limit=(config.steps or COMMANDS_STEPS) * data_rows(config))
    return load_rows(data)


def validation_data(config: FinetuneConfig, name: str) -> DataConfig:
    """`validation`: other data (a named set, a file, a folder, a hub id), or else a split of `data`."""
    other = name in ("commands", "topv2") or "/" in name or Path(name).exists() or Path(name).suffix != ""
    if not other and Path(config.data.name).is_file():
        raise ConfigError(f"`validation` must be other data where `data` is a file, which has no splits, got {name}")
    limit = _VALIDATION_ROWS if config.validation_samples is None else config.validation_samples
    held_out = replace(config.data, limit=limit, setting="validation")
    return replace(held_out, name=name, split="validation") if other else replace(held_out, split=name)


def make_encoder(config: FinetuneConfig, trainable: Trainable, rows: list[Row], max_length: int) -> Encoder:
    """Encodes both the rows to train on, of which `rows` are an example, and those to validate on.

    Documents are packed by default for plain text, without prompts, in a regime for language-model data.
    """
    plain = all(isinstance(row, Example) and not row.prompt for row in rows)
    pack = config.regime != "finetune" and plain if config.pack is None else config.pack
    return Encoder(trainable.tokenizer, _template(config, trainable, rows), max_length, pack)


def _template(config: FinetuneConfig, trainable: Trainable, rows: list[Row]) -> PromptTemplate:
    """The template asked for; else chat for conversations, the parsing template for parsing data, and otherwise what decoding
    uses by default. Where that is no template, a prompt gets a line end; plain text has none.
    """
    if any(isinstance(row, Conversation) for row in rows):
        return conversation_template(config)
    asked, system, stored = config.prompting.asked, config.prompting.system, trainable.info.template
    template = resolve_template(asked, system, stored, trainable.tokenizer)
    prompts = any(isinstance(row, Example) and row.prompt for row in rows)
    by_default = is_parsing(config.data) or (stored is None and template.text == RAW and prompts)
    return PromptTemplate(PARSING_TEMPLATE) if asked is None and system is None and by_default else template


def conversation_template(config: FinetuneConfig) -> PromptTemplate:
    """The template of conversations. Raises ConfigError for settings that they do not use."""
    asked, system = config.prompting.asked, config.prompting.system
    require(asked in (None, CHAT), "template", "chat for conversations", asked)
    require(system is None, "system", "left out for conversations, which have system messages of their own", system)
    return PromptTemplate(CHAT)


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows. `truncated` counts those cut at the maximum length, `tokens` the tokens after that, and `left_out` the rows
    whose prompt leaves no room for a token of the completion.

    `digest` is of all tokens and labels in their order. For a stream the counts are those of its first rows.
    """

    rows: Any  # datasets.Dataset of input_ids, labels and length; or StreamedRows
    count: int
    tokens: int
    truncated: int
    left_out: int
    longest: list[dict[str, Any]]  # some of the rows, the longest first
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
        count=len(kept),
        tokens=sum(row["length"] for row in kept),
        truncated=sum(row["truncated"] for row in kept),
        left_out=len(seen) - len(kept),
        longest=sorted(kept, key=lambda row: -row["length"])[:_SAMPLED],
    )


def _no_room(encoder: Encoder) -> DataError:
    return DataError(f"no row has room for a completion within `max_length` {encoder.max_length}: every prompt is longer")


def _has_target(row: dict[str, Any]) -> bool:
    return bool((np.asarray(row["labels"])[1:] != IGNORED).any())  # nothing predicts the first token


def token_order(data: EncodedData, vocab_size: int) -> list[int]:
    """All token ids 0..V-1, the most frequent targets of the training rows first; unseen ids follow in ascending order."""
    rows, most = data.rows, float("inf")
    if data.streamed:
        rows, most = rows.one_pass(0), _COUNTED_TOKENS
    else:
        rows = rows.select_columns("labels").select(range(0, len(rows), -(-len(rows) // _COUNTED)))
    counts: Counter[int] = Counter()
    seen = 0
    for row in itertools.islice(rows, _COUNTED):
        counts.update(row["labels"])  # includes IGNORED, which is not a token
        seen += len(row["labels"])
        if seen >= most:
            break
    return sorted(range(vocab_size), key=lambda token: -counts[token])


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


class ReplayedRows(Dataset[Any]):
    """The rows of a whole run in sequence: in each step some texts, at even distances among the rows of the data.

    The texts are a function of the position alone, so that resuming needs no history.
    """

    def __init__(self, rows: OrderedRows, texts: list[dict[str, Any]], replayed: int, per_step: int) -> None:
        """`rows`: of the data, per_step - replayed in each step."""
        self._rows, self._texts = rows, texts
        self._replayed, self._per_step = replayed, per_step

    def __len__(self) -> int:
        return len(self._rows) // (self._per_step - self._replayed) * self._per_step

    def __getitem__(self, position: int) -> Any:
        step, index = divmod(position, self._per_step)
        before = index * self._replayed // self._per_step
        if (index + 1) * self._replayed // self._per_step > before:
            return self._texts[(step * self._replayed + before) % len(self._texts)]
        return self._rows[step * (self._per_step - self._replayed) + index - before]


def run_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> Iterator[int]:
    """Row indices of a whole run: pass after pass over the rows, rows of similar length side by side.

    A function of the seed alone, so that resuming needs no history.
    """
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
    return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows], dtype=torch.long)
