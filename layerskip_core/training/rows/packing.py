"""Documents packed into rows of equal length, and the attention masks that keep them apart."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...losses import IGNORED
from ...model import GenericBackend, SpanInputs


def packed(documents: Iterable[list[int]], length: int) -> Iterator[dict[str, Any]]:
    """Rows of exactly `length` tokens (the last may be shorter) with all documents in sequence.

    A document that does not fit continues in the next row, without a view of its beginning. `documents` numbers the documents
    of a row; the label of the first token of each is masked, because nothing predicts it.
    """
    ids: list[int] = []
    labels: list[int] = []
    numbers: list[int] = []
    for document in documents:
        at = 0
        while at < len(document):
            part = document[at : at + length - len(ids)]
            number = numbers[-1] + 1 if numbers else 0
            ids += part
            labels += [IGNORED, *part[1:]]
            numbers += [number] * len(part)
            at += len(part)
            if len(ids) == length:
                yield {"input_ids": ids, "labels": labels, "documents": numbers, "length": length}
                ids, labels, numbers = [], [], []
    if any(label != IGNORED for label in labels):
        yield {"input_ids": ids, "labels": labels, "documents": numbers, "length": len(ids)}


def positions_in_documents(documents: Tensor) -> Tensor:
    """Positions (B, T) that start at 0 with each document of a row; `documents` (B, T) numbers them."""
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(1).values


def span_inputs(backend: GenericBackend, hidden: Tensor, documents: Tensor | None) -> SpanInputs:
    """Those of whole rows (B, T, D), padded at the right; `documents` (B, T) numbers the documents packed into a row."""
    if documents is None:
        return backend.prepare(hidden, torch.arange(hidden.shape[1])[None])
    positions = positions_in_documents(documents.cpu())
    return between_documents(backend.prepare(hidden, positions, key_mask=documents >= 0), documents)


def between_documents(inputs: SpanInputs, documents: Tensor) -> SpanInputs:
    """The same inputs with each query's view limited to its own document. Every mask must be given, (B, 1, T, T)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask: dict[str, Tensor | None] = {}
    for kind, seen in inputs.mask.items():
        assert seen is not None
        never = torch.finfo(seen.dtype).min if seen.is_floating_point() else False
        mask[kind] = seen.masked_fill(~same, never)
    return replace(inputs, mask=mask)
