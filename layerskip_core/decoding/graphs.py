"""Passes of decoding that are recorded once and replayed: CUDA graphs, on repacked weights.

On a GPU the host needs longer to start the many kernels of a small pass than the GPU needs to run them. A recorded pass is one
call, which runs the same kernels in the same order. Its shapes and addresses are fixed: it attends to all places that the cache
has now, and reads its positions from the device. It has the first slots of the cache, 1, 2, 4, 8, ... of them, whether each has
a row or not. When a text or the batch outgrows the cache, passes are recorded anew.

Recorded are the target's pass over at most K drafts of each row (K = 0 in plain decoding) and a whole greedy draft, of as many
tokens for each row. Everything else runs as usual on the same cache: prompts and passes that prompts are part of, sampled
drafts, and drafts that end where they are uncertain.
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

_WARMUP_RUNS = 2  # runs of a pass before it is recorded: in them torch chooses kernels and makes its buffers
_WORTH_KEEPING = 1024  # places of a cache whose recordings serve the next texts, too, however short they are

_IDLE: WeakKeyDictionary[Backend, "Recorder"] = WeakKeyDictionary()  # of decodings that are over

Tensors = tuple[Tensor, ...]


class Recorder:
    """The recorded passes of one decoding after another. They share a cache."""

    counts: dict[str, Any]  # of the present decoding, by names of DecodeStats

    def __init__(self, cache: RowCache) -> None:
        self.cache, self._device = cache, cache.storage.device
        self._storage: Tensor | None = None  # of the cache, when passes were recorded
        self._runs: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, tuple[Tensors, Callable[[], None], Tensors]] = {}  # inputs, replay, outputs
        self._pool: Any = None  # memory of all recordings
        self._records = True

    @classmethod
    def of(cls, model: Backend, cache: KVCache) -> "Recorder":
        """For a decoding that goes on from a cache. It has that of the model's last decoding, with these rows, if this is over
        and its cache not much too large for them; else it is a new one.
        """
        assert isinstance(cache, RowCache)
        recorder = _IDLE.pop(model, None)
        places = 0 if recorder is None else recorder.cache.slots * recorder.cache.capacity
        if recorder is None or places > max(_WORTH_KEEPING, 4 * cache.rows * cache.written):
            return cls(cache)
        recorder.cache.keep_rows(())
        recorder.cache.max_positions = 0
        recorder.cache.join(cache)
        return recorder

    def give_back(self, model: Backend) -> None:
        """The decoding is over."""
        _IDLE[model] = self

    @property
    def slots(self) -> int:
        """How many slots of the cache a pass has now."""
        return min(1 << (self.cache.rows - 1).bit_length(), self.cache.slots)

    def reach(self, stop: int) -> None:
        """Makes room for passes before position `stop`. Recordings are of one storage: if it moved, they are forgotten."""
        storage = self.cache.reach(stop)
        if storage is not self._storage:
            self._storage, self._pool = storage, None
            self._runs.clear()
            self._recordings.clear()

    def run(self, name: Hashable, work: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """What `work` makes of the inputs on the device; it is replayed if it was recorded for inputs of these shapes.

        `name` is equal for work that differs in nothing but its inputs. It runs over `cache` and never waits for the device.
        """
        key = name, tuple(tensor.shape for tensor in inputs)
        self._runs[key] += 1
        if self._records and key not in self._recordings and self._runs[key] > _WARMUP_RUNS:
            try:
                self._recordings[key] = self._recorded(work, inputs)
            except RuntimeError as error:
                self._records = False
                warnings.warn(f"decoding goes on without CUDA graphs: {first_line(error)}", RuntimeWarning, stacklevel=2)
        if key not in self._recordings:
            return work(*(tensor.to(self._device, non_blocking=True) for tensor in inputs))
        held, replay, outputs = self._recordings[key]
        for tensor, given in zip(held, inputs, strict=True):
            tensor.copy_(given, non_blocking=True)
        replay()
        self.counts["replayed"] += 1
        return tuple(output.clone() for output in outputs)  # the next replay may write there

    def _recorded(self, work: Callable[..., Tensors], inputs: Tensors) -> tuple[Tensors, Callable[[], None], Tensors]:
        held = tuple(tensor.to(self._device, non_blocking=True, copy=True) for tensor in inputs)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=stream):
            outputs = work(*held)
        return held, graph.replay, outputs


def instant(device: torch.device) -> Any:
    """A point in the device's work. On a GPU it is an event among that work, so that the host does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Between two instants. On a GPU the work must be done: the host has waited for something after it."""
    return last - first if isinstance(first, float) else float(first.elapsed_time(last)) / 1e3
