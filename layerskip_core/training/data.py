"""The rows of a run: which data it reads, encoded rows in memory or as a stream, their order, and
their batches.
"""

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from ..checkpoint.loaded import Trainable
from ..config.model import DataConfig
from ..config.training import DrafterConfig, FinetuneConfig, TrainingConfig
from ..data import (
    PARSING_TEMPLATE,
    Conversation,
    Example,
    Row,
    is_data,
    is_parsing,
    load_prompts,
    load_rows,
    own_splits,
    spread,
    stream_rows,
)
from ..errors import ConfigError, DataError, require
from ..losses import IGNORED
from ..prompting import CHAT, RAW, PromptTemplate, resolve_template
from ..splits import VALIDATION, HeldOut, hold_out, part_of, side_of, timely_rows
from .encoding import EncodedRow, Encoder, has_target
from .recipe import TEXT_PRESETS, mixed_seed
from .sharding import world_size

# Tokens per row, of tasks and of plain text; the paper's table has none
_LENGTH = 512
_TEXT_LENGTH = 2048
_VALIDATION_ROWS = 256
_SHUFFLED = 10_000  # rows of a stream shuffled together
_SAMPLED = 64  # rows of a stream that are read to plan a run
_DIVIDED = 4096  # rows of a stream that decide which rows are held out
_COUNTED = 10_000  # rows whose targets are counted: evenly spaced, or a stream's first ones
_POOL = 50  # optimizer steps whose rows are sorted together


def step_rows(config: TrainingConfig) -> tuple[int, int]:
    """(data rows, replayed rows) per optimizer step, over all processes. Raises ConfigError if
    `replay` leaves 0 of either.
    """
    share = config.replay or 0.0
    rows = config.batch_size * config.accumulation * world_size()
    replayed = round(share * rows)
    needed = f"a share of the {rows} rows of a step that is one row at least, and not all"
    require(not share or 0 < replayed < rows, "replay", needed, share)
    return rows - replayed, replayed


def run_steps(config: TrainingConfig, rows: int) -> int:
    """Optimizer steps of a run. An epoch sees each of the `rows` once; replayed rows come on
    top.
    """
    if config.steps is None and config.data.is_endless:
        return config.commands_steps
    if config.steps is not None:
        return config.steps
    epochs = config.epochs or config.usual_epochs
    return max(1, math.ceil(rows / step_rows(config)[0] * epochs))


@dataclass(frozen=True)
class RunRows:
    """The rows of a run."""

    training: list[Row]  # of a stream the first one, which decides on template and packing
    held_out: list[Row]  # those that choose, see splits.py
    division: HeldOut | None  # what `data` holds out; None if it has a split for that


def read_rows(config: TrainingConfig) -> RunRows:
    """Reads the rows of a run, and divides data that has no split `validation` (splits.py).

    Rows need no completion where the model writes the answers.
    """
    load: Callable[[DataConfig], list[Any]] = load_rows
    if isinstance(config, DrafterConfig) and config.answers == "model":
        load = load_prompts
    data = config.data
    if config.streaming:
        rows = list(itertools.islice(stream_rows(data), _DIVIDED))
    elif data.is_endless:
        rows = load(replace(data, limit=_endless_rows(config)))
    else:
        rows = load(data)

    has_split = data.split == "train" and VALIDATION in own_splits(data)
    if has_split and config.validation is None:
        split = replace(data, split=VALIDATION, limit=timely_rows(len(rows)))
        return RunRows(rows, load(split), None)
    division = hold_out([row.key for row in rows], nothing=config.validation is not None)
    if config.validation is not None:
        held_out = _named_rows(config, config.validation, load)
    else:
        held = [row for row in rows if division.holds(row.key)]
        held_out = [row for row in held if side_of(row.key) == VALIDATION]
    training = [row for row in rows if not division.holds(row.key)]
    if config.streaming:
        training = rows[:1]
    return RunRows(training, held_out, None if has_split else division)


def _endless_rows(config: TrainingConfig) -> int:
    """How many rows a run on `commands` sees; a drafter sees each of them several times."""
    rows = float(run_steps(config, 0) * step_rows(config)[0])
    if isinstance(config, DrafterConfig):
        rows /= config.epochs or config.usual_epochs
    return max(1, round(rows))


def _named_rows(
    config: TrainingConfig, name: str, load: Callable[[DataConfig], list[Row]]
) -> list[Row]:
    """The rows that choose of `validation`: of a split of `data`, or of other data. Raises
    ConfigError, DataError.
    """
    data = replace(config.data, setting="validation")
    limit = _VALIDATION_ROWS if config.validation_samples is None else config.validation_samples
    if not is_data(name):
        if Path(data.name).is_file():
            raise ConfigError(
                f"`validation` must be other data where `data` is a file, which has no splits, got {name}"
            )
        return load(replace(data, split=name, limit=limit))
    other = replace(data, name=name, split=VALIDATION, limit=0)
    if own_splits(other):
        return load(replace(other, limit=limit))
    rows = load(other)
    part = part_of([row.key for row in rows], VALIDATION if limit else None)
    return spread([rows[place] for place in part.places], limit)


