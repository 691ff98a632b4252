"""Decoding passes recorded once as CUDA graphs and replayed, on repacked weights.

On a GPU the many kernels of a small pass take longer to launch than to run. A recorded pass is one
launch of the same kernels in the same order. Its shapes and addresses are fixed: it attends over
the present capacity of the cache, reads its positions from the device, and runs the first 1, 2, 4,
8, ... slots of the cache, with or without rows. When a text or the batch outgrows the cache, passes
are recorded again.

Recorded are the target's pass over at most K drafts per row (K = 0 in plain decoding) and whole
greedy drafts, equally long in all rows. Everything else runs as usual on the same cache: prefills
and passes that include them, and sampled drafts.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import first_line
from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.row_cache import RowCache
from .output import Timings

# Runs of a pass before it is recorded, in which torch chooses kernels and allocates buffers
_WARMUP_RUNS = 2
# Positions (slots x capacity) up to which a cache is kept for any next decoding
_WORTH_KEEPING = 1024

# By model, of its finished decoding
_IDLE: WeakKeyDictionary[Backend, "GraphRecorder"] = WeakKeyDictionary()

Tensors = tuple[Tensor, ...]


class GraphRecorder:
    """Recorded passes of successive decodings, which share a cache."""

    def __init__(self, cache: RowCache, timings: Timings) -> None:
        """`timings`: of the current decoding."""
        self.cache = cache
        self.timings = timings
        self._device = cache.storage.device
        self._storage: Tensor | None = None  # the cache's, when passes were recorded
        self._runs: Counter[Hashable] = Counter()
        # Inputs, replay, outputs
        self._recordings: dict[Hashable, tuple[Tensors, Callable[[], None], Tensors]] = {}
        self._pool: Any = None  # the memory that all recordings share
        self._can_record = True

    @classmethod
    def of(cls, model: Backend, cache: KVCache, timings: Timings) -> "GraphRecorder":
        """The recorder for a decoding that continues from a cache: that of the model's last
        decoding, whose cache takes over these rows, if it is idle and its cache not much too large;
        else a new one.
        """
        assert isinstance(cache, RowCache)
        recorder = _IDLE.pop(model, None)
        capacity = 0 if recorder is None else recorder.cache.slots * recorder.cache.capacity
        if recorder is None or capacity > max(_WORTH_KEEPING, 4 * cache.rows * cache.written):
            return cls(cache, timings)
        recorder.timings = timings
        recorder.cache.keep_rows(())
        recorder.cache.max_positions = 0
        recorder.cache.join(cache)
        return recorder

    def give_back(self, model: Backend) -> None:
        """Leaves the recorder to the model's next decoding."""
        _IDLE[model] = self

    @property
    def slots(self) -> int:
        """The number of cache slots in a pass."""
        return min(1 << (self.cache.rows - 1).bit_length(), self.cache.slots)

    def reach(self, end: int) -> None:
        """Makes room for positions before `end`. If the storage moves, recordings, which hold its
        addresses, are dropped.
        """
        storage = self.cache.reach(end)
        if storage is not self._storage:
            self._storage = storage
            self._pool = None
            self._runs.clear()
            self._recordings.clear()

    def run(self, name: Hashable, work: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """Returns `work(*inputs)`, run on the device or replayed if it was recorded for inputs of
        these shapes.

        Work of equal `name` differs in its inputs alone. It uses `cache` and never waits for the
        device.
        """
        key = name, tuple(tensor.shape for tensor in inputs)
        self._runs[key] += 1
        if self._can_record and key not in self._recordings and self._runs[key] > _WARMUP_RUNS:
            try:
                self._recordings[key] = self._recorded(work, inputs)
            except RuntimeError as error:
                self._can_record = False
                warnings.warn(
                    f"decoding goes on without CUDA graphs: {first_line(error)}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if key not in self._recordings:
            return work(*(tensor.to(self._device, non_blocking=True) for tensor in inputs))
        held, replay, outputs = self._recordings[key]
        for tensor, given in zip(held, inputs, strict=True):
            tensor.copy_(given, non_blocking=True)
        replay()
        self.timings.replayed += 1
        return tuple(output.clone() for output in outputs)  # the next replay may write there

    def _recorded(
        self, work: Callable[..., Tensors], inputs: Tensors
    ) -> tuple[Tensors, Callable[[], None], Tensors]:
        held = tuple(tensor.to(self._device, non_blocking=True, copy=True) for tensor in inputs)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=stream),
        ):
            outputs = work(*held)
        return held, graph.replay, outputs


def instant(device: torch.device) -> Any:
    """A point in time: on a GPU an event in its stream, so that the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Seconds between two instants. On a GPU the work before `last` must be complete."""
    if isinstance(first, float):
        return float(last - first)
    return float(first.elapsed_time(last)) / 1e3
