"""Examples, conversations and documents as rows of token ids with labels, in memory or as a stream; rows as batches."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..config.data import DataConfig
from ..data.conversations import Conversation
from ..data.examples import Example, Row, stream_rows
from ..errors import DataError, LayerSkipError, first_line
from ..losses import IGNORED
from ..prompting.chat import has_chat_template, render_chat
from ..prompting.encoding import encode_prompt, encoded
from ..prompting.special_text import special_text
from ..prompting.template import PromptTemplate
from .packing import packed

_SHUFFLED = 10_000  # rows of a stream that wait together, so that neighbours in the file part
_SAMPLED = 64  # rows of a stream read to plan a run


@dataclass(frozen=True)
class Encoder:
    """How rows become token ids: prompt in its template and completion, a conversation in the tokenizer's, or packed text."""

    tokenizer: Any
    template: PromptTemplate
    max_length: int
    pack: bool = False

    def rows(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """Rows of input_ids, labels (-100 where nothing is to be learnt) and length, at most `max_length` tokens each.

        `truncated` says of a row whether it was cut, perhaps before its first target.
        """
        if self.pack:
            yield from ({**row, "truncated": False} for row in packed(map(self._document, rows), self.max_length))
            return
        for row in rows:
            ids, labels = self._encoded(row)
            truncated = len(ids) > self.max_length
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            yield {"input_ids": ids, "labels": labels, "length": len(ids), "truncated": truncated}

    def _document(self, row: Row) -> list[int]:
        if isinstance(row, Conversation) or row.prompt:
            raise DataError("`pack` is for plain text: a row with a prompt, or a conversation, would be cut anywhere")
        return self._encoded(row)[0]

    def _encoded(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids and labels of a row. Raises DataError that names it."""
        try:
            return self._conversation(row) if isinstance(row, Conversation) else self._example(row)
        except LayerSkipError as error:
            raise DataError(f"{row.where}: {error}" if row.where else str(error)) from None
        except Exception as error:  # a chat template is a program, and tokenizers raise many kinds
            raise DataError(f"{row.where or 'a row'} cannot be encoded: {first_line(error)}") from error

    def _example(self, row: Example) -> tuple[list[int], list[int]]:
        """Prompt, completion and end of text as ids; the labels of the prompt masked."""
        prompt = encode_prompt(self.tokenizer, self.template if row.prompt else PromptTemplate(), row.prompt)
        completion = list(self.tokenizer(row.completion, add_special_tokens=False)["input_ids"])
        completion += [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return prompt + completion, [IGNORED] * len(prompt) + completion

    def _conversation(self, row: Conversation) -> tuple[list[int], list[int]]:
        """A conversation in the tokenizer's chat template; labels only where the assistant speaks, its end of turn included."""
        if not has_chat_template(self.tokenizer):
            raise DataError("`data` holds conversations (messages), but the model's tokenizer has no chat template for them")
        special = special_text(self.tokenizer)
        held = special is not None and any(special.in_prompt(text) for message in row.messages for text in message)
        messages = [{"role": role, "content": content} for role, content in row.messages]
        if special is not None and held:  # what is said in a turn opens no other
            messages = [{name: special.masked(text) for name, text in message.items()} for message in messages]

        def text_of(count: int, prompt: bool) -> str:
            text = render_chat(self.tokenizer, messages[:count], add_generation_prompt=prompt) if count else ""
            return special.sealed(text) if special is not None and held else text

        text = text_of(len(messages), False)
        spans = [
            (text_of(at, True), text_of(at + 1, False)) for at, (role, _) in enumerate(row.messages) if role == "assistant"
        ]
        for before, through in spans:
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError("the tokenizer's chat template rewrites earlier turns: the assistant's cannot be told apart")
        if special is not None and held:
            ids, offsets = encoded(lambda: _with_offsets(special.encode(text, add_special_tokens=False)))
        else:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        spoken = [any(len(before) <= start < len(through) for before, through in spans) for start, _ in offsets]
        return ids, [token if said else IGNORED for token, said in zip(ids, spoken, strict=True)]


def _with_offsets(encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
    return list(encoding.ids), list(encoding.offsets)


@dataclass(frozen=True)
class EncodedData:
    """Tokenised rows, for a Trainer. `truncated` rows were cut at the maximum length; `tokens` counts all that are left.

    Of a stream the counts are those of its first rows.
    """

    rows: Any  # datasets.Dataset of input_ids, labels and length; or StreamedRows
    tokens: int
    target_tokens: int
    truncated: int
    longest: int

    @property
    def streamed(self) -> bool:
        return isinstance(self.rows, StreamedRows)


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> EncodedData:
    """All rows in memory. Raises DataError when none has a target token within the maximum length."""
    from datasets import Dataset

    encoded = list(encoder.rows(rows))
    kept = list(filter(_has_target, encoded))
    return _counted(Dataset.from_list(kept) if kept else None, encoded, encoder)


def encode_stream(config: DataConfig, encoder: Encoder, seed: int) -> EncodedData:
    """A stream of rows that has no end. Raises DataError as `encode_rows`, judged by the first rows."""
    stream = StreamedRows(config, encoder, seed)
    sample = list(itertools.islice(encoder.rows(stream_rows(config)), _SAMPLED))
    return _counted(stream, sample, encoder)


def _counted(rows: Any, seen: list[dict[str, Any]], encoder: Encoder) -> EncodedData:
    kept = list(filter(_has_target, seen))
    if not kept:
        raise _no_room(encoder)
    return EncodedData(
        rows,
        tokens=sum(row["length"] for row in kept),
        target_tokens=sum(sum(label != IGNORED for label in row["labels"]) for row in kept),
        truncated=sum(row["truncated"] for row in seen),
        longest=max(row["length"] for row in kept),
    )


def _no_room(encoder: Encoder) -> DataError:
    return DataError(f"no row has room for a completion within `max_length` {encoder.max_length}: every prompt is longer")


def _has_target(row: dict[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])  # nothing predicts the first token


class StreamedRows(IterableDataset):  # type: ignore[type-arg]
    """Encoded rows of a file or hub data set, pass after pass without end, shuffled within a window by the seed alone."""

    def __init__(self, config: DataConfig, encoder: Encoder, seed: int) -> None:
        self._config = config
        self._encoder = encoder
        self._seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            rows, found = self._encoder.rows(_shuffled(stream_rows(self._config), generator)), False
            for row in filter(_has_target, rows):
                found = True
                yield row
            if not found:  # the file is another than when the run was planned
                raise _no_room(self._encoder)


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
    """Rows to a batch (B, T), padded at the right: causality alone then keeps real tokens from seeing padding.

    Packed rows bring `documents` (B, T), -1 in the padding.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"input_ids": _padded(rows, "input_ids", self.pad_id), "labels": _padded(rows, "labels", IGNORED)}
        batch["labels"][:, 0] = IGNORED  # nothing predicts a row's first token; it must not count as a target either
        if "documents" in rows[0]:
            batch["documents"] = _padded(rows, "documents", -1)
        return batch


def _padded(rows: list[dict[str, Any]], name: str, filler: int) -> Tensor:
    length = max(len(row[name]) for row in rows)
    return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])
