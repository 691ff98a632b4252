"""Passes of decoding that are recorded once and replayed: CUDA graphs, for one prompt on repacked weights.

On a GPU the host needs longer to start the many kernels of a small pass than the GPU needs to run them. A recorded pass is one
call, which runs the same kernels in the same order. Its shapes and addresses are fixed: it attends to all places that the cache
has now, and reads its positions from the device. When the text outgrows the cache, passes are recorded anew. A text that goes
on from a kept one is copied into that cache. Batches have no recordings: their cache moves whenever a row joins or leaves.

Recorded are the target's pass over K drafts (K = 0 in plain decoding) and a whole greedy draft. Everything else runs as usual
on the same cache: prompts, sampled drafts, and drafts that end where they are uncertain.
"""

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import first_line
from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.row_cache import RowCache

_AS_USUAL = 2  # runs of a pass before it is recorded: in them torch chooses kernels and makes its buffers
_WORTH_KEEPING = 1024  # places of a cache whose recordings serve the next text, too, however short it is

_IDLE: WeakKeyDictionary[Backend, "Recorder"] = WeakKeyDictionary()  # of decodings that are over

Tensors = tuple[Tensor, ...]


class Recorder:
    """The recorded passes of one decoding after another, each of one row. They share a cache."""

    counts: dict[str, Any]  # of the present decoding, by names of DecodeStats

    def __init__(self, model: Backend) -> None:
        cache, self._device = model.new_cache(), model.device
        assert isinstance(cache, RowCache)
        self.cache = cache
        self._storage: Tensor | None = None  # of the cache, when passes were recorded
        self._runs: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, tuple[Tensors, Callable[[], None], Tensors]] = {}  # inputs, replay, outputs
        self._pool: Any = None  # memory of all recordings
        self._records = True

    @classmethod
    def of(cls, model: Backend, length: int, end: int) -> "Recorder":
        """That of the model's last decoding, if it is over and not much too large for a prompt of this length; else a new one.

        `end`: after the last position of the text.
        """
        recorder = _IDLE.pop(model, None)
        if recorder is None or recorder.cache.capacity > max(_WORTH_KEEPING, 4 * length):
            recorder = cls(model)
        recorder.cache.max_positions, recorder.counts = end, defaultdict(int)
        return recorder

    def begin(self, text: KVCache) -> RowCache:
        """The cache, whose row begins as the one of another cache."""
        assert isinstance(text, RowCache)
        with torch.inference_mode():  # which it was written in
            self.cache.reach(text.capacity)[..., : text.capacity, :] = text.storage
        self.cache.written = max(self.cache.written, text.written)
        return self.cache

    def give_back(self, model: Backend) -> None:
        """The decoding is over."""
        _IDLE[model] = self

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
        if self._records and key not in self._recordings and self._runs[key] > _AS_USUAL:
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