def make_encoder(config: TrainingConfig, trainable: Trainable, rows: Sequence[Row]) -> Encoder:
    """The encoder that suits the training `rows`. Plain text is packed under the presets for it.
    Raises ConfigError.
    """
    plain = all(isinstance(row, Example) and not row.prompt for row in rows)
    for_text = isinstance(config, FinetuneConfig) and config.recipe.preset in TEXT_PRESETS
    context = trainable.backend.spec.context
    usual = _TEXT_LENGTH if for_text else _LENGTH
    longest = config.max_length or min(usual, context)
    needed = f"at most the model's context of {context} tokens"
    require(longest <= context, "max_length", needed, longest)
    template = _template(config, trainable, rows)
    return Encoder(trainable.tokenizer, template, longest, pack=plain and for_text)


def _template(config: TrainingConfig, trainable: Trainable, rows: Sequence[Row]) -> PromptTemplate:
    """Chat for conversations; else the requested template; else that of decoding, with two
    exceptions.

    The parsing template is for parsing data (for `finetune` even if the model stores another one),
    and for the prompts that `finetune` trains on if the model has no template.
    """
    asked = config.prompting.asked
    system = config.prompting.system
    stored = trainable.info.template
    if any(isinstance(row, Conversation) for row in rows):
        require(asked in (None, CHAT), "template", "chat for conversations", asked)
        needed = "left out for conversations, which have system messages of their own"
        require(system is None, "system", needed, system)
        return PromptTemplate(CHAT)
    template = resolve_template(asked, system, stored, trainable.tokenizer)
    if asked is not None or system is not None:
        return template
    is_finetune = isinstance(config, FinetuneConfig)
    if is_parsing(config.data) and (stored is None or is_finetune):
        return PromptTemplate(PARSING_TEMPLATE)
    has_prompts = any(isinstance(row, Example) and row.prompt for row in rows)
    if is_finetune and stored is None and template.text == RAW and has_prompts:
        return PromptTemplate(PARSING_TEMPLATE)
    return template


@dataclass(frozen=True)
class EncodedData:
    """Encoded rows with a target."""

    rows: list[EncodedRow]  # all, or a stream's first
    left_out: int  # rows whose prompts leave no room for a target
    digest: str | None  # of all tokens and labels; None for a stream
    stream: "StreamedRows | None" = None

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class RunData:
    """The encoded rows of a run."""

    training: EncodedData
    held_out: EncodedData | None
    encoder: Encoder

    @property
    def held_out_rows(self) -> list[EncodedRow]:
        return [] if self.held_out is None else self.held_out.rows


def encode(config: FinetuneConfig, trainable: Trainable, rows: RunRows) -> RunData:
    """Encodes the rows of `finetune`, in memory or as a stream."""
    encoder = make_encoder(config, trainable, rows.training)
    if config.streaming:
        assert rows.division is not None  # data with splits of its own is not streamed
        training = encode_stream(config.data, encoder, config.seed, rows.division)
    else:
        training = encode_rows(rows.training, encoder)
    held_out = None
    if rows.held_out:
        held_out = encode_rows(rows.held_out, encoder, required=config.validation is not None)
        if not held_out.rows:
            held_out = None
    return RunData(training, held_out, encoder)


def encode_rows(
    rows: Iterable[Row], encoder: Encoder, most: int | None = None, required: bool = True
) -> EncodedData:
    """All rows, or the first `most`. Raises DataError if a target within the maximum length is
    `required` and none has one.
    """
    encoded = list(itertools.islice(encoder.rows(rows), most))
    usable = list(filter(has_target, encoded))
    if not usable and required:
        raise no_room(encoder)
    digest = hashlib.sha256()
    for row in usable:
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    return EncodedData(usable, len(encoded) - len(usable), digest.hexdigest()[:16])


def encode_stream(
    config: DataConfig, encoder: Encoder, seed: int, division: HeldOut
) -> EncodedData:
    """An endless stream of rows, without those held out. Raises DataError like `encode_rows`,
    judged by the first rows.
    """
    stream = StreamedRows(config, encoder, seed, division)
    first = encode_rows(stream.unshuffled(), encoder, _SAMPLED)
    return replace(first, digest=None, stream=stream)


def no_room(encoder: Encoder) -> DataError:
    return DataError(
        f"no row has room for a completion within `max_length` {encoder.max_length}: every prompt is longer"
    )


def with_whole_answers(rows: Sequence[EncodedRow]) -> list[tuple[EncodedRow, int]]:
    """The rows that end with one uninterrupted answer, and the index of its first token; no packed
    rows.
    """
    found = []
    for row in rows:
        if "documents" in row:
            continue
        is_target = row["labels"] != IGNORED
        start = int(is_target.argmax())
        if is_target[start:].all():
            found.append((row, start))
    return found


