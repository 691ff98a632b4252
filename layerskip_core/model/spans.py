"""Runs spans of layers: several one after the other, or a large call in parts, which bounds the memory of activations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .backend import Layers, Spans
from .cache import KVCache

CHUNK = 256  # tokens of a prompt per part, which bounds the attention mask
MOST_BYTES = 1 << 28  # of activations, where a call has several prompts: its parts then have fewer tokens of each


def states_at(
    layers: Layers, hidden: Tensor, stops: Iterable[int], positions: Tensor, cache: KVCache, start: int = 0
) -> dict[int, Tensor]:
    """The hidden states after each of some ascending counts of layers, from those after `start`; see `Layers.run_layers`."""
    states = {}
    for stop in stops:
        states[stop] = hidden = layers.run_layers(hidden, start, stop, positions, cache)
        start = stop
    return states


def joined(parts: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """The states of all tokens, from those of the first, of the next, and so on."""
    return {stop: torch.cat([states[stop] for states in parts], dim=1) for stop in parts[0]}


def run_spans(layers: Layers, hidden: Tensor, spans: Spans, positions: Tensor, cache: KVCache) -> Tensor:
    """Several spans of layers, one after the other; arguments as for `Layers.run_layers`."""
    for start, stop in spans:
        hidden = layers.run_layers(hidden, start, stop, positions, cache)
    return hidden


class SpanKernel(Protocol):
    """Runs a span of layers in one part."""

    @property
    def num_layers(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    def tokens_at_once(self, batch: int, count: int) -> int:
        """How many of each row's `count` tokens one part has."""

    def run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        """As `Layers.run_layers`, for at least one token and one layer."""

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.write_kv`, for at least one token and one layer."""


def run_in_parts(kernel: SpanKernel, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None) -> Tensor:
    """`Layers.run_layers` by a kernel. The activations of a part take about 256 MB at most, or those of 256 tokens or of one
    token of each row, if that is more.
    """
    if not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return run_in_parts(kernel, hidden, start, stop, positions, cache)
    if cache is None:
        cache = KVCache(kernel.num_layers, len(hidden), kernel.max_positions)
    parts = _parts(kernel, hidden, start, stop, positions, cache)
    outputs = [kernel.run(part, start, stop, places, cache) for part, places in parts]
    if len(outputs) < 2:
        return outputs[0] if outputs else hidden
    return torch.cat(outputs, dim=1)


def write_kv_in_parts(kernel: SpanKernel, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
    """`Backend.write_kv` by a kernel, with the bounds of `run_in_parts`."""
    with torch.inference_mode():
        for part, places in _parts(kernel, hidden, start, stop, positions, cache):
            kernel.write_kv(part, start, stop, places, cache)


def _parts(
    kernel: SpanKernel, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache
) -> Iterable[tuple[Tensor, Tensor]]:
    """The hidden states and positions of a call, as those of calls that are small enough; none if there is no work."""
    batch, count, _ = hidden.shape
    assert 0 <= start <= stop <= kernel.num_layers and cache.rows == batch and positions.shape == (batch, count)
    if start == stop or batch * count == 0:
        return ()
    if count == 1 or count <= (most := kernel.tokens_at_once(batch, count)):
        return ((hidden, positions),)
    return zip(torch.split(hidden, most, 1), torch.split(positions, most, 1), strict=True)


def rows_at_once(rows: int, row_bytes: Callable[[], int]) -> int:
    """How many of a call's rows one part has. `row_bytes`: about what the activations of a row take."""
    return CHUNK if rows <= CHUNK else max(CHUNK, MOST_BYTES // row_bytes())


def tokens_at_once(batch: int, count: int, row_bytes: Callable[[], int]) -> int:
    """How many of each row's `count` tokens one part has."""
    return max(1, min(CHUNK, rows_at_once(batch * count, row_bytes) // batch))
