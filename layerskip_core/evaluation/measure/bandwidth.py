"""The bytes that a step of plain decoding reads, and how near that is to the memory's bandwidth."""

import time

import torch

from ...checkpoint.loaded import Decoder
from ...model import ModelSpec
from ...model.configuration import LAYER_KINDS

_STORED = {"int8": 1.0, "int4": 0.625}  # bytes per weight, with scales
_SUMS = 5  # timed sums of a tensor, the fastest of which shows the memory's bandwidth
_MOST_SUMMED = 1 << 30  # bytes of this tensor


def bandwidth(loaded: Decoder, step: float, positions: float = 0.0) -> dict[str, float]:
    """Bytes that a plain step reads (weights, KV entries of `positions`); bytes per second of it,
    and of a sum over as many.
    """
    total = _bytes_read(loaded, positions)
    memory = torch.ones(int(min(total, _MOST_SUMMED)) // 4 + 1, device=loaded.backend.device)
    times = []
    for _ in range(_SUMS):
        started = time.perf_counter()
        memory.sum().item()
        times.append(time.perf_counter() - started)
    return {
        "bytes_per_token": total,
        "bytes_per_second": total / step,
        "sum_bytes_per_second": 4 * len(memory) / min(times),
    }


def _bytes_read(loaded: Decoder, positions: float) -> float:
    backend = loaded.backend
    spec = backend.spec
    width = float(backend.dtype.itemsize)
    stored = width
    for name, size in _STORED.items():
        if name in backend.implementation.partition(")")[0]:
            stored = size
    # Our own kernels count what they read
    total = float(getattr(backend, "bytes_read", stored * spec.weights_read(1)))
    if isinstance(spec, ModelSpec):  # other specs do not know the KV entries of a layer
        for layer, kind in enumerate(spec.kinds):
            if kind in LAYER_KINDS:
                seen = min(positions, spec.window_of(kind) or positions)
                total += 2 * width * spec.of_layer(layer).key_width * seen
    return total