def token_order(data: EncodedData, vocab_size: int) -> list[int]:
    """As `by_frequency`, of the training rows."""
    if data.stream is not None:
        counted = list(itertools.islice(data.stream.one_pass(0), _COUNTED))
    else:
        counted = data.rows[:: math.ceil(len(data.rows) / _COUNTED)]
    return by_frequency(counted, range(vocab_size))


def by_frequency(rows: Sequence[EncodedRow], known: Sequence[int]) -> list[int]:
    """All token ids 0..V-1, the most frequent targets of the rows first; of equally frequent ones
    those that come first in `known`, which also has all.
    """
    labels = np.concatenate([row["labels"] for row in rows])
    counts = np.bincount(labels[labels != IGNORED], minlength=len(known))
    order = np.array(known)
    found: list[int] = order[np.argsort(-counts[order], kind="stable")].tolist()
    return found


class StreamedRows(IterableDataset):  # type: ignore[type-arg]
    """Endless encoded rows of a file or hub data set, shuffled in chunks of `_SHUFFLED`. Every
    process reads all.
    """

    def __init__(self, config: DataConfig, encoder: Encoder, seed: int, division: HeldOut) -> None:
        self._config = config
        self._encoder = encoder
        self._seed = seed
        self._division = division

    def unshuffled(self) -> Iterator[Row]:
        """One pass over the rows that are not held out."""
        return (row for row in stream_rows(self._config) if not self._division.holds(row.key))

    def __iter__(self) -> Iterator[EncodedRow]:
        for number in itertools.count():
            rows = self.one_pass(number)
            first = next(rows, None)
            if first is None:  # the file has changed since the run was planned
                raise no_room(self._encoder)
            yield first
            yield from rows

    def one_pass(self, number: int) -> Iterator[EncodedRow]:
        """The rows of pass `number` over the data."""
        return filter(has_target, self._encoder.rows(self._shuffled(number)))

    def _shuffled(self, number: int) -> Iterator[Row]:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, number))
        rows = self.unshuffled()
        while chunk := list(itertools.islice(rows, _SHUFFLED)):
            for at in torch.randperm(len(chunk), generator=generator).tolist():
                yield chunk[at]


def ordered(
    config: TrainingConfig, lengths: Sequence[int], steps: int, texts: int = 0
) -> Sequence[int]:
    """A run's row indices: rows of these `lengths`, and `texts` replayed ones, which are numbered
    after them.
    """
    own, replayed = step_rows(config)
    order = array("q", run_order(lengths, own, steps, config.seed))
    own_texts = range(len(lengths), len(lengths) + texts)
    return array("q", with_replay(order, own_texts, replayed, own + replayed))


def with_replay(
    order: Sequence[int], texts: Sequence[int], replayed: int, per_step: int
) -> Iterator[int]:
    """Inserts `replayed` of the `texts` into each step of `per_step` rows, evenly spaced."""
    next_texts = itertools.cycle(texts)
    own = per_step - replayed
    for start in range(0, len(order), own):
        next_rows = iter(order[start : start + own])
        for index in range(per_step):
            due = (index + 1) * replayed // per_step > index * replayed // per_step
            yield next(next_texts if due else next_rows)


def run_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> Iterator[int]:
    """Row indices of a whole run. _POOL steps at a time are sorted by length and cut into steps,
    whose order is shuffled.

    The order depends on the seed alone, so a resumed run has the same; Trainer's depends on global
    random state.
    """
    waiting: list[int] = []
    steps_left = steps
    for number in itertools.count():
        generator = torch.Generator().manual_seed(mixed_seed(seed, number))
        waiting += torch.randperm(len(lengths), generator=generator).tolist()
        # Rows too few for a step wait for the next pass
        whole = len(waiting) // rows_per_step * rows_per_step
        for start in range(0, whole, rows_per_step * _POOL):
            pool = waiting[start : min(whole, start + rows_per_step * _POOL)]
            pool.sort(key=lambda row: -lengths[row])
            for at in torch.randperm(len(pool) // rows_per_step, generator=generator).tolist():
                if not steps_left:
                    return
                yield from pool[at * rows_per_step : (at + 1) * rows_per_step]
                steps_left -= 1
        waiting = waiting[whole:]


def collate(rows: list[EncodedRow]) -> dict[str, Tensor]:
    """`input_ids`, `labels` (B, T), padded at the right; `lengths` (B,); for packed rows
    `documents` (B, T), padded by -1.
    """

    def padded(name: str, filler: int) -> Tensor:
        values = [torch.as_tensor(row[name]) for row in rows]  # type: ignore[literal-required]
        return pad_sequence(values, batch_first=True, padding_value=filler).long()

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    batch["lengths"] = torch.tensor([len(row["input_ids"]) for row in rows])
    if "documents" in rows[0]:
        batch["documents"] = padded("documents", -1)
    return batch
