"""Layers with a memory of fixed size in the place of attention, between their projections: see recurrence.h."""

import ctypes

from ..spec import ModelSpec
from ..weights import Weights, convolution
from .compiled import CRecurrence

CONVOLUTION, DECAY, DELTA = range(3)  # kinds, as the C code numbers them
MOST_TAPS, LARGEST_KEY = 8, 256  # as in recurrence.h


def memory_of(spec: ModelSpec) -> tuple[int, int, int]:
    """Of all such layers of a model: the bytes of a text's state and of a slot of its ring; and how many slots they need."""
    if spec.recurrence is None:
        return 0, 0, 0
    state, entry = _layer_bytes(spec)
    count = len(spec.kinds) - len(spec.attending)
    return count * state, count * entry, spec.recurrence.taps


class NativeRecurrence:
    """The weights of such a layer between its projections, and the C structure with their addresses."""

    def __init__(self, weights: Weights, spec: ModelSpec, index: int) -> None:
        sizes = spec.recurrence
        assert sizes is not None
        filters, bias = convolution(weights, spec)
        parts = {"filter": filters.T, "filter_bias": bias}
        self._parts = {name: part.float().contiguous() for name, part in parts.items() if part is not None}
        self._structure = CRecurrence(
            kind=CONVOLUTION,
            taps=sizes.taps,
            channels=sizes.channels,
            width=sizes.width,
            convolved=2 * sizes.channels,
            gate=sizes.channels,
            **{name: part.data_ptr() for name, part in self._parts.items()},
        )
        place = index - sum(layer < index for layer in spec.attending)  # among such layers
        self._structure.state, self._structure.entry = (place * size for size in _layer_bytes(spec))

    @property
    def addresses(self) -> tuple[int, int | None]:
        """Of the structure and of the projection of its steps, if it has one."""
        return ctypes.addressof(self._structure), None


def _layer_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Of a layer in a text's state, and in a slot of its ring, as recurrence.h lays them out."""
    sizes = spec.recurrence
    assert sizes is not None
    return 0, 4 * _vectors(sizes.channels)


def _vectors(floats: int) -> int:
    return -(-floats // 16) * 16
